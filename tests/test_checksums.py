"""Two hashes side by side: what is written now, and what older releases wrote."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lastgood
import loops
from lastgood.errors import CorruptCheckpoint, LastgoodError
from lastgood.format import digests
from lastgood.format import manifest as codec
from lastgood.format import tensors as safetensors
from lastgood.model import FileEntry, Manifest
from lastgood.repo.read import records
from lastgood.state.tensors import ALIGNED, by_digest, digest, holds, named
from lastgood.state.weights import prepare
from lastgood.store import checksum, local
from lastgood.store.checksum import Each, Kind, Sum
from lastgood.weights.load import chosen

import cli

DATA = Path(__file__).parent / "data"
KINDS: tuple[Kind, ...] = ("xxh3", "blake3")


def test_the_hashes_are_those_of_their_specifications() -> None:
    """XXH3-128 of nothing, as xxHash's own tests have it, and the first of BLAKE3's vectors."""
    assert checksum.of(memoryview(b"")) == "xxh3:99aa06d3014798d86001c324468d497f"
    assert checksum.of(memoryview(b""), "blake3") == "af1349b9f5f9a1a6a0404dea36dcc949"
    assert Sum().entry() == FileEntry(0, xxh3="99aa06d3014798d86001c324468d497f")
    assert Sum("blake3").entry().blake3 == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=5), kind=st.sampled_from(KINDS))
def test_pieces_have_the_hash_of_the_whole(data: bytes, cuts: list[int], kind: Kind) -> None:
    ends = [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    whole, each, at = Sum(kind), Each([0, len(data), len(data), 0], kind), 0
    for end in ends:
        whole.update(memoryview(data)[at:end])
        each.update(memoryview(data)[at:end])
        at = end
    each.update(memoryview(data + b"behind the last"))
    assert whole.tensor() == checksum.of(memoryview(data), kind)
    nothing = checksum.of(memoryview(b""), kind)
    assert each.told == [nothing, whole.tensor(), whole.tensor(), nothing]
    assert checksum.kind_of(whole.tensor()) == kind
    assert whole.entry().kind == kind and whole.entry().size == len(data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_tensor_is_hashed_like_a_small_one(kind: Kind) -> None:
    data = memoryview(bytes(range(256)) * (checksum.LARGE // 256 + 3))
    whole = Sum(kind)
    for at in range(0, len(data), 1000):
        whole.update(data[at : at + 1000])
    assert checksum.of(data, kind) == whole.tensor()


@given(shapes=st.lists(st.lists(st.integers(0, 40), max_size=2), max_size=12), kind=st.sampled_from(KINDS))
def test_a_file_tells_the_digest_of_each_of_its_tensors(
    shapes: list[list[int]], kind: Kind, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dtypes = (torch.float32, torch.float64, torch.int8)
    state = {f"t{n}": torch.ones(shape, dtype=dtypes[n % 3]) * n for n, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("one") / "file"
    size, chunks = safetensors.encode(named(state))
    sizes = [len(entry.data) for entry in safetensors.ordered(named(state))]
    each = Each([size - sum(sizes), *sizes])
    entry = local.write(path, chunks, size=size, each=each)
    told = digests.told(safetensors.ordered(named(state)), each.told[1:])
    assert told == {name: digest(tensor) for name, tensor in state.items()}
    whole, found = digests.digests(path, kind)
    assert whole == local.digest(path, kind) and (whole == entry) == (kind == "xxh3")
    assert {n: place.digest for n, place in found.items()} == {n: digest(t, kind=kind) for n, t in state.items()}
    for name, place in found.items():
        assert holds(state[name], place.digest)
        assert (place.slot.begin % ALIGNED == 0) or (place.slot.end - place.slot.begin) % ALIGNED
        assert place.slot.begin % state[name].element_size() == 0


def test_what_begins_at_64_bytes_may_stand_behind_what_does_not() -> None:
    """Files of older releases have their own order, and are read as they are."""
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "U8", "shape": [64], "data_offsets": [3, 67]},
    }
    text = json.dumps(header).encode()
    found = safetensors.decode(
        Path("x"), memoryview(bytearray(struct.pack("<Q", len(text)) + text + b"abc" + b"d" * 64))
    )
    assert bytes(found["a"].data) == b"abc" and bytes(found["b"].data) == b"d" * 64


def test_tensors_are_found_by_either_hash() -> None:
    one, two = torch.arange(5), torch.zeros(2, 2)
    wants = [digest(one, kind="blake3"), digest(two)]
    found = by_digest([one, two], wants)
    assert found[wants[0]] is one and found[wants[1]] is two
    assert holds(one, wants[0]) and not holds(one, wants[1]) and not holds(one.view(5, 1), wants[0])
    assert not holds(one, wants[0].replace(":", ":unheard:"))


# ---- manifests ---------------------------------------------------------------------------


def manifest(**entry: Any) -> Manifest:
    return Manifest(
        format=2, id="a" * 16, run="b" * 16, step=1, seq=1, lineage=((1, 1),), files={"x": FileEntry(1, **entry)}
    )  # fmt: skip


def test_a_manifest_says_which_hash_it_has() -> None:
    for entry in ({"xxh3": "0" * 32}, {"blake3": "0" * 64}):
        data = codec.encode(manifest(**entry))
        assert json.loads(data)["files"]["x"] == {"size": 1, **entry}
        assert codec.decode(data, "m") == manifest(**entry)
        assert codec.outline(data, "m").files["x"].hash == ""
    for wrong in ({}, {"xxh3": "0" * 32, "blake3": "0" * 64}):
        with pytest.raises(CorruptCheckpoint, match="two hashes" if wrong else "no hash"):
            codec.decode(codec.encode(manifest(**wrong)), "m")


# ---- old runs ----------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "loop-format-1", tmp_path / "run")
    return tmp_path / "run"


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def weights_of(path: Path) -> dict[str, str]:
    return {name: told.digest for name, told in digests.digests(path / "model.safetensors")[1].items()}


@pytest.mark.parametrize("background", [False, True])
def test_I26_a_run_goes_on_in_the_new_format_and_keeps_its_old_checkpoints(old: Path, background: bool) -> None:
    before = {path: path.read_bytes() for path in (old / "checkpoint-4").iterdir()}
    recipe = loops.simple(loops.Net(width=2))
    with lastgood.CheckpointManager(old, save_steps=1, background=background, **recipe.parts) as ckpt:
        assert ckpt.restore() == 4
        ckpt.step(5)  # nothing was trained: the same tensors, by the other hash
        ckpt.settle()
    run = lastgood.open(old)
    assert [record.manifest.format for record in run.checkpoints if record.manifest] == [1, 1, 2]
    assert [entry.kind for entry in run.at(5).files.values()] == ["xxh3"] * len(run.at(5).files)
    assert all(run.problems(record) == () for record in run.checkpoints)
    assert read(old / ".lastgood" / "run.json")["format"] == 2, "older releases leave it alone"
    assert {path: path.read_bytes() for path in before} == before
    assert weights_of(old / "checkpoint-4") == weights_of(old / "checkpoint-5")
    assert all("xxh3:" in told for told in read(old / "checkpoint-5" / "tensors.json")["tensors"].values())

    code, out, _ = cli.call("diff", f"{old}/checkpoint-4", f"{old}/checkpoint-5", "--values", "--json")
    told = json.loads(out)
    assert code == 0 and told["tensors"] == {} and told["values"]["changed"] == 0 and told["values"]["same"] > 0

    for step in (4, 5):
        with lastgood.CheckpointManager(old, **loops.simple(loops.Net(width=2)).parts) as ckpt:
            assert ckpt.restore(step) == step
    checkpoint = run.at(4)
    assert torch.equal(checkpoint.load()["head.weight"], run.at(5).load()["head.weight"])
    assert torch.equal(checkpoint.tensor("head.weight"), run.at(5).tensor("head.weight"))

    assert cli.call("-C", old, "strip", "4", "--yes")[0] == 0
    stripped = read(old / "checkpoint-4" / "lastgood.json")
    assert stripped["format"] == 1 and all("blake3" in entry for entry in stripped["files"].values())
    assert lastgood.open(old).problems(lastgood.open(old).at(4)) == ()
    assert cli.call("-C", old, "prune", "--keep-last", "1", "--yes")[0] == 0
    assert [record.step for record in lastgood.open(old).checkpoints] == [4, 5], "the best and the last"


@pytest.mark.parametrize("name", ["loop-format-1", "loop-format-2", "run-format-1", "run-format-2"])
def test_I5_one_flipped_bit_is_found_by_either_hash(name: str, tmp_path: Path) -> None:
    for place in sorted((DATA / name / "checkpoint-4").iterdir()):
        root = tmp_path / place.name
        shutil.copytree(DATA / name, root)
        path = root / "checkpoint-4" / place.name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        found = lastgood.open(root)
        (record,) = [record for record in found.checkpoints if record.name == "checkpoint-4"]
        assert found.problems(record), place.name


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_I9_a_damaged_one_of_either_format_is_not_restored(version: int, file: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(DATA / f"loop-format-{version}", root)
    path = root / "checkpoint-4" / file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for check in ("full", "quick"):
        recipe = loops.simple(loops.Net(width=2))
        before = {name: tensor.clone() for name, tensor in recipe.parts["model"].state_dict().items()}
        with (
            pytest.raises(LastgoodError),
            lastgood.CheckpointManager(root, verify=check, **recipe.parts) as ckpt,
        ):
            ckpt.restore(4)
        assert all(torch.equal(tensor, before[name]) for name, tensor in recipe.parts["model"].state_dict().items())


def test_a_copy_of_an_old_checkpoint_is_checked(old: Path, tmp_path: Path) -> None:
    code, _, err = cli.call("-C", old, "checkout", "4", tmp_path / "copy")
    assert code in (0, 1), err
    entry = lastgood.open(old).at(4).files["model.safetensors"]
    assert local.clone(old / "checkpoint-4" / "model.safetensors", tmp_path / "model", entry.kind) == entry


def test_one_tensor_of_an_old_checkpoint_is_proven_by_its_file(old: Path) -> None:
    """Where no digest of it is known: the file's own hash, whichever that is."""
    path, entry = old / "checkpoint-4" / "model.safetensors", lastgood.open(old).at(4).files["model.safetensors"]
    assert entry.kind == "blake3"
    proven, read = (chosen(path, given, {"head.weight": ()})["head.weight"] for given in (entry, None))
    assert torch.equal(proven, read)


def test_frozen_tensors_of_an_old_checkpoint_are_left_alone() -> None:
    """Whether a frozen base is the one of the save is asked by the hash of the save."""
    model = torch.nn.Linear(3, 2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    expected = {name: digest(tensor, kind="blake3") for name, tensor in model.named_parameters()}
    assert prepare(model, expected, dict).counts == {"unchanged": 2, "copied": 0, "converted": 0}


@pytest.mark.parametrize("version", [1, 2])
def test_a_listing_and_a_resume_agree_on_an_adopted_one_that_was_copied(version: int, tmp_path: Path) -> None:
    """Copies have new times: whether a Trainer saved again is for the hash to say, which an outline leaves out."""
    home = tmp_path / "checkpoint-2"
    home.mkdir()
    (home / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": []}))
    (home / "config.json").write_text("{}")
    (home / "model.safetensors").write_bytes(b"".join(safetensors.encode(named({"a": torch.ones(3)}))[1]))
    assert cli.call("-C", tmp_path, "adopt", "--yes")[0] == 0
    path = home / codec.NAME
    if version == 1:  # as an older release adopted it
        now = codec.decode(path.read_bytes(), "m")
        files = {name: local.digest(home / name, "blake3") for name in now.files}
        path.write_bytes(codec.encode(msgspec.structs.replace(now, format=1, files=files)))
    state_of = home / "trainer_state.json"
    for content, state in ((state_of.read_text(), "weights"), (state_of.read_text().replace("2", "3"), "stock")):
        state_of.write_text(content)
        os.utime(path, (1, 1))
        states = [[record.state for record in records(tmp_path, outline=outline)] for outline in (False, True)]
        assert states == [[state]] * 2

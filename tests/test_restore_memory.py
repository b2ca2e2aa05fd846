"""A restore reads each byte where it belongs: what it needs in memory, what it proves, and what damage it finds."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lastgood
from lastgood.errors import (
    CorruptCheckpoint,
    IncompleteRestore,
    LastgoodError,
    NoCheckpoint,
    NotSupported,
    UsageError,
)
from lastgood.format import digests as hashing
from lastgood.format import tensors as safetensors
from lastgood.state import optimizer as optimizers
from lastgood.state import stored as storing
from lastgood.state.fingerprint import Fingerprints, live_tensors
from lastgood.state.stored import Stored, fill
from lastgood.state.tensors import digest, from_bytes, in_place, named, same_bits
from lastgood.store import contents, fs, local

import forked

COMMON = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


class Net(nn.Module):
    """Weights of several sizes, one that isn't trained, buffers of both kinds."""

    def __init__(self, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.layers[0].bias.requires_grad_(False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            rows = layer(rows).tanh()
        return rows


def trained(net: nn.Module) -> torch.optim.AdamW:
    """An optimizer of these weights behind a step of random gradients."""
    adam = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    adam.step()
    adam.zero_grad()
    return adam


def saved(root: Path, steps: int = 1, **size: int) -> tuple[dict[str, str], dict[str, str]]:
    """A run with a checkpoint at each step; digests of the weights and of the optimizer's state at the last one."""
    torch.manual_seed(3)
    net = Net(**size)
    adam = trained(net)
    with lastgood.CheckpointManager(root, model=net, optimizer=adam) as ckpt:
        for step in range(ckpt.restore(), steps):
            adam.step()
            ckpt.step(step + 1)
            ckpt.save()
    return held(net, adam)


def held(net: nn.Module, adam: torch.optim.Optimizer) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of everything that training changes."""
    state = adam.state_dict()["state"]
    moments = {f"{number}.{key}": digest(value) for number, entry in state.items() for key, value in entry.items()}
    return {name: digest(tensor) for name, tensor in live_tensors(net).items()}, moments


# ---- memory ----------------------------------------------------------------------------------


def resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def restored(root: Path, **size: int) -> None:
    net = Net(**size)
    ckpt = lastgood.CheckpointManager(root, model=net, optimizer=torch.optim.AdamW(net.parameters()))
    Path("/proc/self/clear_refs").write_text("5")  # the highest point is from now on
    assert ckpt.restore() == 1


def grow(small: Path, large: Path, result: Path, width: int) -> None:
    restored(small)  # the libraries come into memory
    before = resident("VmRSS")
    restored(large, width=width, layers=3)
    result.write_text(str(resident("VmHWM") - before))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux says how large a process was")
def test_a_restore_needs_memory_for_one_state_and_little_more(tmp_path: Path) -> None:
    small, run, log = tmp_path / "small", tmp_path / "run", tmp_path / "log"
    saved(small)
    assert forked.run(saved, run, width=1800, layers=3, log=log) == 0, log.read_text()
    state = sum(file.stat().st_size for file in (run / "checkpoint-1").glob("*.safetensors"))
    assert state > 110e6
    assert forked.run(grow, small, run, tmp_path / "grown", 1800, log=log) == 0, log.read_text()
    assert int((tmp_path / "grown").read_text()) < 1.3 * state, "the weights or the optimizer's state are there twice"


def test_a_child_process_does_not_share_what_was_read(tmp_path: Path) -> None:
    """A loader's worker that is forked must not see, and not change, what its parent trains on."""
    (tmp_path / "file").write_bytes(b"a" * 10000)
    view, _ = contents.content(tmp_path / "file")

    def change() -> None:
        view[:5] = b"child"

    assert forked.run(change, log=tmp_path / "log") == 0
    assert bytes(view) == b"a" * 10000


# ---- the same, however it is read ------------------------------------------------------------


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how much is read at a time."""

    def to(block: int, ahead: int, together: int) -> None:
        monkeypatch.setattr(local, "BLOCK", block)
        monkeypatch.setattr(contents, "AHEAD", ahead)
        monkeypatch.setattr(storing, "TOGETHER", together)

    return to


SIZE = st.sampled_from([1, 7, 64, 1000, 1 << 20])
STATE = st.lists(
    st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64]),
        st.lists(st.integers(0, 9), max_size=3),
        st.integers(0, 1),
    ),
    max_size=8,
)


@COMMON
@given(STATE, SIZE, SIZE, SIZE)
def test_I9_any_split_into_files_and_ranges_gives_the_same_tensors(
    tmp_path: Path, cut: Any, state: list[Any], block: int, ahead: int, together: int
) -> None:
    cut(block, ahead, together)
    found: list[tuple[torch.Tensor, Stored, torch.Tensor]] = []
    for number in range(2):
        path = tmp_path / f"{number}.safetensors"
        path.unlink(missing_ok=True)
        here = [(f"t{n}", dtype, shape) for n, (dtype, shape, where) in enumerate(state) if where == number]
        tensors = {name: (torch.randn(shape) * 100).to(dtype) for name, dtype, shape in here}
        entry = local.write(path, safetensors.encode(named(tensors))[1])
        assert local.digest(path) == entry
        whole, told = hashing.digests(path)
        assert whole == entry
        assert {name: place.digest for name, place in told.items()} == {n: digest(t) for n, t in tensors.items()}
        buffer, is_now = contents.content(path)
        assert is_now == entry and bytes(buffer) == path.read_bytes()
        assert all(same_bits(from_bytes(t), tensors[name]) for name, t in safetensors.decode(path, buffer).items())
        assert {name: place.slot for name, place in told.items()} == safetensors.read_header(path).slots
        for name, place in told.items():
            item = Stored(path, name, place.slot, place.digest)
            assert same_bits(item.tensor(), tensors[name])
            found.append((torch.empty_like(tensors[name]), item, tensors[name]))
    assert fill([(live, item) for live, item, _ in found]) == [item.digest for _, item, _ in found]
    assert all(same_bits(live, tensor) for live, _, tensor in found)


@pytest.mark.parametrize("frozen", [False, True])
def test_I12_a_save_behind_a_restore_knows_that_the_weights_changed(tmp_path: Path, frozen: bool) -> None:
    """What reads into memory is no operation of torch, and a digest is taken anew only after one."""
    weight = nn.Parameter(torch.randn(4, 4), requires_grad=not frozen)
    path, other = tmp_path / "a.safetensors", torch.randn(4, 4)
    local.write(path, safetensors.encode(named({"w": other}))[1])
    prints, before = Fingerprints(), weight._version
    assert prints.of({"w": weight})["w"] == digest(weight)
    fill([(weight, Stored(path, "w", safetensors.read_header(path).slots["w"], ""))])
    assert weight._version > before and prints.of({"w": weight})["w"] == digest(other)


@given(st.integers(0, 3000), st.integers(0, 5), st.booleans())
def test_the_numbers_of_many_parameters_are_the_same_ones(count: int, start: int, gap: bool) -> None:
    numbers = [*range(start, start + count)] + ([start + count + 1] if gap else [])
    assert list(optimizers._numbers(numbers)) == numbers


def test_the_state_of_many_parameters_comes_back_in_a_time_that_grows_with_their_number(tmp_path: Path) -> None:
    """torch looks each number up among those of its group; in a list that takes as long as the list is long."""
    net = nn.ParameterList(nn.Parameter(torch.full((1,), float(n))) for n in range(optimizers.MANY + 5))
    adam = trained(net)
    with lastgood.CheckpointManager(tmp_path, model=net, optimizer=adam) as ckpt:
        ckpt.restore()
        ckpt.step(1)
        ckpt.save()
    fresh = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(optimizers.MANY + 5))
    looked_up: list[type] = []

    class Asked(torch.optim.AdamW):
        def load_state_dict(self, state_dict: Any) -> None:
            looked_up.extend(type(group["params"]) for group in state_dict["param_groups"])
            super().load_state_dict(state_dict)

    Asked.__module__, Asked.__qualname__ = torch.optim.AdamW.__module__, "AdamW"
    again = Asked(fresh.parameters(), lr=1e-3)
    with lastgood.CheckpointManager(tmp_path, model=fresh, optimizer=again) as ckpt:
        assert ckpt.restore() == 1
    assert looked_up == [range] and held(fresh, again) == held(net, adam)
    assert again.state_dict()["param_groups"] == adam.state_dict()["param_groups"]


# ---- damage ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 1 and 2."""
    root = tmp_path_factory.mktemp("restore") / "run"
    saved(root, steps=2)
    return root


@settings(COMMON, max_examples=60)
@given(st.data())
def test_I7_I8_a_flipped_bit_anywhere_is_found_before_a_live_tensor_changes(
    run: Path, tmp_path: Path, data: Any
) -> None:
    root = tmp_path / "copy"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(run, root)
    files = sorted(path for path in (root / "checkpoint-2").iterdir() if path.is_file())
    file = data.draw(st.sampled_from(files), label="file")
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1), label="byte")] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    file.write_bytes(content)
    torch.manual_seed(9)
    net = Net()
    adam = torch.optim.AdamW(net.parameters(), lr=1e-3)
    before = held(net, adam)
    with pytest.raises(LastgoodError) as caught:
        lastgood.CheckpointManager(root, model=net, optimizer=adam).restore(2)
    assert isinstance(caught.value, (NoCheckpoint, CorruptCheckpoint)) and "checkpoint-2" in str(caught.value)
    assert held(net, adam) == before
    with lastgood.CheckpointManager(root, model=net, optimizer=adam) as ckpt:
        assert ckpt.restore() == 1


class Forgetful(fs.FileSystem):
    """A disk that gives another bit back for what it is asked for at a place, once it has been asked so often."""

    def __init__(self, after: int) -> None:
        self.after = after

    def read_at(self, handle: int, buffer: memoryview, at: int) -> int:
        count = super().read_at(handle, buffer, at)
        self.after -= 1
        if self.after < 0 and count:
            buffer[0] ^= 1
        return count


def test_I8_bytes_that_changed_since_they_were_verified_are_told(run: Path, tmp_path: Path) -> None:
    """The files are verified, then the weights are read again into their places: what arrived is hashed, too."""
    shutil.copytree(run, tmp_path / "run")
    net = Net()
    ckpt = lastgood.CheckpointManager(tmp_path / "run", model=net, optimizer=torch.optim.AdamW(net.parameters()))
    with fs.using(Forgetful(after=1)), pytest.raises(IncompleteRestore, match="don't hold what was saved"):
        ckpt.restore()  # the first reading at a place is that of the optimizer's file, which is read once


def test_I8_an_optimizer_gets_just_the_bytes_that_were_verified(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    net = Net()
    adam = torch.optim.AdamW(net.parameters())
    before = held(net, adam)
    ckpt = lastgood.CheckpointManager(tmp_path / "run", model=net, optimizer=adam)
    with fs.using(Forgetful(after=0)), pytest.raises(NoCheckpoint, match=r"optimizer\.safetensors"):
        ckpt.restore()
    assert held(net, adam) == before


def test_I8_without_full_verification_the_state_is_hashed_where_it_is_read(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-2" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    net = Net()
    adam = torch.optim.AdamW(net.parameters())
    before = held(net, adam)
    with pytest.raises(CorruptCheckpoint, match=r"optimizer\.safetensors is not what was saved"):
        lastgood.CheckpointManager(tmp_path / "run", model=net, optimizer=adam, verify="quick").restore()
    assert held(net, adam) == before


def test_I12_two_restores_of_one_checkpoint_do_not_share_memory(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    states = []
    for _ in range(2):
        net = Net()
        adam = torch.optim.AdamW(net.parameters(), lr=1e-3)
        with lastgood.CheckpointManager(tmp_path / "run", model=net, optimizer=adam) as ckpt:
            assert ckpt.restore() == 2
        states.append(held(net, adam))
        for entry in adam.state.values():
            entry["exp_avg"].zero_()
    assert states[0] == states[1]


# ---- the meta device -------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_I12_a_model_without_memory_gets_it_with_its_values(tmp_path: Path, tied: bool) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            if tied:
                self.layers[1].weight = self.layers[0].weight

    net = Tied()
    adam = trained(net)
    with lastgood.CheckpointManager(tmp_path, model=net, optimizer=adam) as ckpt:
        ckpt.restore()
        ckpt.step(1)
        ckpt.save()
    with torch.device("meta"):
        empty = Tied()
    parameters = list(empty.parameters())
    again = torch.optim.AdamW(parameters, lr=1e-3)
    with lastgood.CheckpointManager(tmp_path, model=empty, optimizer=again) as ckpt:
        assert ckpt.restore() == 1
        assert held(empty, again) == held(net, adam)
        assert all(now is then for now, then in zip(empty.parameters(), parameters, strict=True))
        assert [p.requires_grad for p in empty.parameters()] == [p.requires_grad for p in net.parameters()]
        for one, other in ((net, adam), (empty, again)):
            one(torch.ones(2, 8)).sum().backward()
            other.step()
        assert held(empty, again) == held(net, adam)
        ckpt.step(2)
        assert ckpt.save() is not None


def test_a_buffer_that_is_stored_nowhere_is_named(tmp_path: Path) -> None:
    class Computed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("angles", torch.arange(4.0), persistent=False)

    with lastgood.CheckpointManager(tmp_path, model=Computed()) as ckpt:
        ckpt.restore()
        ckpt.step(1)
        ckpt.save()
    with torch.device("meta"):
        empty = Computed()
    with pytest.raises(IncompleteRestore, match=r"meta device aren't stored.*angles"):
        lastgood.CheckpointManager(tmp_path, model=empty).restore()
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.angles = torch.arange(4.0)  # type: ignore[assignment]
    with lastgood.CheckpointManager(tmp_path, model=empty) as ckpt:
        assert ckpt.restore() == 1
    assert not any(tensor.is_meta for tensor in empty.state_dict().values())


def test_a_fresh_start_cannot_come_from_the_meta_device(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(UsageError, match=r"layers\.0\.weight is on the meta device"):
        lastgood.CheckpointManager(tmp_path / "new", model=empty).restore()
    saved(tmp_path / "run")
    with pytest.raises(NotSupported, match="meta device"):
        lastgood.CheckpointManager(tmp_path / "run", model=empty, allow_missing=["optimizer"]).restore(new=["head.*"])


# ---- parts alone -----------------------------------------------------------------------------


class Counting(fs.FileSystem):
    """How many bytes are read from files."""

    workers = 1

    def __init__(self) -> None:
        self.bytes = 0

    def read_into(self, handle: int, buffer: memoryview) -> int:
        count = super().read_into(handle, buffer)
        self.bytes += count
        return count

    def read_at(self, handle: int, buffer: memoryview, at: int) -> int:
        count = super().read_at(handle, buffer, at)
        self.bytes += count
        return count


def test_one_tensor_is_read_alone_and_proven_by_its_own_digest(tmp_path: Path) -> None:
    saved(tmp_path, width=200, layers=4)
    checkpoint = lastgood.open(tmp_path)["latest"]
    told = safetensors.read_header(checkpoint.path / "model.safetensors").slots["layers.1.weight"]
    with fs.using(Counting()) as _:
        found = checkpoint.tensor("layers.1.weight")
        count = fs.system.bytes  # type: ignore[attr-defined]
    assert digest(found).startswith("F32[200, 200]:")
    assert told.end - told.begin <= count < 2 * (told.end - told.begin)
    with fs.using(Counting()) as _:
        layer = checkpoint.tensors("layers.1.*")
        count = fs.system.bytes  # type: ignore[attr-defined]
    assert same_bits(layer["layers.1.weight"], found) and all(name.startswith("layers.1.") for name in layer)
    assert count < 3 * (told.end - told.begin), "the other layers aren't read"
    moment = checkpoint.tensor("state.layers.1.weight.exp_avg", verify=False)
    assert same_bits(moment, checkpoint.tensor("state.layers.1.weight.exp_avg"))


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_I8_one_damaged_tensor_is_found_if_it_is_to_be_proven(tmp_path: Path, file: str) -> None:
    saved(tmp_path)
    checkpoint = lastgood.open(tmp_path)["latest"]
    path = checkpoint.path / f"{file}.safetensors"
    name = "layers.1.weight" if file == "model" else "state.layers.1.weight.exp_avg"
    slot = safetensors.read_header(path).slots[name]
    content = bytearray(path.read_bytes())
    content[slot.begin + 5] ^= 4
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=f"{file}.safetensors is not what was saved"):
        checkpoint.tensor(name)
    assert checkpoint.tensor(name, verify=False).shape == torch.Size(slot.shape)
    other = "layers.0.weight" if file == "model" else "state.layers.0.weight.exp_avg"
    if file == "model":
        assert checkpoint.tensor(other).shape == torch.Size([8, 8]), "its own digest proves it"
    else:
        with pytest.raises(CorruptCheckpoint):
            checkpoint.tensor(other)


@COMMON
@given(st.lists(st.tuples(st.sampled_from(["F64", "F32", "BF16", "U8"]), st.integers(0, 70)), max_size=12))
def test_what_is_a_multiple_of_the_alignment_long_is_used_where_it_was_read(
    tmp_path: Path, kinds: list[tuple[str, int]]
) -> None:
    """A copy of each would cost a third of a restore, and the memory of the largest once more."""
    entries = [
        safetensors.Tensor(f"{number}", dtype, (count,), memoryview(os.urandom(count * safetensors.SIZES[dtype])))
        for number, (dtype, count) in enumerate(kinds)
    ]
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"".join(bytes(chunk) for chunk in safetensors.encode(entries, {"a": "é"})[1]))
    buffer, _ = contents.content(path)
    base = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    found = in_place(safetensors.decode(path, buffer), buffer)
    assert [found[entry.name].flatten().view(torch.uint8).tolist() for entry in entries] == [
        list(entry.data) for entry in entries
    ]
    for entry in entries:
        if entry.data and len(entry.data) % 64 == 0:
            assert base <= found[entry.name].data_ptr() < base + len(buffer)


@given(st.lists(st.sampled_from([0, 1, 3, 64, 5000, 16_383, 16_384, 300_000]), min_size=1, max_size=40), st.randoms())
@settings(max_examples=25)
def test_I9_neighbours_are_read_together_and_each_gets_its_own(sizes: list[int], chance: Any) -> None:
    saved = {f"t{n}": torch.full((size,), n, dtype=torch.float32) for n, size in enumerate(sizes)}
    asked = [name for name in saved if chance.random() < 0.8]
    live = {name: torch.full_like(saved[name], -1) for name in asked}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        local.write(path, safetensors.encode(named(saved))[1])
        places = hashing.digests(path)[1]
        pairs = [(live[name], Stored(path, name, places[name].slot, places[name].digest)) for name in asked]
        assert fill(pairs) == [places[name].digest for name in asked]
    assert all(torch.equal(live[name], saved[name]) for name in asked)

"""Comparing, averaging, casting and merging the weights of checkpoints."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lastgood.errors import CorruptCheckpoint, Incompatible, NotSupported, UsageError
from lastgood.format import tensors as format_tensors
from lastgood.state.tensors import CODE_OF, digest, same_bits, to_bytes
from lastgood.weights.average import average, ema, equal
from lastgood.weights.cast import cast
from lastgood.weights.compare import compare, group_of, groups
from lastgood.weights.encode import Entry, encode_slots, rounded
from lastgood.weights.source import Weights

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NO_NAN = [*(d for d in CODE_OF if not (d.is_floating_point or d.is_complex)), *FLOATS, torch.complex64]

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def models(draw: st.DrawFn, dtypes: list[torch.dtype] | None = None, finite: bool = False) -> dict[str, torch.Tensor]:
    """A few tensors with random bits of any dtype and shape."""
    shapes = st.lists(st.integers(0, 5), max_size=3)
    names = draw(st.lists(st.text("ab.0é", min_size=1, max_size=6), unique=True, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    model = {}
    for name in names:
        dtype = draw(st.sampled_from(dtypes or list(CODE_OF)))
        raw = torch.randint(0, 256, (math.prod(shape := draw(shapes)) * dtype.itemsize,), generator=generator)
        raw = raw % 2 if dtype is torch.bool else raw
        tensor = raw.to(torch.uint8).view(dtype)
        if finite and (dtype.is_floating_point or dtype.is_complex):
            tensor = tensor.where(tensor.isfinite(), torch.ones((), dtype=dtype))
        model[name] = tensor.reshape(shape)
    return model


def stored(path: Path, model: dict[str, torch.Tensor]) -> Weights:
    path.unlink(missing_ok=True)
    save_file(model, path)
    return Weights.open([path])


def one(path: Path, *values: float, dtype: torch.dtype = torch.float32) -> Weights:
    return stored(path, {"x": torch.tensor(values, dtype=dtype)})


@quick
@given(model=models())
def test_a_file_is_read_as_it_was_written_and_equals_itself(tmp_path: Path, model: dict[str, torch.Tensor]) -> None:
    source = stored(tmp_path / "a", model)
    assert set(source.names()) == set(model)
    for name, tensor in model.items():
        assert same_bits(source.tensor(name), tensor)
        pieces = list(source.blocks(name, limit=8))
        assert all(piece.nbytes <= 8 for piece in pieces)
        assert same_bits(torch.cat([*pieces, torch.empty(0, dtype=tensor.dtype)]), tensor.reshape(-1))
    result = compare(source, source)
    assert result.same and [change.name for change in result.tensors] == source.names()
    assert all(change.elements == model[change.name].numel() and change.relative == 0 for change in result.tensors)
    assert all(group.relative == 0 and group.changed_elements == 0 for group in groups(result))


@quick
@given(model=models())
def test_a_streamed_file_has_the_layout_of_one_written_at_once(model: dict[str, torch.Tensor]) -> None:
    entries = [Entry(name, CODE_OF[tensor.dtype], tuple(tensor.shape)) for name, tensor in model.items()]
    size, chunks = encode_slots(entries, lambda name: model[name].reshape(-1).split(3), {"format": "pt"})
    streamed = b"".join(chunks)
    expected = format_tensors.encode([to_bytes(name, tensor) for name, tensor in model.items()], {"format": "pt"})
    assert size == len(streamed) == expected[0]
    assert streamed == b"".join(expected[1])


@quick
@given(model=models(NO_NAN, finite=True), copies=st.integers(1, 3))
def test_the_average_of_one_or_of_equals_is_bit_identical(
    tmp_path: Path, model: dict[str, torch.Tensor], copies: int
) -> None:
    source = stored(tmp_path / "a", model)
    (tmp_path / "out").unlink(missing_ok=True)
    assert average([source] * copies, ema(copies, 0.7), tmp_path / "out") == []
    result = load_file(tmp_path / "out")
    assert result.keys() == model.keys()
    assert all(same_bits(result[name], tensor) for name, tensor in model.items())


@quick
@given(model=models([torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64], finite=True))
def test_a_cast_to_a_wider_dtype_and_back_is_bit_identical(tmp_path: Path, model: dict[str, torch.Tensor]) -> None:
    for narrow, wide in (("bfloat16", "float32"), ("float16", "float64")):
        dtype = getattr(torch, narrow)
        kept = {n: t for n, t in model.items() if not t.dtype.is_floating_point or t.dtype is dtype}
        for name in ("wide", "back"):
            (tmp_path / name).unlink(missing_ok=True)
        floating = {name for name, tensor in kept.items() if tensor.dtype.is_floating_point}
        assert set(cast(stored(tmp_path / "a", kept), wide, tmp_path / "wide")) == floating
        middle = Weights.open([tmp_path / "wide"])
        assert all(middle.dtype(name) is getattr(torch, wide) for name in floating)
        cast(middle, narrow, tmp_path / "back")
        assert compare(Weights.open([tmp_path / "a"]), Weights.open([tmp_path / "back"])).same


@quick
@given(values=st.lists(st.floats(width=64, allow_nan=False), min_size=1), exponent=st.integers(-30, 30))
def test_float64_is_rounded_once(values: list[float], exponent: int) -> None:
    # Nearest means: no neighbour of the result is nearer. Values just off a tie are what rounding twice gets wrong.
    ties = [(1 + 2.0**-8) * 2.0**exponent * (1 + sign * 2.0**-40) for sign in (1, -1, 0)]
    exact = torch.tensor([*values, *ties, *(-tie for tie in ties)], dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        result = rounded(exact, dtype)
        finite = result.isfinite() & exact.isfinite()
        error = (result.double() - exact).abs()[finite]
        view = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        for step in (1, -1):
            near = (result.view(view) + step).view(dtype).double()
            worse = (near - exact).abs()[finite]
            assert bool((worse.isnan() | (worse >= error)).all())
    assert rounded(torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64), torch.bfloat16).item() == 1 + 2**-7


def test_what_changed_is_counted_and_measured(tmp_path: Path) -> None:
    shared = {
        "model.layers.0.attn.q.weight": torch.tensor([3.0, 4.0]),
        "model.layers.0.attn.k.weight": torch.tensor([0.0, 12.0]),
        "model.layers.0.mlp.weight": torch.tensor([0.0]),
        "model.norm.weight": torch.tensor([math.nan, math.inf, 2.0], dtype=torch.bfloat16),
        "z": torch.tensor([3 + 4j, 1j]),
        "big": torch.tensor([1 << 62, 5]),
        "flag": torch.tensor([True, False]),
        "eight": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
        "shape": torch.zeros(2, 3),
        "dtype": torch.zeros(2),
        "old": torch.zeros(2),
    }
    other = {name: tensor.clone() for name, tensor in shared.items() if name != "old"} | {"new": torch.zeros(7)}
    other["model.layers.0.attn.q.weight"][1] += 0.5
    other["model.layers.0.mlp.weight"][0] = 1.0
    other["model.norm.weight"][2] = 3.0
    other["z"][0] = 3 + 3j
    other["big"][0] += 1  # too little for float64: only the bits tell
    other["flag"][1] = True
    other["eight"][0] = 2.0
    other["shape"] = torch.zeros(3, 2)
    other["dtype"] = torch.zeros(2, dtype=torch.float16)
    result = compare(stored(tmp_path / "a", shared), stored(tmp_path / "b", other))
    found = {change.name: change for change in result.tensors}
    assert {name: change.state for name, change in found.items() if change.state != "changed"} == {
        "model.layers.0.attn.k.weight": "same",
        "shape": "reshaped",
        "dtype": "reshaped",
        "old": "removed",
        "new": "added",
    }
    assert all(change.changed_elements == 1 for name, change in found.items() if change.state == "changed")
    relative = {name: change.relative for name, change in found.items() if change.state == "changed"}
    assert relative == {
        "model.layers.0.attn.q.weight": pytest.approx(0.1),
        "model.layers.0.mlp.weight": math.inf,
        "model.norm.weight": 0.5,
        "z": pytest.approx(1 / math.sqrt(26)),
        "big": 0.0,
        "flag": 1.0,
        "eight": pytest.approx(1 / math.sqrt(5)),
    }
    parts = {group.name: group for group in groups(result)}
    assert parts["model.layers.0.attn"].relative == pytest.approx(0.5 / 13)
    assert parts["model.layers.0.attn"].counts == {"same": 1, "changed": 1}
    assert parts["model.norm"].relative == 0.5


def test_a_change_in_a_later_block_is_measured_against_the_whole_tensor(tmp_path: Path) -> None:
    old = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    new = old.clone()
    new[2_900_000:] += 0.25
    seen: list[tuple[int, int]] = []
    result = compare(
        stored(tmp_path / "a", {"x": old}), stored(tmp_path / "b", {"x": new}), lambda *at: seen.append(at)
    )
    (change,) = result.tensors
    expected = float((new.double() - old.double()).norm() / old.double().norm())
    assert change.changed_elements == 100_001 and change.relative == pytest.approx(expected, rel=1e-12)
    assert seen[-1] == (old.nbytes, old.nbytes)


def test_a_new_nan_is_infinitely_far(tmp_path: Path) -> None:
    (change,) = compare(one(tmp_path / "a", 1.0, math.nan), one(tmp_path / "b", math.nan, math.nan)).tensors
    assert (change.state, change.changed_elements, change.relative) == ("changed", 1, math.inf)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.31.self_attn.q_proj.weight", "model.layers.31.self_attn"),
        ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "base_model.model.model.layers.0.self_attn"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.layers.3.weight", "model.layers.3"),
        ("scales.0", "scales"),
        ("x", "x"),
    ],
)
def test_groups_are_parts_of_layers(name: str, group: str) -> None:
    assert group_of(name) == group


def test_the_weights_of_averages_sum_to_one() -> None:
    assert equal(4) == [0.25] * 4
    assert ema(3, 0.5) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert math.fsum(ema(50, 0.99)) == pytest.approx(1, abs=1e-12)
    for wrong in (0.0, 1.1, math.nan):
        with pytest.raises(UsageError):
            ema(3, wrong)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
def test_an_average_is_computed_in_float64_and_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    models = [{"x": torch.randn(1000, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)} for _ in "abc"]
    sources = [stored(tmp_path / str(index), model) for index, model in enumerate(models)]
    weights = ema(3, 0.8)
    average(sources, weights, tmp_path / "out")
    result = load_file(tmp_path / "out")["x"]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = sum(w * m["x"].to(wide) for w, m in zip(weights, models, strict=True))
    assert result.dtype is dtype
    expected = torch.view_as_complex(torch.view_as_real(exact).float()) if dtype.is_complex else rounded(exact, dtype)
    assert torch.equal(result, expected)


def test_integers_that_differ_come_from_the_last_checkpoint_and_are_named(tmp_path: Path) -> None:
    a = stored(tmp_path / "a", {"n": torch.tensor([1, 2]), "m": torch.tensor([True]), "x": torch.tensor([1.0])})
    b = stored(tmp_path / "b", {"n": torch.tensor([1, 9]), "m": torch.tensor([True]), "x": torch.tensor([2.0])})
    assert average([a, b], equal(2), tmp_path / "out") == ["n"]
    result = load_file(tmp_path / "out")
    assert result["n"].tolist() == [1, 9] and result["x"].tolist() == [1.5]


def test_what_has_no_average_is_refused_by_name_and_nothing_is_left(tmp_path: Path) -> None:
    good, out = one(tmp_path / "a", 1.0, 2.0), tmp_path / "out"
    for bad, kind in (
        (one(tmp_path / "nan", 1.0, math.nan), CorruptCheckpoint),
        (one(tmp_path / "shape", 1.0), Incompatible),
        (one(tmp_path / "dtype", 1.0, 2.0, dtype=torch.float16), Incompatible),
        (stored(tmp_path / "more", {"x": torch.zeros(2), "y": torch.zeros(2)}), Incompatible),
    ):
        with pytest.raises(kind, match=r"'x'| x| y"):
            average([good, bad], equal(2), out)
    with pytest.raises(CorruptCheckpoint, match="infinities"):
        average([one(tmp_path / "p", math.inf), one(tmp_path / "q", -math.inf)], equal(2), out)
    eights = [stored(tmp_path / str(n), {"x": torch.tensor([n]).to(torch.float8_e5m2)}) for n in (1, 2)]
    with pytest.raises(NotSupported, match="F8_E5M2"):
        average(eights, equal(2), out)
    for weights in ([1.0], [0.5, 0.6], [2.0, -1.0], [math.nan, 1.0]):
        with pytest.raises(UsageError):
            average([good, good], weights, out)
    assert not out.exists()
    out.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already"):
        average([good], [1.0], out)
    assert out.read_bytes() == b"mine"


def test_infinities_of_one_sign_stay(tmp_path: Path) -> None:
    average([one(tmp_path / "a", -math.inf, 0.0), one(tmp_path / "b", -math.inf, 1.0)], equal(2), tmp_path / "out")
    assert load_file(tmp_path / "out")["x"].tolist() == [-math.inf, 0.5]


def test_a_number_that_the_new_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tensor 'x' holds 70000, which float16"):
        cast(one(tmp_path / "a", 1.0, -70000.0, math.inf), "float16", tmp_path / "out")
    with pytest.raises(UsageError, match="dtype must be one of"):
        cast(one(tmp_path / "a", 1.0), "int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    cast(one(tmp_path / "b", math.inf, math.nan), "float16", tmp_path / "out")
    assert str(load_file(tmp_path / "out")["x"].tolist()) == "[inf, nan]"


def test_a_name_in_two_files_and_a_shortened_file_are_corrupt(tmp_path: Path) -> None:
    one(tmp_path / "a", 1.0)
    source = one(tmp_path / "b", 1.0, 2.0)
    with pytest.raises(CorruptCheckpoint, match="tensor 'x' is in"):
        Weights.open([tmp_path / "a", tmp_path / "b"])
    os.truncate(tmp_path / "b", os.path.getsize(tmp_path / "b") - 1)
    with pytest.raises(CorruptCheckpoint, match="ends inside tensor 'x'"):
        source.tensor("x")


MEASURE = """
import sys, torch
from pathlib import Path
from lastgood.weights.average import average, equal
from lastgood.weights.cast import cast
from lastgood.weights.compare import compare
from lastgood.weights.source import Weights
torch.zeros(1 << 16).double().dot(torch.zeros(1 << 16).double())
def most():  # not ru_maxrss, which counts what the process was before it became this one: a copy of the tests
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
before = most()
a, b = (Weights.open([Path(sys.argv[1]) / name]) for name in "ab")
(change,) = compare(a, b).tensors
assert change.changed_elements == 1, change
average([a, b], equal(2), Path(sys.argv[1]) / "c")
cast(a, "bfloat16", Path(sys.argv[1]) / "d")
print((most() - before) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux only")
def test_memory_stays_at_a_few_blocks_for_one_tensor_of_600_mb(tmp_path: Path) -> None:
    for name in "ab":
        # Zeros that take no space on the disk, and a last element.
        size, chunks = encode_slots([Entry("x", "F32", (150_000_000,))], lambda _: [])
        with open(tmp_path / name, "wb") as file:
            file.write(next(iter(chunks)))
            file.truncate(size)
            file.seek(size - 4)
            file.write(b"\0\0\x80\x3f" if name == "a" else b"\0\0\0\x3f")
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], stdout=subprocess.PIPE, check=True, env=os.environ
    )
    assert int(child.stdout) < 100
    for name in "abcd":
        (tmp_path / name).unlink()


def test_buffers_that_a_model_computes_may_come_and_go_between_versions() -> None:
    """transformers 4 gives GPT-2 causal masks as buffers, transformers 5 doesn't: the same model all the same."""
    from lastgood.errors import Incompatible
    from lastgood.state import weights

    def built(mask: str, *, kept: bool = False) -> torch.nn.Module:
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2)
        if mask:
            model.register_buffer(mask, torch.ones(2), persistent=kept)
        return model

    old = built("mask")
    expected = {name: weights.digest(t) for name, t in [*old.named_parameters(), *old.named_buffers()]}
    assert weights.computed(old) == {"mask"}
    for new in (built(""), built("other")):
        assert weights.restore(new, expected, dict, unstored=["mask"])["unchanged"] == 2
    with pytest.raises(Incompatible, match="mask"):
        weights.restore(built(""), expected, dict)
    with pytest.raises(Incompatible, match="other"):
        weights.restore(built("other", kept=True), expected, dict, unstored=["mask"])


def test_a_forked_process_hashes_large_tensors_although_its_parent_has_done_so(tmp_path: Path) -> None:
    """A training that a notebook starts by fork used to wait for ever for threads that weren't forked with it."""
    import forked

    large = torch.arange(1 << 21)
    expected = digest(large)

    def child() -> None:
        assert digest(large) == expected

    assert forked.run(child, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()

"""The memory of tensors that is looked up once: what is written is what the tensors hold, whatever becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lastgood import CheckpointManager
from lastgood.errors import NotSupported, UsageError
from lastgood.format import tensors as safetensors
from lastgood.state import views as module
from lastgood.state.tensors import Named, named, to_bytes
from lastgood.state.views import Views
from test_layout import CHANGES, Tensors, add, expected, held, some

PLAIN = ("row", "matrix", "scalar", "empty", "halves", "flags", "count", "trained", "large", "last")
"""Those whose memory is what is written."""


def plain() -> Tensors:
    every = some()
    return {name: every[name] for name in PLAIN}


@given(st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 1)), max_size=6), st.booleans())
@settings(deadline=None, max_examples=150)
def test_I9_a_file_is_what_the_tensors_are(changes: list[tuple[Callable[[Tensors], None], int]], odd: bool) -> None:
    files, views = [plain(), some() if odd else plain()], Views()
    for change, which in ((add, 0), *changes):
        change(files[which])
        for _ in range(2):
            for name, tensors in zip("ab", files, strict=True):
                told = views.ordered(name, named(dict(tensors)))
                assert held(told) == held(safetensors.ordered(named(tensors)))
                assert sorted(held(told)) == sorted(expected(tensors))
            add(files[0])
            add(files[1])


def test_it_is_looked_up_once() -> None:
    views, tensors = Views(), plain()
    first = views.ordered("a", named(tensors))
    add(tensors)
    assert views.ordered("a", named(dict(tensors))) is first
    assert views.ordered("b", named(tensors)) is not first
    tensors["row"] = tensors["row"].clone()
    assert views.ordered("a", named(tensors)) is not first


def test_who_knows_that_a_file_is_the_same_is_believed_of_that_very_file_alone() -> None:
    views, first, later = Views(), object(), object()
    one, two, three = ({name: torch.randn(3) for name in "ab"} for _ in range(3))

    def told(tensors: Tensors, since: object) -> Any:
        return held(views.ordered("file", Named(tensors, since)))

    for tensors in (one, one, one, two, two, one, one, one):
        assert told(tensors, first) == expected(tensors)
    one |= three
    assert told(one, later) == expected(three)
    assert told(two, None) == expected(two)


@pytest.mark.parametrize("kept", [True, False])
def test_of_much_memory_nothing_is_kept(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 400 - (not kept))
    views, tensors = Views(), {"one": torch.ones(100)}
    assert held(views.ordered("a", named(tensors))) == expected(tensors)
    assert bool(views._last) == kept
    assert held(views.ordered("a", named(tensors))) == expected(tensors)


def test_what_cannot_be_stored_is_told() -> None:
    views = Views()
    views.ordered("a", named({"fine": torch.ones(2)}))
    with pytest.raises(NotSupported, match="odd"):
        views.ordered("a", named({"fine": torch.ones(2), "odd": torch.eye(2).to_sparse()}))
    with pytest.raises(UsageError, match="odd"):
        views.ordered("a", [to_bytes("odd", torch.ones(2))._replace(dtype="F31")])


def test_I9_saves_that_are_waited_for_hold_each_step(tmp_path: Path) -> None:
    """With tensors that are replaced, moved and given up between them."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    wanted = []
    with CheckpointManager(tmp_path, model=model, optimizer=optimizer, save_steps=1) as ckpt:
        ckpt.restore()
        for number in range(1, 7):
            model(torch.randn(5, 3)).square().sum().backward()
            optimizer.step()
            if number == 3:
                optimizer.load_state_dict(optimizer.state_dict())
            if number == 4:
                model[0].weight.data = model[0].weight.data.clone()
            if number == 5:
                model.double().float()
            ckpt.step(number)
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            moments = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
            wanted.append((state, moments))
    for number, (state, moments) in enumerate(wanted, 1):
        found = safetensors.load(tmp_path / f"checkpoint-{number}" / "model.safetensors")
        assert sorted(held(found.values())) == sorted(expected(state))
        found = safetensors.load(tmp_path / f"checkpoint-{number}" / "optimizer.safetensors")
        assert sorted(bytes(one.data) for one in found.values()) == sorted(
            bytes(to_bytes("", one).data) for one in moments
        )

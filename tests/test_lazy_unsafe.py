"""What changes a state while it is being copied, outside of any step: it is captured as it was, or found out."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import lastgood
import lazily
from lastgood.background import Background
from lastgood.format import tensors as safetensors
from lastgood.repo import journal
from lastgood.repo.read import records
from lastgood.state.lazy import Lazy, Pace
from lazily import Gate, Net

from training import Case

Act = Callable[[Net, Any], object]


def assigned(model: Net, optimizer: Any) -> None:
    model.first.weight.data = torch.zeros(lazily.WIDTH, lazily.WIDTH)


def written(model: Net, optimizer: Any) -> None:
    model.first.weight.detach().numpy()[:] = 7


def one_number(model: Net, optimizer: Any) -> None:
    """A view that was made long ago, and a place that no sample would look at."""
    model.second.weight.detach().numpy()[5, 3] += 1


def in_place(model: Net, optimizer: Any) -> None:
    with torch.no_grad():
        model.first.weight.mul_(0.5)


def clipped(model: Net, optimizer: Any) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.01, 0.01)


def averaged(model: Net, optimizer: Any) -> None:
    """As an average of weights that is put in their place for a moment."""
    with torch.no_grad():
        torch._foreach_lerp_(lazily.trained(model), [torch.zeros_like(p) for p in lazily.trained(model)], 0.1)


def renormed(model: Net, optimizer: Any) -> None:
    """What an embedding with max_norm does to itself in forward."""
    torch.embedding_renorm_(model.second.weight.detach(), torch.arange(4), 0.1, 2.0)


def loaded(model: Net, optimizer: Any) -> None:
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()})


def put_in(model: Net, optimizer: Any) -> None:
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def doubled(model: Net, optimizer: Any) -> None:
    model.double()


def replaced(model: Net, optimizer: Any) -> None:
    """As a vocabulary that is resized."""
    model.second = nn.Linear(lazily.WIDTH, lazily.WIDTH)


def shared(model: Net, optimizer: Any) -> None:
    """Its memory goes elsewhere, for other processes to see."""
    model.share_memory()


def shared_and_changed(model: Net, optimizer: Any) -> None:
    model.share_memory()
    in_place(model, optimizer)


def moments(model: Net, optimizer: Any) -> None:
    optimizer.state[model.first.weight]["exp_avg"].zero_()


def one_moment(model: Net, optimizer: Any) -> None:
    """By torch, where no sample lies."""
    optimizer.state[model.first.weight]["exp_avg"][5, 3] += 1


def moments_unseen(model: Net, optimizer: Any) -> None:
    optimizer.state[model.first.weight]["exp_avg"].numpy()[:] *= 0.5


def moments_loaded(model: Net, optimizer: Any) -> None:
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["exp_avg"] = torch.zeros_like(entry["exp_avg"])
    optimizer.load_state_dict(state)


def forward(model: Net, optimizer: Any) -> None:
    """Statistics of a batch norm."""
    lazily.loss(model).backward()


def buffer(model: Net, optimizer: Any) -> None:
    model.norm.running_mean.data.fill_(3)  # type: ignore[union-attr]


def rate(model: Net, optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = 5.0
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


def nothing(model: Net, optimizer: Any) -> None: ...


SAFE: list[Act] = [nothing, assigned, put_in, doubled, replaced, moments_loaded, forward, buffer, rate]
UNSAFE: list[Act] = [
    written, one_number, in_place, clipped, averaged, renormed, loaded, shared, shared_and_changed, moments,
    one_moment, moments_unseen,
]  # fmt: skip


def content(root: Path, step: int) -> dict[str, bytes]:
    """Every tensor of a checkpoint."""
    found = sorted((root / f"checkpoint-{step}").glob("*.safetensors"))
    return {
        f"{path.name}/{name}": bytes(entry.data) for path in found for name, entry in safetensors.load(path).items()
    }


def run(root: Path, act: Act, free: int | None, earlier: int = 0) -> list[str]:
    """Some steps; `act` behind the save of the last but one, when so many pieces are copied; None: copied before that.

    earlier: saves before it, which nothing disturbs. What the journal says of the saves.
    """
    torch.manual_seed(1)
    model, gate, gates = Net(), Gate(free or 0), list[Gate]()
    optimizer = torch.optim.AdamW(lazily.trained(model), lr=1e-2)
    wait = None if free is None else lambda left: [gate(left) for gate in gates]
    with lazily.manager(root, wait, model=model, optimizer=optimizer, trail=False) as ckpt:
        ckpt.restore()
        for number in range(1, earlier + 1):
            lazily.step(model, optimizer)
            ckpt.step(number)
            ckpt.settle()
        lazily.step(model, optimizer)
        gates.append(gate)
        ckpt.step(earlier + 1)
        assert free is None or gate.held.wait(120)
        act(model, optimizer)
        gate.go.set()
        if act not in (rate, replaced, put_in):  # those change what a loop would have to hand over anew
            ckpt.step(earlier + 2)
    return [f"{e['event']} {e['step']}" for e in journal.read(root) if e["event"] in ("saved", "failed")]


TOTAL = 42
"""Pieces of a save, at least: so many are copied half-way."""


@pytest.mark.parametrize(("free", "earlier"), [(0, 0), (1, 0), (TOTAL // 2, 0), (0, 1), (0, 2), (TOTAL // 2, 2)])
@pytest.mark.parametrize("act", [*SAFE, *UNSAFE], ids=lambda act: act.__name__)
def test_captured_or_found_out(
    act: Act, free: int, earlier: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After so many saves, from which something is remembered, and so many pieces."""
    expected = run(tmp_path / "a", act, None, earlier)
    told = run(tmp_path / "b", act, free, earlier)
    last = earlier + 1
    if act in SAFE:
        assert told == expected
        assert content(tmp_path / "b", last) == content(tmp_path / "a", last)
    elif told == expected:
        assert free, "what was copied already may have been all that changed"
        assert content(tmp_path / "b", last) == content(tmp_path / "a", last)
    else:
        assert told[earlier:] == [f"failed {last}", f"saved {last + 1}"], "the next step is saved at once"
        assert caplog.text.count(f"step {last} was not saved") == 1
        assert last not in [record.step for record in records(tmp_path / "b")]
    if last + 1 in [record.step for record in records(tmp_path / "b")]:
        assert content(tmp_path / "b", last + 1) == content(tmp_path / "a", last + 1)


def test_from_then_on_training_waits_for_the_copies(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(lazily.trained(model))
    gates: list[Gate] = []
    with lazily.manager(
        tmp_path, lambda left: [gate(left) for gate in gates], model=model, optimizer=optimizer, save_steps=2
    ) as ckpt:
        ckpt.restore()
        for number in range(8):
            lazily.step(model, optimizer)
            if number == 3:
                ckpt.settle()
                gates.append(Gate())
            ckpt.step(number + 1)
            if number == 3:
                assert gates[0].held.wait(120)
                written(model, optimizer)
                gates[0].go.set()
                ckpt.settle()
            if number >= 4:
                assert lazily.window(ckpt) is None
    assert [record.step for record in records(tmp_path)] == [2, 5, 6, 8], "5 in the place of 4"


def test_a_last_save_that_was_spoilt_is_made_again(tmp_path: Path) -> None:
    """Nothing else would be saved: no trigger is set."""
    model = Net()
    optimizer, gate = torch.optim.AdamW(lazily.trained(model)), Gate()
    with lazily.manager(tmp_path, gate, model=model, optimizer=optimizer, save_steps=None) as ckpt:
        ckpt.restore()
        lazily.step(model, optimizer)
        ckpt.step(1)
        ckpt.save()
        assert gate.held.wait(120)
        model.first.weight.data.mul_(2)
        gate.go.set()
    assert [record.step for record in records(tmp_path)] == [1]
    held = safetensors.load(tmp_path / "checkpoint-1" / "model.safetensors")
    assert bytes(held["first.weight"].data) == model.first.weight.detach().numpy().tobytes()


class Clips(TrainerCallback):
    """Weights are clipped behind torch's back at the beginning of a step, when nothing is copied yet."""

    def __init__(self, at: int, gate: Gate) -> None:
        self.at, self.gate = at, gate
        self.busy: Callable[[], bool] = lambda: False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            assert self.gate.held.wait(120)
            for parameter in kwargs["model"].parameters():
                parameter.data.clamp_(-1e-3, 1e-3)
            self.gate.go.set()
            while self.busy():
                time.sleep(0.01)


def test_in_a_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    clips = Clips(4, gate)
    trainer: Any = lastgood.manage(Case("clipped").trainer(tmp_path, clips), background=Background())
    clips.busy = lambda: trainer.lastgood.live.busy
    trainer.lastgood.pace = Pace(
        small=1, piece=500, wait=lambda left: gate(left) if trainer.state.global_step == 4 else 0
    )
    trainer.train()
    assert [record.step for record in records(tmp_path)] == [2, 5, 6, 8]
    assert caplog.text.count("step 4 was not saved") == 1


def test_a_piece_that_is_interrupted_is_left_to_whoever_comes_next() -> None:
    """A Ctrl-C in the middle of the hook: the step doesn't happen, and the copy is made all the same."""
    from lastgood.state.tensors import named
    from lastgood.store.memory import Arena

    class Interrupts:
        """A buffer of which a part can't be read the first time."""

        def __init__(self, inner: Any) -> None:
            self.inner, self.once = inner, True

        def __getitem__(self, which: slice) -> Any:
            if self.once and which.start:
                self.once = False
                raise KeyboardInterrupt
            return self.inner[which]

    tensor = torch.randn(1000)
    window = Lazy({(tensor.data_ptr(), 4000)}, set(), Pace(small=1, piece=1024))
    source = window.stage(named({"w": tensor}), Arena())
    window._guarded[0].source = Interrupts(window._guarded[0].source)  # type: ignore[assignment]
    window.begin()
    with pytest.raises(KeyboardInterrupt):
        window.finish()
    assert window.open
    window.fill()
    window.prove()
    (entry,) = source.tensors()
    assert bytes(entry.data) == tensor.numpy().tobytes()

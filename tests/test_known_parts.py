"""A model that was saved before writes what it would if it were saved for the first time, whatever happened since."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import test_known
from lastgood import CheckpointManager, Keep
from lastgood.integrations.torch.exchange import Writing
from lastgood.integrations.torch.module import Model
from lastgood.integrations.torch.writing import _told
from lastgood.repo.read import records
from lastgood.repo.staging import open_staging
from lastgood.state import quick
from lastgood.state.weights import Coverage, Fingerprints
from test_adapters import LORA

from training import tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def written(part: Model) -> dict[str, bytes]:
    """Every file of it, with that of the digests."""
    with TemporaryDirectory() as directory:
        staging = open_staging(Path(directory))
        out = Writing(staging, live=part.live)
        part.write(out)
        staging.data("digests", "model", lambda: quick.dumps(_told(out.digests)))
        staging.flush()
        at = Path(staging.path)
        return {str(path.relative_to(at)): path.read_bytes() for path in sorted(at.rglob("*")) if path.is_file()}


def as_if_new(part: Model) -> Model:
    """It knows what the model was at the start, and what was tried once, and nothing else."""
    made, known = Model(part.name, part.module), part._coverage
    made._coverage = Coverage(known.initial, Fingerprints(), proven=set(known.proven), stored=set(known.stored))
    return made


def same(part: Model) -> None:
    fresh = as_if_new(part)
    mine, theirs = written(part), written(fresh)
    assert list(mine) == list(theirs)
    assert mine == theirs


# ---- what may happen ---------------------------------------------------------------------


def step(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
        for buffer in model.buffers():
            buffer.add_(1)


def frozen_written_to(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.mul_(2.0)


def thawed(model: Any) -> None:
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.requires_grad_(True)
            return


def froze(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            return


def leaf(model: Any) -> Any:
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return found[0] if found else next(iter(model.children()))


def untied(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().clone())


def elsewhere(model: Any) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def another_buffer(model: Any) -> None:
    leaf(model).register_buffer("seen", torch.ones(2), persistent=hasattr(leaf(model), "seen"))


def extra_state(model: Any) -> None:
    module = leaf(model)
    count = getattr(module, "asked", 0) + 1
    module.asked = count
    module.get_extra_state = lambda: {"count": count}
    kind = type(module)
    if kind.__name__ != "Extra":
        module.__class__ = type("Extra", (kind,), {"get_extra_state": lambda self: {"asked": self.asked}})


def own_save(model: Any) -> None:
    module = leaf(model)
    original = type(module)._save_to_state_dict

    def doubled(destination: Any, prefix: str, keep: bool) -> None:
        original(module, destination, prefix, keep)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].detach() * 2

    module._save_to_state_dict = doubled


def hooked(model: Any) -> None:
    def more(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[f"{prefix}more"] = next(module.parameters()).detach().sum().reshape(1)

    leaf(model).register_state_dict_post_hook(more)


def tied_to_a_frozen_one(model: Any) -> None:
    """By its memory alone: training writes to both, and torch counts one."""
    found = [module for module in model.modules() if isinstance(module, nn.Linear) and module.in_features == 3]
    if len(found) > 1:
        found[0].weight = nn.Parameter(found[0].weight.detach().clone(), requires_grad=False)
        found[1].weight = nn.Parameter(torch.zeros(3, 3))
        found[1].weight.data = found[0].weight.data


def another_kind(model: Any) -> None:
    class Doubling(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            destination[f"{prefix}weight"] = self.weight.detach() * 2

    leaf(model).__class__ = Doubling


def named_base(model: Any) -> None:
    """PEFT puts it into the configuration when that has none."""
    model.base_model.model.__dict__["name_or_path"] = "somewhere"


def own_save_pretrained(model: Any) -> None:
    original = type(model).save_pretrained

    def save_pretrained(directory: str, **kwargs: Any) -> None:
        original(model, directory, **kwargs)
        total = sum(float(parameter.detach().sum()) for parameter in model.parameters())
        (Path(directory) / "mine.txt").write_text(str(total))

    model.save_pretrained = save_pretrained


def another_class(model: Any) -> None:
    """Of the adapter's own kind, and with a file of its own."""
    kind = type(model)

    def save_pretrained(self: Any, directory: str, **kwargs: Any) -> None:
        kind.save_pretrained(self, directory, **kwargs)
        total = sum(float(parameter.detach().sum()) for parameter in self.parameters())
        (Path(directory) / "mine.txt").write_text(str(total))

    if kind.__name__ != "Own":
        model.__class__ = type("Own", (kind,), {"save_pretrained": save_pretrained})


CHANGES: dict[str, Callable[[Any], None]] = {
    made.__name__: made
    for made in (
        step, frozen_written_to, thawed, froze, untied, elsewhere, another_buffer, extra_state, own_save, hooked,
        tied_to_a_frozen_one, another_kind,
    )
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "plain": Net,
    "transformers": tiny_gpt2,
    "adapter": lambda: peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(**LORA)),
}
OF_ADAPTERS = {name: change for name, change in test_known.CHANGES.items() if name not in CHANGES} | {
    made.__name__: made for made in (named_base, own_save_pretrained, another_class)
}


OF_MODULES = ("extra_state", "own_save", "another_kind")
"""What transformers and PEFT don't take: a state dict that isn't the tensors of a model."""


@pytest.mark.parametrize("name", ["plain", "adapter"])
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_I9_what_is_written_is_what_is_there(name: str, data: st.DataObject) -> None:
    known = {**CHANGES, **(OF_ADAPTERS if name == "adapter" else {})}
    known = {key: change for key, change in known.items() if name == "plain" or key not in OF_MODULES}
    part = Model("model", MODELS[name]())
    same(part)
    for change in data.draw(st.lists(st.sampled_from(sorted(known)), max_size=5)):
        known[change](part.module)
        same(part)
        step(part.module)
        same(part)


@pytest.mark.parametrize(
    ("name", "change"), [(name, key) for name in MODELS for key in CHANGES if name == "plain" or key not in OF_MODULES]
)
def test_I9_after_each_change_alone(name: str, change: str) -> None:
    alone(Model("model" if name != "plain" else "other", MODELS[name]()), CHANGES[change])


@pytest.mark.parametrize("change", OF_ADAPTERS)
def test_I9_of_an_adapter(change: str) -> None:
    alone(Model("model", MODELS["adapter"]()), OF_ADAPTERS[change])


def alone(part: Model, change: Callable[[Any], None]) -> None:
    for _ in range(2):
        same(part)
        step(part.module)
    for _ in range(3):
        change(part.module)
        for _ in range(2):
            same(part)
            step(part.module)


class Tokenizer:
    """Writes a file, as one does."""

    def save_pretrained(self, directory: str) -> None:
        (Path(directory) / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("order", [("tokenizer", "model", "ema"), ("ema", "model", "tokenizer")])
def test_files_of_several_parts_stay_apart(order: tuple[str, ...], background: bool, tmp_path: Path) -> None:
    made = {"tokenizer": Tokenizer(), "model": MODELS["adapter"](), "ema": MODELS["adapter"]()}
    with CheckpointManager(
        tmp_path, **{name: made[name] for name in order}, background=background, keep=Keep(last=9), on_error="raise"
    ) as manager:
        manager.restore()
        for number in range(1, 5):
            step(made["model"])
            manager.step(number)
            manager.save()
            manager.settle()
    found = [sorted(record.manifest.files) for record in records(tmp_path) if record.manifest is not None]
    assert len(found) == 4
    assert found[0] == found[1] == found[2] == found[3]
    assert {"tokenizer.json", "README.md", "ema/README.md", "adapter_config.json"} <= set(found[0])


def test_a_configuration_that_cannot_be_copied_is_looked_at_anew() -> None:
    part = Model("model", MODELS["adapter"]())
    part.module.peft_config["default"].lock = threading.Lock()
    for _ in range(3):
        same(part)
        step(part.module)

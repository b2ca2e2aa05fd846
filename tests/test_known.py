"""What a save remembers of a model: it writes what one that remembers nothing would, whatever happens in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lastgood import CheckpointManager
from lastgood.state.weights import Coverage, aliases, computed, taken_over
from test_adapters import KINDS, LORA

from training import tiny_gpt2

pytestmark = pytest.mark.filterwarnings("ignore")  # each kind of adapter has warnings of its own; here the files count

Found = tuple[dict[str, dict[str, torch.Tensor]], dict[str, bytes]]
"""The tensors of each safetensors file, and the bytes of the others."""


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def saved(model: Any, files: Any, directory: str) -> Found:
    at = Path(directory)
    tensors = {f.name: {name: tensor.detach().clone() for name, tensor in f.tensors.items()} for f in files}
    return tensors, {str(p.relative_to(at)): p.read_bytes() for p in sorted(at.rglob("*")) if p.is_file()}


def remembering(model: Any, coverage: Coverage) -> tuple[Found, dict[str, str], set[str]]:
    """As a save of the run does it."""
    coverage.look(model, coverage.members(model))
    with TemporaryDirectory() as directory:
        with coverage.collecting(model, directory) as files:
            model.save_pretrained(directory)
        return saved(model, files, directory), coverage.aliases(model, files), coverage.computed(model)


def anew(model: Any) -> tuple[Found, dict[str, str], set[str]]:
    with TemporaryDirectory() as directory:
        with taken_over(directory) as files:
            model.save_pretrained(directory)
        names = [name for file in files for name in file.tensors]
        return saved(model, files, directory), aliases(model, names), computed(model)


def same(model: Any, coverage: Coverage) -> None:
    mine, theirs = remembering(model, coverage), anew(model)
    for one, other in zip(mine[0][0].values(), theirs[0][0].values(), strict=True):
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert list(mine[0][0]) == list(theirs[0][0])
    assert mine[0][1] == theirs[0][1]
    assert mine[1:] == theirs[1:]


# ---- what may happen between two saves ---------------------------------------------------


def step(model: Any) -> None:
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(1.0)


def layer(model: Any, number: int = 0) -> Any:
    return [module for module in model.modules() if hasattr(module, "lora_A")][number]


def another_adapter(model: Any) -> None:
    name = f"adapter{len(model.peft_config)}"
    model.add_adapter(name, peft.LoraConfig(**LORA, init_lora_weights=False))
    model.set_adapter(name)


def one_less(model: Any) -> None:
    if len(model.peft_config) > 1:
        model.set_adapter("default")
        model.delete_adapter(next(name for name in model.peft_config if name != "default"))


def other_rules(model: Any) -> None:
    model.peft_config["default"].bias = "all" if model.peft_config["default"].bias == "none" else "none"


def other_number(model: Any) -> None:
    model.peft_config["default"].lora_alpha += 1


def elsewhere(model: Any) -> None:
    weight = layer(model).lora_A["default"].weight
    weight.data = weight.data.clone()


def tied_by_data(model: Any) -> None:
    layer(model, 1).lora_A["default"].weight.data = layer(model, 0).lora_A["default"].weight.data


def narrower(model: Any) -> None:
    weight = layer(model).lora_A["default"].weight
    weight.data = weight.data[: max(1, len(weight) - 1)]


def compiled(model: Any) -> None:
    """Only in the names of a state dict: nothing is run."""
    block = model.base_model.model.transformer
    if not hasattr(block.h[0], "_orig_mod"):
        block.h[0] = torch.compile(block.h[0])


def replaced_parameter(model: Any) -> None:
    module = layer(model).lora_B["default"]
    module.weight = torch.nn.Parameter(module.weight.detach() + 1)


def larger_vocabulary(model: Any) -> None:
    model.get_base_model().resize_token_embeddings(model.get_base_model().config.vocab_size + 3)


def new_buffer(model: Any) -> None:
    layer(model).register_buffer("seen", torch.ones(2), persistent=hasattr(layer(model), "seen"))


def other_persistence(model: Any) -> None:
    """The very same buffer, by turns part of the state dict and not."""
    module = layer(model)
    now = module._buffers.pop("counted", torch.ones(2))
    module.register_buffer("counted", now, persistent="counted" in module._non_persistent_buffers_set)


def another_name(model: Any) -> None:
    """Of a layer with the very same tensors."""
    blocks = model.base_model.model.transformer.h
    blocks._modules = {f"{name}1" if name.startswith("1") else name: one for name, one in blocks._modules.items()}


def untied(model: Any) -> None:
    base = model.get_base_model()
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())


def hooked(model: Any) -> None:
    def doubled(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
        name = f"{prefix}weight"
        state[name] = state[name] * 2

    layer(model).lora_A["default"].register_state_dict_post_hook(doubled)


class Doubling(torch.nn.Linear):
    """Its state isn't its weight."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight.detach() * 2


def another_kind_of_module(model: Any) -> None:
    """Around the very same parameter."""
    rows = layer(model).lora_A
    made = Doubling(1, 1, bias=False)
    made.weight = rows["default"].weight
    rows["default"] = made


def hooked_before(model: Any) -> None:
    def moved(module: Any, prefix: str, keep: bool) -> None:
        module.weight.data = module.weight.data + 1

    layer(model).lora_B["default"].register_state_dict_pre_hook(moved)


def own_state_dict(model: Any) -> None:
    """As scripts did when PEFT's save_pretrained couldn't choose."""
    original = type(model).state_dict

    def state_dict(*args: Any, **kwargs: Any) -> Any:
        return {name: t for name, t in original(model, *args, **kwargs).items() if "h.1." not in name}

    model.state_dict = state_dict


CHANGES: dict[str, Callable[[Any], None]] = {
    made.__name__: made
    for made in (
        step, another_adapter, one_less, other_rules, other_number, elsewhere, tied_by_data, narrower, compiled,
        replaced_parameter, larger_vocabulary, new_buffer, other_persistence, untied, hooked,
        another_kind_of_module, own_state_dict,
        another_name,
    )
}  # fmt: skip


@given(st.lists(st.sampled_from(sorted(CHANGES)), max_size=5))
@settings(max_examples=25, deadline=None)
def test_I9_a_save_that_remembers_writes_what_one_that_does_not_would(changes: list[str]) -> None:
    model = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(**LORA))
    coverage = Coverage.begin(model)
    same(model, coverage)
    for change in changes:
        CHANGES[change](model)
        same(model, coverage)
        step(model)
        same(model, coverage)


@pytest.mark.parametrize("change", CHANGES)
def test_I9_after_each_change_alone(change: str) -> None:
    model = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(**LORA))
    coverage = Coverage.begin(model)
    for _ in range(2):
        same(model, coverage)
    for _ in range(2):
        CHANGES[change](model)
        same(model, coverage)


def test_I9_a_hook_that_runs_before_a_state_dict_is_run() -> None:
    model = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(**LORA))
    coverage = Coverage.begin(model)
    same(model, coverage)
    hooked_before(model)
    before = copy.deepcopy(layer(model).lora_B["default"].weight.detach())
    remembering(model, coverage)
    assert not torch.equal(layer(model).lora_B["default"].weight, before)


@pytest.mark.parametrize("kind", KINDS)
def test_I9_every_kind_of_adapter(kind: str) -> None:
    model = peft.get_peft_model(tiny_gpt2(), KINDS[kind]())
    coverage = Coverage.begin(model)
    for _ in range(3):
        same(model, coverage)
        step(model)


def test_I9_a_model_without_an_adapter_whose_tie_is_cut() -> None:
    model = tiny_gpt2()
    coverage = Coverage.begin(model)
    same(model, coverage)
    assert coverage.aliases(model, []) == {}
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    same(model, coverage)


def test_other_models_are_asked_for_themselves(tmp_path: Path) -> None:
    """Another thread, or a save inside a save, of a model that is none of this run's."""
    mine, other = (peft.get_peft_model(tiny_gpt2(seed), peft.LoraConfig(**LORA)) for seed in (1, 2))
    step(other)
    coverage = Coverage.begin(mine)
    remembering(mine, coverage)
    with coverage.collecting(mine, str(tmp_path / "mine")):
        ask = peft.peft_model.get_peft_model_state_dict
        found = ask(other, state_dict=None, adapter_name="default", save_embedding_layers="auto")
        given_one = ask(mine, state_dict=other.state_dict(), adapter_name="default", save_embedding_layers="auto")
    theirs = peft.get_peft_model_state_dict(other)
    for one in (found, given_one):
        assert all(torch.equal(one[name], theirs[name]) for name in theirs)


def test_an_adapter_is_asked_once_for_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(**LORA))
    asked, original = [0], type(model).state_dict

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked[0] += self is model
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "state_dict", counting)
    optimizer = torch.optim.AdamW(trained(model).values())
    with CheckpointManager(tmp_path, model=model, optimizer=optimizer, on_error="raise") as manager:
        manager.restore()
        for number in range(1, 6):
            model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
            optimizer.step()
            manager.step(number)
            manager.save()
            if number == 2:
                before = asked[0]
    assert asked[0] == before  # PEFT names the base model in the configuration at the first save

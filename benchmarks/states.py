"""What is trained and saved in the benchmarks: models with their optimizers, from tiny to 0.5 billion parameters."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NAMES = ("tiny", "gpt2-30m", "gpt2-125m", "llama-0.5b-bf16", "lora", "small-3000", "small-100000")


class Adam32(torch.optim.Optimizer):
    """AdamW whose state is fp32 whatever the weights are: what mixed-precision training keeps beside bf16 weights."""

    def __init__(self, parameters: Any, lr: float = 1e-4) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            low, high = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(parameter, dtype=torch.float32)
                state["step"] += 1
                count, grad = float(state["step"]), parameter.grad.float()
                state["exp_avg"].lerp_(grad, 1 - low)
                state["exp_avg_sq"].mul_(high).addcmul_(grad, grad, value=1 - high)
                root = (state["exp_avg_sq"] / (1 - high**count)).sqrt_().add_(group["eps"])
                change = state["exp_avg"] / root * (group["lr"] / (1 - low**count))
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change.to(parameter.dtype))


class Small(nn.Module):
    """Many small tensors."""

    def __init__(self, count: int, elements: int = 64) -> None:
        super().__init__()
        self.many = nn.ParameterList([nn.Parameter(torch.randn(elements)) for _ in range(count)])

    def forward(self) -> torch.Tensor:
        return torch.stack(list(self.many)).square().mean()


@dataclass
class State:
    """loss: of one step of real training on made-up data."""

    name: str
    model: Any
    optimizer: torch.optim.Optimizer
    loss: Callable[[], torch.Tensor]

    def train(self) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of the model: of one under an adapter the adapter alone. Shared tensors once."""
        trained = any(not parameter.requires_grad for parameter in self.model.parameters())
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad or not trained}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights, and the optimizer's tensors under names of their own."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        flat = self.weights()
        for parameter, state in self.optimizer.state.items():
            flat |= {f"{names[id(parameter)]}.{key}": value for key, value in state.items()}
        return flat

    @property
    def bytes(self) -> int:
        """Of all tensors that a checkpoint holds."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


def gpt2(width: int, layers: int, words: int = 50257) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=words, n_embd=width, n_layer=layers, n_head=max(1, width // 64), bos_token_id=0, eos_token_id=0
        )
    )


def llama() -> Any:
    """0.49 billion parameters, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=25, num_attention_heads=16,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def made(name: str, *, batch: int = 1, length: int = 64) -> State:
    """A state by its name, behind one step, so that the optimizer has all it will ever have.

    name: of NAMES, or small-COUNTxELEMENTS for so many tensors of so many numbers. batch, length: of the made-up tokens
    of a step, which is how a step is made longer. Raises ValueError for another name.
    """
    torch.manual_seed(0)
    if not re.fullmatch(r"small-\d+(x\d+)?", name) and name not in NAMES:
        raise ValueError(f"no state {name!r}: {', '.join(NAMES)}, or small-COUNTxELEMENTS")
    model: Any
    if name.startswith("small-"):
        count, _, elements = name.removeprefix("small-").partition("x")
        model = Small(int(count), int(elements or 64))
        state = State(name, model, torch.optim.AdamW(model.parameters(), lr=1e-4), model)
        state.train()
        return state
    words = 1000 if name == "tiny" else 32000
    if name == "tiny":
        model = gpt2(64, 2, words)
    elif name == "gpt2-30m":
        model = gpt2(384, 6)
    elif name == "llama-0.5b-bf16":
        model = llama()
    else:
        model = gpt2(768, 12)
    if name == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = Adam32(trained) if name == "llama-0.5b-bf16" else torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(0, words, (batch, length))
    state = State(name, model, optimizer, lambda: model(input_ids=tokens, labels=tokens).loss)
    state.train()
    return state

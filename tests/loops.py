"""Small training loops of all kinds, as people write them: what each trains, and one step of it."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lastgood
from lastgood.state.fingerprint import live_tensors
from lastgood.state.lazy import Pace
from lastgood.state.tensors import digest

from training import texts

WORDS, WIDTH = 256, 8


class Net(nn.Module):
    """Bytes -> the next byte, with dropout."""

    def __init__(self, width: int = WIDTH, tied: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.norm: nn.Module = nn.BatchNorm1d(width) if norm else nn.LayerNorm(width)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.scratch += 0.5
        return self.head(self.drop(self.norm(self.embed(rows[:, :-1]).flatten(0, 1))))


class Odd(Net):
    """Tensors of every kind that a module may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(6, 4).t())
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("wave", torch.view_as_complex(torch.randn(3, 2)))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("small", torch.randn(5).to(torch.float8_e4m3fn))
        self.register_buffer("halves", torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.bfloat16))
        self.register_buffer("long", torch.tensor([2**62, -1]))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.wave *= 1.01j
        self.long += 1
        self.mask = ~self.mask
        return super().forward(rows) * self.scalar + self.turned.sum() * 1e-3


class Remembers(Net):
    """State that torch hands over as get_extra_state: tensors and plain values."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[float] = []
        self.inner = Counting()

    def get_extra_state(self) -> dict[str, Any]:
        return {"history": list(self.history), "spread": torch.tensor(self.history[-3:])}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.history = list(state["history"])
        assert torch.equal(state["spread"], torch.tensor(self.history[-3:]))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.history.append(float(len(self.history)))
        return super().forward(rows) * (1 + 1e-3 * sum(self.history)) * self.inner()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.calls)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.calls = int(state)

    def forward(self) -> float:
        self.calls += 1
        return 1 + 1e-4 * self.calls


class Average:
    """An average of weights as many libraries have it: no module, with a state dict."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shadow = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}

    def update(self) -> None:
        for name, tensor in self.model.named_parameters():
            self.shadow[name].lerp_(tensor.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": 0.9, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = state["shadow"]


class Recipe:
    """parts: what CheckpointManager gets. step: trains one step on rows of bytes and returns the loss."""

    def __init__(self, **parts: Any) -> None:
        self.parts = parts
        self.rows = torch.tensor([list(row) for row in texts(64)])

    def begin(self, ckpt: lastgood.CheckpointManager) -> None:
        """The run is restored, the loop begins."""

    def batch(self) -> torch.Tensor:
        return self.rows[torch.randint(len(self.rows), (4,))]

    def loss(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
        out = model(rows)
        return nn.functional.cross_entropy(out.float(), rows[:, 1:].flatten())

    def step(self, number: int) -> torch.Tensor:
        model, optimizer = self.parts["model"], self.parts["optimizer"]
        loss = self.loss(model, self.batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler = self.parts.get("scheduler")
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(loss.item())
        elif scheduler is not None:
            scheduler.step()
        return loss.detach()


def simple(model: nn.Module, optimizer: Callable[..., Any] = torch.optim.AdamW, **more: Any) -> Recipe:
    return Recipe(model=model, optimizer=optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2), **more)


class Gan(Recipe):
    def step(self, number: int) -> torch.Tensor:
        total = torch.zeros(())
        for model, optimizer in (("generator", "optimizer_g"), ("critic", "optimizer_c")):
            loss = self.loss(self.parts[model], self.batch())
            self.parts[optimizer].zero_grad()
            loss.backward()
            self.parts[optimizer].step()
            total += loss.detach()
        return total


class Averaged(Recipe):
    def step(self, number: int) -> torch.Tensor:
        loss = super().step(number)
        self.parts["average"].update()
        self.parts["ema"].update_parameters(self.parts["model"])
        return loss


class Keeping(Recipe):
    """State of the user's own: counters, lists, arrays, generators of every library."""

    def batch(self) -> torch.Tensor:
        own = self.parts
        own["counters"]["seen"] += 4
        own["counters"]["nested"]["last"] = (own["counters"]["seen"], float("nan"))
        own["order"].append(own["python"].randrange(10))
        own["table"][own["numpy"].integers(3)] += own["legacy"].rand()
        own["bias"].data[0] += random.random() + float(np.random.rand())
        return self.rows[torch.randint(len(self.rows), (4,), generator=own["torch"])]


class Scaled(Recipe):
    def step(self, number: int) -> torch.Tensor:
        model, optimizer, scaler = (self.parts[name] for name in ("model", "optimizer", "scaler"))
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.loss(model, self.batch())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()


class Accumulating(Recipe):
    def step(self, number: int) -> torch.Tensor:
        optimizer = self.parts["optimizer"]
        optimizer.zero_grad()
        losses = []
        for _ in range(3):
            loss = self.loss(self.parts["model"], self.batch()) / 3
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        return torch.stack(losses).sum()


class Loading(Recipe):
    """Batches come from data loaders, in turns if there are several."""

    def begin(self, ckpt: lastgood.CheckpointManager) -> None:
        names = [name for name in self.parts if name.startswith("dataloader")]
        self.sources = [ckpt.batches(name) for name in names]

    def step(self, number: int) -> torch.Tensor:
        self.turn = number
        return super().step(number)

    def batch(self) -> torch.Tensor:
        return next(self.sources[self.turn % len(self.sources)])


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        for row in self.rows:
            yield row if torch.rand(()) < 0.5 else row.flip(0)


def loading(*kinds: str) -> Recipe:
    recipe = simple(Net())
    rows = recipe.rows[:18]
    makes: dict[str, Callable[[], Any]] = {
        "shuffled": lambda: torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True),
        "own": lambda: torch.utils.data.DataLoader(
            rows, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(7)
        ),
        "stream": lambda: torch.utils.data.DataLoader(Stream(rows), batch_size=4),
        "workers": lambda: torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, num_workers=1),
    }
    loaders = {f"dataloader{place or ''}": makes[kind]() for place, kind in enumerate(kinds)}
    return Loading(**recipe.parts, **loaders)


def gan() -> Recipe:
    one, two = Net(), Net(width=4)
    return Gan(
        generator=one,
        critic=two,
        optimizer_g=torch.optim.AdamW(one.parameters(), lr=1e-2),
        optimizer_c=torch.optim.SGD(two.parameters(), lr=1e-2, momentum=0.9),
    )


def averaged() -> Recipe:
    recipe = simple(Net(norm=True))
    model = recipe.parts["model"]
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    return Averaged(**recipe.parts, average=Average(model), ema=ema)


def keeping() -> Recipe:
    bias = torch.zeros(3)
    return Keeping(
        **simple(Net()).parts,
        counters={"seen": 0, "nested": {"last": None}},
        order=[],
        table=np.zeros(3),
        bias=bias,
        torch=torch.Generator().manual_seed(5),
        numpy=np.random.default_rng(5),
        legacy=np.random.RandomState(5),
        python=random.Random(5),
    )


def raw() -> Recipe:
    """A tensor that belongs to no module is trained beside one that does."""
    model, prompt = Net(), torch.zeros(4, requires_grad=True)

    class Prompted(Recipe):
        def loss(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
            return super().loss(model, rows) + ((prompt - 1) ** 2).sum()

    return Prompted(model=model, prompt=prompt, optimizer=torch.optim.Adam([*model.parameters(), prompt], lr=1e-2))


def scheduled(kind: str) -> Recipe:
    recipe = simple(Net())
    optimizer, schedules = recipe.parts["optimizer"], torch.optim.lr_scheduler
    made = {
        "cosine": lambda: schedules.CosineAnnealingLR(optimizer, 50),
        "one cycle": lambda: schedules.OneCycleLR(optimizer, 1e-2, total_steps=50),
        "plateau": lambda: schedules.ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
        "sequence": lambda: schedules.SequentialLR(
            optimizer, [schedules.LinearLR(optimizer, total_iters=3), schedules.StepLR(optimizer, 2)], [3]
        ),
        "lambda": lambda: schedules.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    }
    recipe.parts["scheduler"] = made[kind]()
    return recipe


def scaled() -> Recipe:
    return Scaled(**simple(Net()).parts, scaler=torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2))


def groups() -> Recipe:
    model = Net()
    slow = {"params": model.embed.parameters(), "lr": 1e-3, "name": "slow"}
    fast = {"params": [*model.norm.parameters(), *model.head.parameters()], "weight_decay": 0.1}
    return Recipe(model=model, optimizer=torch.optim.AdamW([slow, fast], lr=1e-2))


def frozen() -> Recipe:
    model = Net()
    model.embed.requires_grad_(False)
    return simple(model)


def gpt2() -> Recipe:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=8, n_layer=1, n_head=2)

    class Language(Recipe):
        def loss(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
            return model(input_ids=rows, labels=rows).loss

    recipe = simple(GPT2LMHeadModel(config))
    return Language(**recipe.parts)


def lora() -> Recipe:
    from peft import LoraConfig, get_peft_model

    recipe = gpt2()
    model = get_peft_model(
        recipe.parts["model"], LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1, task_type="CAUSAL_LM")
    )
    recipe.parts = simple(model).parts
    return recipe


def compiled() -> Recipe:
    model = Net()
    recipe = simple(model)
    recipe.parts["model"] = torch.compile(model, backend="eager")
    return recipe


RECIPES: dict[str, Callable[[], Recipe]] = {
    "plain": lambda: simple(Net()),
    "tied": lambda: simple(Net(tied=True)),
    "batch norm": lambda: simple(Net(norm=True)),
    "every kind of tensor": lambda: simple(Odd()),
    "extra state": lambda: simple(Remembers()),
    "bfloat16": lambda: simple(Net().to(torch.bfloat16)),
    "two models, two optimizers": gan,
    "averages of weights": averaged,
    "state of one's own": keeping,
    "a tensor of no module": raw,
    "a scaler": scaled,
    "accumulation": lambda: Accumulating(**simple(Net()).parts),
    "parameter groups": groups,
    "frozen layers": frozen,
    "momentum": lambda: simple(Net(), torch.optim.SGD),
    "adagrad": lambda: simple(Net(), torch.optim.Adagrad),
    "adafactor": lambda: simple(Net(), torch.optim.Adafactor),
    "nadam": lambda: simple(Net(), torch.optim.NAdam),
    "schedule: cosine": lambda: scheduled("cosine"),
    "schedule: one cycle": lambda: scheduled("one cycle"),
    "schedule: plateau": lambda: scheduled("plateau"),
    "schedule: sequence": lambda: scheduled("sequence"),
    "schedule: lambda": lambda: scheduled("lambda"),
    "a loader": lambda: loading("shuffled"),
    "a loader of a stream": lambda: loading("stream"),
    "a loader with a worker": lambda: loading("workers"),
    "three loaders": lambda: loading("shuffled", "own", "stream"),
    "transformers": gpt2,
    "lora": lora,
    "compiled": compiled,
}


def seeded(name: str) -> Recipe:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    return RECIPES[name]()


def train(
    name: str,
    root: Path,
    out: Path | None,
    *,
    total: int = 9,
    kill: int = -1,
    every: int = 2,
    pace: Pace | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The loop; SIGKILL in the middle of the step behind `kill`. The digest of everything goes to `out`."""
    recipe = seeded(name)
    losses = []
    with lastgood.CheckpointManager(root, save_steps=every, **options, **recipe.parts) as ckpt:
        ckpt._steps.pace = pace or ckpt._steps.pace
        start = ckpt.restore()
        recipe.begin(ckpt)
        for step in range(start, total):
            loss = recipe.step(step)
            if step == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            ckpt.step(step + 1, loss=loss)
            losses.append(float(loss))
            if step % 3 == 0:
                ckpt.record(step + 1, score=float(torch.rand(())))
    result = {"state": state(recipe), "last": losses[-1] if losses else None}
    if out is not None:
        out.write_text(repr(result))
    return result


def state(recipe: Recipe) -> str:
    """A hash of everything that training goes on with."""
    hasher = hashlib.blake2b()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            hasher.update(digest(value.detach()).encode())
        elif isinstance(value, dict):
            for key in value:
                hasher.update(repr(key).encode())
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)
        elif isinstance(value, np.ndarray):
            hasher.update(value.tobytes())
        else:
            hasher.update(repr(value).encode())

    for thing in recipe.parts.values():
        if isinstance(thing, torch.utils.data.DataLoader):
            continue
        if isinstance(thing, nn.Module):
            feed(dict(live_tensors(thing)))
            feed({key: value for key, value in thing.state_dict().items() if key.endswith("extra_state")})
        elif hasattr(thing, "state_dict"):
            feed(thing.state_dict())
        elif isinstance(thing, torch.Generator):
            feed(thing.get_state())
        elif isinstance(thing, np.random.Generator):
            feed(thing.bit_generator.state)
        elif hasattr(thing, "get_state"):
            feed(thing.get_state())
        elif hasattr(thing, "getstate"):
            feed(thing.getstate())
        else:
            feed(thing)
    feed([torch.get_rng_state(), random.getstate(), np.random.get_state()[1]])
    return hasher.hexdigest()

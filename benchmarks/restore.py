"""What a verified restore costs: seconds, and memory at its peak, beside reading the same bytes without a look at them.

One state (a GPT-2 with AdamW) is saved in every way there is; then each way back runs in a process of its own, in turn,
from a disk that has to be asked (cold) and from the system's cache (warm). Memory is what the process grew by at its
highest, the live model included, in states: 1.00 is the model and its optimizer, and nothing else.

    python benchmarks/restore.py [--size 125M] [--repeat 5] [--place DIRECTORY] [--only NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.progress import track

from benchmarks import figures

SIZES = {"1M": (64, 2), "30M": (384, 6), "125M": (768, 12), "350M": (1024, 24)}
"""Width and layers; the embedding makes up the rest."""
WAYS = ("read", "lastgood", "torch.load", "safetensors", "Trainer", "managed Trainer")
HOW = ("cold", "warm")
STEPS = 1


def model(size: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    set_seed(0)
    width, layers = SIZES[size]
    words = 50257 if size != "1M" else 1000
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=words, n_embd=width, n_layer=layers, n_head=width // 64, bos_token_id=0, eos_token_id=0)
    )


def optimizer(live: Any) -> Any:
    import torch

    return torch.optim.AdamW(live.parameters(), lr=1e-4)


def trainer(live: Any, out: Path) -> Any:
    import torch
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": torch.arange(4) + n, "labels": torch.arange(4) + n} for n in range(4)]
    args = TrainingArguments(
        output_dir=str(out), max_steps=STEPS + 1, save_steps=STEPS, per_device_train_batch_size=1, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", save_strategy="steps",
    )  # fmt: skip
    return Trainer(model=live, args=args, train_dataset=rows)


def write(size: str, place: Path) -> None:
    """The same state in every form."""
    import torch
    from safetensors.torch import save_file

    import lastgood

    live = model(size)
    adam = optimizer(live)
    for parameter in live.parameters():
        parameter.grad = torch.randn_like(parameter)
    adam.step()
    adam.zero_grad()
    with lastgood.CheckpointManager(place / "loop", model=live, optimizer=adam) as ckpt:
        ckpt.restore()
        ckpt.step(1)
        ckpt.save()
    state = {"model": live.state_dict(), "optimizer": adam.state_dict()}
    torch.save(state, place / "state.pt")
    flat = {f"optimizer.{n}.{k}": v for n, entry in state["optimizer"]["state"].items() for k, v in entry.items()}
    save_file({name: p.detach() for name, p in live.named_parameters()} | flat, place / "state.safetensors")
    del adam, state, flat
    for name in ("stock", "managed"):
        one = trainer(live, place / name)
        (lastgood.manage(one) if name == "managed" else one).train()
        shutil.rmtree(place / name / f"checkpoint-{STEPS + 1}")


# ---- the ways back ---------------------------------------------------------------------------


def read(live: Any, place: Path) -> Callable[[], None]:
    """The bytes of our files, into the live weights and new memory: what no restore can do without."""
    adam = optimizer(live)
    files = sorted((place / "loop" / "checkpoint-1").glob("*.safetensors"))

    def go() -> None:
        import torch

        for file in files:
            with open(file, "rb", buffering=0) as handle:
                if file.name.startswith("model"):
                    for parameter in live.parameters():
                        handle.readinto(parameter.detach().view(-1).view(torch.uint8).numpy())
                else:
                    for parameter in live.parameters():
                        new = [torch.empty_like(parameter) for _ in range(2)]
                        for tensor in new:
                            handle.readinto(tensor.view(-1).view(torch.uint8).numpy())
                        adam.state[parameter] = dict(zip(("exp_avg", "exp_avg_sq"), new, strict=True))

    return go


def ours(live: Any, place: Path) -> Callable[[], None]:
    import lastgood

    ckpt = lastgood.CheckpointManager(place / "loop", model=live, optimizer=optimizer(live))
    return lambda: None if ckpt.restore("last") == 1 else sys.exit("nothing was restored")


def torch_load(live: Any, place: Path) -> Callable[[], None]:
    import torch

    adam = optimizer(live)

    def go() -> None:
        state = torch.load(place / "state.pt", weights_only=True)
        live.load_state_dict(state["model"])
        adam.load_state_dict(state["optimizer"])

    return go


def tensors(live: Any, place: Path) -> Callable[[], None]:
    import torch
    from safetensors.torch import load_file

    adam = optimizer(live)

    def go() -> None:
        state = load_file(place / "state.safetensors")
        with torch.no_grad():
            for name, parameter in live.named_parameters():
                parameter.copy_(state[name])
        parts = {n: {k: state[f"optimizer.{n}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")} for n in _numbers(adam)}
        adam.load_state_dict({"state": parts, "param_groups": adam.state_dict()["param_groups"]})

    return go


def _numbers(adam: Any) -> list[int]:
    return [n for group in adam.state_dict()["param_groups"] for n in group["params"]]


def resume(managed: bool) -> Callable[[Any, Path], Callable[[], None]]:
    """Until training begins."""

    def prepared(live: Any, place: Path) -> Callable[[], None]:
        from transformers import TrainerCallback

        import lastgood

        class Begun(BaseException):
            pass

        class Stop(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                raise Begun

        out = place / ("managed" if managed else "stock")
        one = trainer(live, out)
        one.add_callback(Stop())
        if managed:
            one = lastgood.manage(one)

        def go() -> None:
            try:
                one.train(resume_from_checkpoint=str(out / f"checkpoint-{STEPS}"))
            except Begun:
                return
            sys.exit("training never began")

        return go

    return prepared


PREPARE: dict[str, Callable[[Any, Path], Callable[[], None]]] = {
    "read": read,
    "lastgood": ours,
    "torch.load": torch_load,
    "safetensors": tensors,
    "Trainer": resume(False),
    "managed Trainer": resume(True),
}


def measure(way: str, size: str, place: Path, cold: bool) -> dict[str, float]:
    """One way back, in this process."""
    before = _memory("VmRSS")
    go = PREPARE[way](model(size), place)
    os.sync()
    for file in (file for file in place.rglob("*") if file.is_file()):
        with open(file, "rb", buffering=0) as handle:
            if cold:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and handle.read(1 << 22):  # not every way leaves there what it has read
                pass
    Path("/proc/self/clear_refs").write_text("5")  # the highest point is from now on
    start = time.perf_counter()
    go()
    return {"seconds": time.perf_counter() - start, "memory": _memory("VmHWM") - before}


def _memory(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="125M")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS, help="these ways alone, beside `read`")
    figures.options(parser)
    args = parser.parse_args()
    figures.check(args)

    import safetensors.torch  # noqa: F401 (imported once, before the forks, as are the others)
    import torch
    import transformers
    from transformers import Trainer  # noqa: F401

    import lastgood  # noqa: F401

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    transformers.logging.set_verbosity_error()
    place = Path(tempfile.mkdtemp(dir=args.place))
    ways = [way for way in WAYS if way == "read" or way in args.only]
    found: dict[tuple[str, bool], list[dict[str, float]]] = {(way, cold): [] for way in ways for cold in (True, False)}
    try:
        figures.apart(place, lambda: write(args.size, place))
        state = sum(file.stat().st_size for file in (place / "loop" / "checkpoint-1").glob("*.safetensors"))
        for _ in track(range(args.repeat), "interleaved runs"):
            for (way, cold), runs in found.items():
                runs.append(figures.apart(place, functools.partial(measure, way, args.size, place, cold)))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    runs = {way: {"cold": found[way, True], "warm": found[way, False]} for way in ways}
    document = figures.write(args.json, "restore", size=args.size, bytes=state, runs=runs)
    figures.show(title(document), COLUMNS, rows(document), width=130)
    if args.plot:
        draw(document, args.plot)


COLUMNS = ("", "cold", "times read", "warm", "times read", "memory, states")


def title(document: dict[str, Any]) -> str:
    rounds = len(document["runs"]["read"]["cold"])
    return f"a restore of {figures.size(document['bytes'])}, {rounds} rounds: median (least-most)"


def rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each way; ratios are per round, to `read` in the same round."""
    table = []
    for way, runs in document["runs"].items():
        cells: list[str] = []
        for how in HOW:
            seconds = [run["seconds"] for run in runs[how]]
            least = [run["seconds"] for run in document["runs"]["read"][how]]
            ratios = [mine / other for mine, other in zip(seconds, least, strict=True)]
            cells += [figures.seconds(seconds), figures.spread(ratios)]
        memory = figures.middle(run["memory"] for how in HOW for run in runs[how])
        table.append((way, *cells, f"{memory / document['bytes']:.2f}"))
    return table


def draw(document: dict[str, Any], file: Path) -> None:
    runs = document["runs"]
    panels = [(f"{how}, s", {way: [r["seconds"] for r in runs[way][how]] for way in runs}, False) for how in HOW]
    figures.bars(file, title(document), panels)


if __name__ == "__main__":
    sys.exit(main())

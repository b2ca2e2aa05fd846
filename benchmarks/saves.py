"""What saves cost a Trainer that trains: how long it stands still for one, and how much longer it takes in all.

A real `transformers.Trainer` with a tokenizer, as in a fine-tune, with a save every so many steps and two checkpoints
kept: the stock one, one under `lastgood.manage`, and one that writes in the background. Each run is in a process of its
own, in turn. Measured is what `_save_checkpoint` takes, and `train()` to that without saves in the same round; in the
background the end of `train()` waits for the last save.

    python benchmarks/saves.py [--state lora] [--words 50000] [--every 3] [--saves 6] [--repeat 3]
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.progress import track

from benchmarks import figures

WAYS = ("nothing", "stock", "managed", "managed, background")
STATES = ("tiny", "gpt2-30m", "gpt2-125m", "lora")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def tokenizer(words: int) -> Any:
    """One of made-up words, built of each other as byte pairs are, so that its files are as large as real ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(0)
    found = list(LETTERS)
    known, merges = set(found), []
    while len(found) < words:
        pair = draw.choice(found), draw.choice(found)
        word = "".join(pair)
        if len(word) <= 12 and word not in known:
            known.add(word)
            found.append(word)
            merges.append(pair)
    inner = Tokenizer(models.BPE({word: number for number, word in enumerate(found)}, merges))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>")


def run(way: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One training in this process: seconds of each save, and of all of it."""
    import torch
    from transformers import Trainer, TrainingArguments

    import lastgood
    from benchmarks.states import made

    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    asked = TrainingArguments(
        output_dir=str(out), max_steps=args.every * args.saves + 1, save_steps=args.every, save_total_limit=2,
        save_strategy="no" if way == "nothing" else "steps", per_device_train_batch_size=1, logging_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(64) + n, "labels": torch.arange(64) + n} for n in range(asked.max_steps)]
    trainer: Any = Trainer(
        model=made(args.state).model, args=asked, train_dataset=rows, processing_class=tokenizer(args.words)
    )
    if way.startswith("managed"):
        trainer = lastgood.manage(trainer, background=way.endswith("background"))
    stalls: list[float] = []
    save = trainer._save_checkpoint

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        save(*arguments)
        stalls.append(time.perf_counter() - start)

    trainer._save_checkpoint = timed
    start = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - start
    written = [path for path in out.glob(f"checkpoint-{args.every * args.saves}/*") if path.is_file()]
    return {"stalls": stalls[: args.saves], "train": whole, "bytes": sum(path.stat().st_size for path in written)}


def isolated(way: str, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The same in a child of its own, in an empty directory."""
    out = place / "run"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    return figures.apart(place, functools.partial(run, way, args, out))  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", choices=STATES, default="lora")
    parser.add_argument("--words", type=int, default=50_000, help="of the tokenizer")
    parser.add_argument("--every", type=int, default=3, help="steps from a save to the next")
    parser.add_argument("--saves", type=int, default=6, help="in a run; the first is told apart")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the training")
    figures.options(parser)
    args = parser.parse_args()
    figures.check(args)
    if min(args.every, args.saves, args.repeat, args.threads) < 1 or args.words < len(LETTERS):
        parser.error(f"numbers are 1 or more, words {len(LETTERS)} or more")

    import peft  # noqa: F401 (imported once, before the forks, as are the others)
    import transformers
    from transformers import Trainer  # noqa: F401

    import lastgood  # noqa: F401

    transformers.logging.set_verbosity_error()
    place = Path(tempfile.mkdtemp(dir=args.place))
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    try:
        for _ in track(range(args.repeat), "rounds"):
            for way, found in runs.items():
                found.append(isolated(way, args, place))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    facts = {name: getattr(args, name) for name in ("state", "words", "every", "saves", "threads")}
    document = figures.write(args.json, "saves", **facts, runs=runs)
    figures.show(title(document), COLUMNS, rows(document), width=130)
    if args.plot:
        draw(document, args.plot)


COLUMNS = ("", "stall", "first", "worst", "stock to it", "slowdown", "on disk")


def title(document: dict[str, Any]) -> str:
    return (
        f"a Trainer of {document['state']} with a tokenizer of {document['words']:,} words: a save every"
        f" {document['every']} steps, {document['threads']} threads, {len(document['runs']['nothing'])} rounds"
    )


def rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each way. The ratios are of runs of the same round."""
    table = []
    for way, runs in document["runs"].items():
        if way == "nothing":
            continue
        later, stock = _later(runs), _later(document["runs"]["stock"])
        slower = [mine["train"] / base["train"] for mine, base in zip(runs, document["runs"]["nothing"], strict=True)]
        table.append(
            (
                way,
                figures.seconds(later),
                figures.seconds([figures.middle(one["stalls"][0] for one in runs)]),
                figures.seconds([max(max(one["stalls"]) for one in runs)]),
                ""
                if way == "stock"
                else figures.spread([theirs / mine for theirs, mine in zip(stock, later, strict=True)]),
                figures.spread(slower, 3),
                figures.size(figures.middle(one["bytes"] for one in runs)),
            )
        )
    return table


def _later(runs: list[dict[str, Any]]) -> list[float]:
    return [figures.middle(one["stalls"][1:] or one["stalls"]) for one in runs]


def draw(document: dict[str, Any], file: Path) -> None:
    runs = {way: some for way, some in document["runs"].items() if way != "nothing"}
    first = {way: [one["stalls"][0] for one in some] for way, some in runs.items()}
    stalls = {way: _later(some) for way, some in runs.items()}
    figures.bars(file, title(document), [("stall, s", stalls, True), ("first, s", first, True)])


if __name__ == "__main__":
    sys.exit(main())

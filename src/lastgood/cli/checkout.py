"""lastgood checkout: a checkpoint as a directory of its own, for use elsewhere."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import click

from lastgood import checkout as copying
from lastgood import units
from lastgood.cli import text
from lastgood.cli.place import REV, new_place, pick, place, run_option
from lastgood.cli.verify import _progress
from lastgood.errors import CorruptCheckpoint, NotSupported, UsageError
from lastgood.model import Record
from lastgood.repo import after
from lastgood.store import local
from lastgood.store.appear import appearing
from lastgood.view import View, look

DTYPES = ("float32", "bfloat16", "float16")


@click.command()
@click.argument("rev", type=REV)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@run_option
@click.option(
    "--format", "form", type=click.Choice(["hf", "trainer"]), default="hf",
    help="hf: for from_pretrained (default). trainer: a stock Trainer resumes from it.",
)  # fmt: skip
@click.option("--merge", is_flag=True, help="Merge a LoRA adapter into its base model, and check the result.")
@click.option("--base", type=click.Path(path_type=Path), help="The base model for --merge; else the adapter names it.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Convert the weights.")
def checkout(
    root: str | None, rev: str, directory: Path, form: str, merge: bool, base: Path | None, dtype: str | None
) -> None:
    """Write a plain, independent copy of a checkpoint: DIR appears when it is complete and every hash was right.

    --format trainer, --merge and --dtype need torch.
    """
    path, word = place(root, rev)
    view = look(path)
    record = pick(view, word or "latest")
    if base is not None and not merge:
        raise UsageError("--base names the model that --merge merges into", hint="add --merge")
    new_place(directory, path)
    if form == "trainer" and (merge or dtype):
        raise UsageError("a Trainer resumes from weights as they were saved", hint="leave out --merge and --dtype")
    if form == "trainer":
        _trainer(view, record, directory)
    elif merge:
        _merged(view, record, directory, base, dtype)
    else:
        _plain(view, record, directory, dtype)


def _plain(view: View, record: Record, directory: Path, dtype: str | None) -> None:
    names = copying.model_files(record)
    sizes = record.manifest.files if record.manifest is not None else {}
    total = sum(sizes[name].size for name in names)
    if dtype is not None:
        need_torch("--dtype")
    with _progress(total) as advance, appearing(directory) as staging:
        _sound(view, record, names)
        copying.copy(view.path(record), record, names, staging, progress=advance)
        if dtype is not None:
            _cast(staging, dtype)
    _done(record, directory, f"{len(names)} files, {units.size(total)}" + (f", as {dtype}" if dtype else ""))


def _sound(view: View, record: Record, names: list[str]) -> None:
    """What has no hashes is at least checked for structure before it is handed on."""
    if record.id:
        return
    faults = view.problems(record, full=True)
    if faults:
        raise CorruptCheckpoint(f"{record.name} is damaged: {'; '.join(faults[:3])}", hint="check out another one")


def _cast(staging: Path, dtype: str) -> None:
    from lastgood.weights.cast import cast
    from lastgood.weights.source import Weights

    files = sorted(staging.rglob("*.safetensors"))
    others = sorted(path.name for path in staging.rglob("*.bin"))
    if others or not files:
        raise NotSupported(
            f"only safetensors files can be converted, not {', '.join(others) or 'what is there'}",
            hint="check it out without --dtype",
        )
    for file in files:
        old = file.rename(file.with_suffix(".old"))
        cast(Weights.open([old]), dtype, file)
        local.unlink(old)
    config = staging / "config.json"
    if config.is_file():
        value: dict[str, Any] = json.loads(config.read_bytes())
        for key in ("dtype", "torch_dtype"):
            if key in value:
                value[key] = dtype
        value.setdefault("dtype", dtype)
        config.write_text(json.dumps(value, indent=2) + "\n")


def _merged(view: View, record: Record, directory: Path, base: Path | None, dtype: str | None) -> None:
    need_torch("--merge", "transformers", "peft")
    from lastgood.weights.merge import merge, quiet

    names = copying.model_files(record)
    if "adapter_config.json" not in names:
        raise UsageError(f"{record.name} holds no adapter to merge", hint="leave out --merge")
    _sound(view, record, names)
    for fault in view.problems(record, full=True):
        raise CorruptCheckpoint(f"{record.name} is damaged: {fault}", hint="check out another one")
    with quiet():
        report = merge(view.path(record), base, directory, dtype)
    count = len(report.merged)
    checked = f"{count} of {report.tensors} tensors changed, by exactly the adapter; the others are the base's"
    _done(record, directory, checked)


def _trainer(view: View, record: Record, directory: Path) -> None:
    need_torch("--format trainer")
    from lastgood.convert.content import PENDING
    from lastgood.convert.evaluated import catch_up
    from lastgood.convert.read import read
    from lastgood.convert.write import to_trainer

    if record.state != "full":
        raise UsageError(f"{record.name} holds {record.state} state: a Trainer can't resume from it")
    for fault in view.problems(record, full=True):
        raise CorruptCheckpoint(f"{record.name} is damaged: {fault}", hint="check out another one")
    if record.layout == "trainer":
        names = list(record.manifest.files) if record.manifest is not None else []
        with appearing(directory) as staging:
            copying.copy(view.path(record), record, names, staging)
        _done(record, directory, f"{len(names)} files as the Trainer wrote them")
        return
    content = read(view.path(record), record.layout, record.manifest)
    evaluation = after.read(view.root, record.id)
    if PENDING in content.rest and evaluation is not None:
        catch_up(content, evaluation)
    to_trainer(content, directory)
    if PENDING in content.rest:
        click.echo(
            f"note: an evaluation was still due at step {record.step}; a stock Trainer doesn't make up for it, and what"
            " the evaluation would have drawn from the random generators isn't drawn",
            err=True,
        )
    _done(record, directory, f"resume_from_checkpoint={str(directory)!r}")


def need_torch(what: str, *packages: str) -> None:
    """Raises NotSupported, naming the package, where one isn't installed."""
    for package in ("torch", *packages):
        if importlib.util.find_spec(package) is None:
            raise NotSupported(f"{what} needs {package}, which isn't installed", hint="pip install 'lastgood[trl]'")


def _done(record: Record, directory: Path, what: str) -> None:
    click.echo(f"{text.plain(record.name)} -> {text.plain(str(directory))}: {what}", err=True)

"""lastgood adopt: a stock Trainer's run gets manifests, in place."""

from __future__ import annotations

from collections.abc import Sequence

import click

from lastgood import units
from lastgood.adoption import candidates
from lastgood.cli import text
from lastgood.cli.held import confirm, held
from lastgood.cli.place import run_at, run_option
from lastgood.cli.verify import _progress
from lastgood.errors import NoCheckpoint, NotSupported
from lastgood.model import TRAINERS
from lastgood.repo.adopt import adopt as give_manifests
from lastgood.view import View, look


@click.command()
@click.argument("run", required=False)
@run_option
@click.option("-n", "--dry-run", is_flag=True, help="Show what would be adopted and stop.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
def adopt(root: str | None, run: str | None, dry_run: bool, yes: bool) -> None:
    """Take checkpoints that a Trainer wrote without lastgood under management, in place.

    Each gets a manifest with the hash of every file beside its files, of which none changes. From then on it can be
    verified, pruned, stripped, pinned and tagged. Damaged and incomplete ones are left as they are. Checkpoints of
    Lightning, Accelerate and torch.distributed are brought in with `lastgood import` instead.
    """
    path = run_at(root, run)
    with held(path, dry_run):
        view = look(path)
        chains, skipped = candidates(view)
        for name, reason in skipped:
            click.echo(f"SKIP   {text.plain(name)}  {text.plain(reason)}")
        chosen = [item for chain in chains for item in chain.items]
        if not chosen:
            raise _nothing(view, skipped)
        total = sum((item.path / name).stat().st_size for item in chosen for name in item.files)
        for item in chosen:
            click.echo(f"ADOPT  {item.path.name}  {len(item.files)} files, written by {item.layout}")
        if len(chains) > 1:
            click.echo(f"{len(chains)} runs share the directory; the one that came furthest becomes current", err=True)
        if dry_run:
            click.echo(f"would hash {units.size(total)} and write {len(chosen)} manifests", err=True)
            return
        confirm(f"hash {units.size(total)} and write {len(chosen)} manifests?", yes)
        with _progress(total) as advance:
            give_manifests(path, chains, progress=advance)
        click.echo(f"adopted {len(chosen)} checkpoints; `lastgood log` lists them", err=True)


def _nothing(view: View, skipped: Sequence[tuple[str, str]]) -> Exception:
    others = {view.found[name].layout for name, _ in skipped if name in view.found} - set(TRAINERS)
    if others:
        return NotSupported(
            f"the checkpoints here were written by {', '.join(sorted(others))}: they have no directory of their own"
            " that a manifest could lie in, or no step",
            hint="`lastgood import SOURCE RUN` copies them into a run",
        )
    return NoCheckpoint("there is nothing to adopt: every checkpoint has a manifest, or is damaged")

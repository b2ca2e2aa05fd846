"""What the rules about versions and formats look for: files that name too much, optimizers and shapes that differ."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lastgood.doctor.case import Case
from lastgood.doctor.finding import Repair
from lastgood.doctor.log import Raised
from lastgood.doctor.rule import Sight
from lastgood.doctor.rules import fit
from lastgood.model import Record

VOCABULARY = re.compile(
    r"(?:^|\.)(?:wte|embed_tokens|embed_in|embed_out|word_embeddings|tok_embeddings|lm_head|shared|output_layer)\."
    r"(?!.*lora_)"
)
"""Tensors with a row per token."""

TIED = re.compile(r"(?:^|\.)(?:lm_head|embed_out|cls\.predictions\.decoder|(?:encoder|decoder)\.embed_tokens)\.\w+$")
"""Tensors that are the input embedding once more in models with tied weights."""

HARMFUL = re.compile(
    r"^(?:os|posix|nt|subprocess|shutil|socket|runpy|pty|ctypes|webbrowser|importlib|sys|pickle)\."
    r"|^(?:builtins|__builtin__)\.(?:eval|exec|compile|open|__import__|getattr)$"
)
"""What a checkpoint has no reason to name."""


def refused(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """A file that torch's weights_only doesn't open: which one, and whether that is harmless."""
    found = re.findall(
        r"[Uu]nsupported (?:global: |class )?(?:GLOBAL )?([\w.<>]{1,300})(?= was not| whose module)", raised.text
    )
    names = list(dict.fromkeys(name.rstrip(".") for name in found))
    if not names:
        return
    harmful = [name for name in names if HARMFUL.match(name)]
    evidence, repair = [], None
    record = fit.subject(case)
    if case.disk is not None and record is not None:
        for file in fit.archives(case.disk, record):
            inside = fit.names_in(fit.held(case.disk, record, file))
            if inside.intersection(names):
                shown = sorted(name for name in inside if not name.startswith("torch._utils"))
                evidence.append(f"{record.name}/{file} names {fit.some(shown)}")
        if harmful and evidence:
            repair = Repair("quarantine", record.name)
    if harmful:
        yield Sight(
            saw=f"the file names {', '.join(harmful)}",
            evidence=tuple(evidence),
            means="no training state needs that: whoever opens the file with weights_only=False runs what it names",
            fix=("don't open it; ask where the file comes from, and resume from {good}",),
            repair=repair,
        )
        return
    packages = sorted({name.partition(".")[0] for name in names} - {"numpy", "builtins"})
    imports = f"import {', '.join(['torch', *packages])}; "
    fix = [f"{imports}torch.serialization.add_safe_globals([{', '.join(names)}])  # before the load, if you know them"]
    if any(name.startswith(("numpy.", "_codecs.")) for name in names):
        installed = fit.version(case.versions.get("transformers"))
        newer = "" if not installed or installed >= (4, 52) else f" ({case.versions['transformers']} is installed here)"
        fix.insert(0, f"pip install 'transformers>=4.52', which allows what its own random states need{newer}")
    fix.append("not weights_only=False: it runs whatever a file names")
    yield Sight(saw=f"torch.load refuses {', '.join(names)}", evidence=tuple(evidence), fix=tuple(fix))


def numpy_two(case: Case) -> Iterator[Sight]:
    """Random states of numpy 2 where numpy 1 is installed."""
    installed = fit.version(case.versions.get("numpy"))
    if case.disk is None or not installed or installed[0] != 1:
        return
    for record in fit.own(case.disk)[-1:]:
        for file in fit.archives(case.disk, record):
            inside = fit.names_in(fit.held(case.disk, record, file))
            if any(name.startswith("numpy._core") for name in inside):
                yield Sight(
                    saw=f"{file} was written with numpy 2, numpy {case.versions['numpy']} is installed here",
                    where=record.name,
                )


def other_version(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    saved, now = match.group(1), match.group(2).rstrip(".")
    far = fit.version(saved)[:1] != fit.version(now)[:1]
    yield Sight(
        saw=f"saved with transformers {saved}, resumed with {now}",
        severity="warning" if far else "info",
        fix=(f"pip install transformers=={saved}, to go on exactly as before", "or accept it and watch the loss"),
    )


def other_major(case: Case) -> Iterator[Sight]:
    record = case.disk.newest if case.disk is not None else None
    if case.disk is None or record is None:
        return
    saved = fit.config(case.disk, record).get("transformers_version")
    if not fit.version(saved) and record.manifest is not None:
        saved = record.manifest.environment.get("transformers")
    now = case.versions.get("transformers")
    if fit.version(saved) and fit.version(now) and fit.version(saved)[0] != fit.version(now)[0]:
        yield Sight(
            saw=f"saved with transformers {saved}, {now} is installed here",
            where=record.name,
            severity="info",
            fix=(f"pip install transformers=={saved}, to go on exactly as before",),
        )


def vocabulary(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """Nothing but the number of tokens differs: how many there have to be."""
    misfits = fit.misfits_of(case, raised.text)
    rows = [m for m in misfits if VOCABULARY.search(m.name) and m.saved[:1] != m.now[:1] and m.saved[1:] == m.now[1:]]
    if not rows or len(rows) != len([m for m in misfits if "lora_" not in m.name]) or not rows[0].saved:
        return
    saved, now = rows[0].saved[0], rows[0].now[0]
    evidence = [f"{record.name}/config.json: vocab_size {size}" for record, size in _sizes(case)]
    if now > saved and now % 8 == 0:
        evidence.append(f"{now} is a multiple of {math.gcd(now, 256)}: it may be padding (pad_to_multiple_of)")
    yield Sight(
        saw=f"{rows[0].name} has {saved} rows in the checkpoint, {now} in the model being built",
        evidence=tuple(evidence),
        means="the tokenizer has more tokens than when it was saved, or the embedding was padded to another size"
        if now > saved
        else "tokens were added, or the embedding was padded, before it was saved, and not this time",
        fix=(
            f"model.resize_token_embeddings({saved})  # after building the model, before the checkpoint is loaded",
            "the tokenizer that was saved with the checkpoint, not the base model's",
        ),
    )


def _sizes(case: Case) -> Iterator[tuple[Record, int]]:
    record = fit.subject(case)
    if case.disk is not None and record is not None:
        size = fit.config(case.disk, record).get("vocab_size")
        if type(size) is int:
            yield record, size


def shapes(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """Other sizes, or other tensors: which settings of the configuration that comes from."""
    misfits = fit.misfits_of(case, raised.text)
    missing, surplus = fit.listed(raised.text, "Missing"), fit.listed(raised.text, "Unexpected")
    if not (misfits or missing or surplus):
        saw = case.log.line_of(match) if case.log is not None else match.group()
        yield Sight(saw=saw, evidence=tuple(_reasons(case, [], [])))
        return
    parts = [str(misfits[0]) + (f", and {len(misfits) - 1} more" if len(misfits) > 1 else "")] if misfits else []
    parts += [f"missing in the checkpoint: {fit.some(missing, 3)}"] if missing else []
    parts += [f"only in the checkpoint: {fit.some(surplus, 3)}"] if surplus else []
    yield Sight(saw="; ".join(parts), evidence=tuple(_reasons(case, misfits, missing)))


def left_out(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """The Trainer loads what there is and only prints the rest."""
    names, surplus = _lacking(match.string, fit.MISSING_LINE), _lacking(match.string, fit.SURPLUS_LINE)
    if any(name.startswith("base_model.model.") for name in names):
        return
    surplus = [name for name in surplus if not fit.HARMLESS.search(name)]
    if surplus and (not names or all(TIED.search(name) for name in names)):
        yield Sight(
            saw=f"the model being trained has no place for {len(surplus)} tensors of the checkpoint:"
            f" {fit.some(surplus, 3)}",
            evidence=tuple(_reasons(case, [], [])),
            means="these are left out without a word more: the model that goes on is another one than was saved",
        )
        return
    if not names or all(TIED.search(name) for name in names):
        return
    yield Sight(
        saw=f"the checkpoint lacks {len(names)} tensors of the model being trained: {fit.some(names, 3)}",
        evidence=tuple(_reasons(case, [], names)),
        means="these go on with the values that the model was built with, random ones mostly, and nothing stops it",
    )


def _lacking(text: str, line: str) -> list[str]:
    match = re.search(line, text)
    return fit.quoted(match.group(1)) if match else []


def shapes_or_left_out(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    yield from left_out(case, raised, match) if match.re.groups else shapes(case, raised, match)


def _reasons(case: Case, misfits: list[fit.Misfit], missing: list[str]) -> Iterator[str]:
    """Settings in the checkpoint's config.json whose values are the saved sizes, and what other checkpoints say."""
    record = fit.subject(case)
    if case.disk is None or record is None:
        return
    saved = fit.shaping(fit.config(case.disk, record))
    pairs = {p for m in misfits if len(m.saved) == len(m.now) for p in zip(m.saved, m.now, strict=True) if p[0] != p[1]}
    for key, value in saved.items():
        now = sorted(after for before, after in pairs if before == value and type(value) is int)
        if now:
            yield f"{key} is {value} in {record.name}/config.json; the model being built has {now[0]}"
    layers = [int(m.group(1)) for name in missing if (m := re.search(r"\.(?:h|layers?|block)\.(\d{1,6})\.", name))]
    depth = next((key for key in ("num_hidden_layers", "n_layer", "num_layers") if type(saved.get(key)) is int), None)
    if layers and depth is not None and max(layers) >= saved[depth]:
        yield f"{depth} is {saved[depth]} in {record.name}/config.json; the model being built has {max(layers) + 1}"
    for other in fit.own(case.disk):
        lines = fit.different(saved, fit.shaping(fit.config(case.disk, other))) if other.name != record.name else []
        if lines:
            yield f"{record.name} and {other.name} differ: {'; '.join(lines)}"


def changed_model(case: Case) -> Iterator[Sight]:
    """Checkpoints of one run whose configurations make other tensors."""
    if case.disk is None:
        return
    known = [(r, values) for r in fit.own(case.disk) if (values := fit.shaping(fit.config(case.disk, r)))]
    for (before, mine), (after, theirs) in itertools.pairwise(known):
        lines = fit.different(mine, theirs)
        if lines:
            yield Sight(
                saw=f"{before.name} and {after.name} are of different models: {'; '.join(lines)}",
                where=after.name,
                severity="warning",
                means="a resume with the model of one can't load the other",
            )


def elsewhere(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """Tensors of a GPU on a machine without one, or random states that aren't bytes any more."""
    if "ByteTensor" not in match.group():
        places = {
            "_load_rng_state": "rng_state.pth",
            "_load_scaler": "scaler.pt",
            "_load_optimizer_and_scheduler": "optimizer.pt or scheduler.pt",
        }
        file = next((name for function, name in places.items() if raised.passed(function)), None)
        yield Sight(
            saw=match.group(),
            evidence=(f"it was {file} that was being loaded",) if file else (),
            fix=('torch.load(path, map_location="cpu", weights_only=True)',),
        )
        return
    found = [f"{record.name}: {saw}" for record, saw in _cast(case)]
    yield Sight(saw=match.group(), evidence=tuple(found), fix=CAST)


CAST = ("resume from {good}, if its random states are whole", "or move rng_state.pth out of a copy of the checkpoint")


def cast_random_states(case: Case) -> Iterator[Sight]:
    for record, saw in _cast(case):
        means = "a resume stops with: RNG state must be a torch.ByteTensor"
        yield Sight(saw=saw, where=record.name, means=means, fix=CAST)


def _cast(case: Case) -> Iterator[tuple[Record, str]]:
    for record in fit.own(case.disk) if case.disk is not None else ():
        assert case.disk is not None
        files = sorted(name for name in case.disk.files(record) if re.fullmatch(r"rng_state(_\d+)?\.pth", name))
        for file in files[:1]:
            tree = case.disk.pickled(record, file)
            dtype = getattr(tree.get("cpu"), "dtype", "U8") if isinstance(tree, dict) else "U8"
            if dtype != "U8":
                yield record, f"the random state of the CPU in {file} is {dtype}, not bytes"


def only_weights(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    found = [r for r in case.disk.close if r.layout == "lightning"] if case.disk is not None else []
    yield Sight(
        saw=case.log.line_of(match) if case.log is not None else match.group(),
        evidence=tuple(
            f"{record.name} holds {'the optimizer too' if record.state == 'full' else 'weights alone'}"
            for record in found
        ),
    )


def tied(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """Harmless if the weights are tied; a configuration that says they aren't makes it serious."""
    names = fit.quoted(match.group(1))
    if not names or not all(TIED.search(name) for name in names):
        return
    record = fit.subject(case)
    values: Mapping[str, Any] = {} if case.disk is None or record is None else fit.config(case.disk, record)
    told = values.get("tie_word_embeddings")
    if told is False and record is not None:
        yield Sight(
            saw=f"missing: {fit.some(names)}, and {record.name}/config.json says tie_word_embeddings false",
            severity="error",
            means="the output layer isn't in the checkpoint and isn't the embedding either: it goes on with the values"
            " that the model was built with",
            fix=("resume from {good}, if it holds these; else tie_word_embeddings=True, if that is what was trained",),
        )
    else:
        where = f"{record.name}/config.json: tie_word_embeddings true" if told is True and record is not None else ""
        yield Sight(saw=f"missing: {fit.some(names)}", evidence=(where,) if where else ())

"""What a log says about a file that couldn't be read: the libraries rarely name it, the disk does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lastgood.doctor.case import Case
from lastgood.doctor.disk import Disk
from lastgood.doctor.log import Raised
from lastgood.doctor.named import instead, offered, spoken_of
from lastgood.doctor.rule import InLog, Sight
from lastgood.doctor.rules.corruption_disk import ARCHIVES, LEGACY, Fault, faults, mount
from lastgood.doctor.rules.corruption_disk import sight as on_disk

_BY_FRAME = (
    (("_load_optimizer_and_scheduler",), ("optimizer", "scheduler")),
    (("_load_rng_state",), ("rng_state",)),
    (("_load_scaler",), ("scaler",)),
    (("_load_from_checkpoint", "load_sharded_checkpoint"), ("pytorch_model", "model", "adapter_model")),
)
"""Functions of a Trainer -> beginnings of the names of the files that they read."""


def by_bytes(*codes: str) -> InLog:
    """What the damaged files on disk say, of the kinds that give this message."""

    def log(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
        yield told(case, raised, match, codes)

    return log


def told(case: Case, raised: Raised, match: re.Match[str], codes: Sequence[str]) -> Sight:
    """The message, and which file it must have been about."""
    disk = disk_for(case)
    read = _read_by(raised)
    found = [fault for fault in faults(disk) if fault.code in codes] if disk is not None else []
    found = [fault for fault in found if fault.name.startswith(read)] or found
    line = case.log.line_of(match) if case.log is not None else ""
    if disk is None:
        which = f"it was reading {' or '.join(read)}" if read else "the run directory would show which file it was"
        return Sight(saw=line, evidence=(which,))
    if not found:
        known = f"no such file in the {len(disk.close)} checkpoints of {disk.root} that were looked at closely"
        reading = (f"it was reading {' or '.join(read)}",) if read else ()
        return Sight(saw=line, evidence=(*reading, known, *offered(disk)), fix=instead(disk))
    return _named(case, disk, line, found)


def _named(case: Case, disk: Disk, line: str, found: Sequence[Fault]) -> Sight:
    last = max(found, key=lambda fault: fault.record.step)
    more = [f"{f.record.name}/{f.name} {f.what}" for f in found if f is not last][:4]
    seen = on_disk(case, last) if disk is case.disk else None
    return Sight(
        saw=f"{last.record.name}/{last.name} {last.what}",
        evidence=(line, *(seen.evidence if seen is not None else ()), *more, *offered(disk)),
        fix=instead(disk),
        repair=seen.repair if seen is not None else None,
    )


def disk_for(case: Case) -> Disk | None:
    """The run that was given, else the one that the log last spoke of."""
    return case.disk or next((place.disk for place in spoken_of(case) if place.disk is not None), None)


def _read_by(raised: Raised) -> tuple[str, ...]:
    return next((names for functions, names in _BY_FRAME if raised.passed(*functions)), ())


def in_torch(raised: Raised) -> bool:
    """Whether the traceback goes through torch.load, or the pickle of something else that was saved."""
    return any("serialization" in f.file or "_weights_only_unpickler" in f.file for f in raised.frames)


def ended(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKC006: EOFError says nothing at all; where it was raised decides."""
    if "reading a line" in match.group() or (raised.frames and not in_torch(raised) and not _read_by(raised)):
        return
    disk = disk_for(case)
    empty = disk is not None and any(fault.code == "CKC006" for fault in faults(disk))
    if not raised.frames and not empty and "checkpoint" not in raised.text:
        return
    yield told(case, raised, match, ("CKC006",))


def invalid(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKC007: the file is looked for from its end, and what is found there points before its beginning."""
    disk = disk_for(case)
    cut = disk is not None and any(fault.code == "CKC005" for fault in faults(disk))
    if (raised.frames and in_torch(raised)) or (not raised.frames and cut):
        yield told(case, raised, match, ("CKC005", "CKC007"))


def unknown_header(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKC004: garbage, or a type of tensor that came later than the library."""
    later = re.search(r"unknown variant `([A-Z]+\d\w*)`", raised.text)
    if later is None:
        yield told(case, raised, match, ("CKC004", "CKC003"))
        return
    here = case.versions.get("safetensors")
    yield Sight(
        saw=f"the file holds tensors of type {later.group(1)}, which the safetensors that read it doesn't know",
        evidence=(f"safetensors {here} is installed here",) if here else (),
        means="the file is good, the library is too old for it",
        fix=("pip install -U safetensors",),
    )


def legacy(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKC009: a file in the format before 1.6, shorter than what it announces."""
    disk = disk_for(case)
    found = []
    for record in disk.close if disk is not None else ():
        for name, size in disk.files(record).items() if disk is not None else ():
            if disk is None or not name.endswith(ARCHIVES) or not disk.head(record, name, 4).startswith(LEGACY):
                continue
            larger = [r for r in disk.close if disk.files(r).get(name, 0) > size]
            if larger:
                full = f"{larger[-1].name} {disk.files(larger[-1])[name]}"
                found.append(f"{record.name}/{name} has {size} bytes, that of {full}")
    line = case.log.line_of(match) if case.log is not None else ""
    yield Sight(saw=found[-1] if found else line, evidence=(line, *found[:-1], *offered(disk)), fix=instead(disk))


_PRINTS = ("print", "fp_write", "emit", "write", "flush", "display", "refresh", "status_printer")


def hiccup(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKC010: storage that went away for a moment; or the terminal, which says the same."""
    line = case.log.line_of(match) if case.log is not None else ""
    five = re.search(r"Errno 5\b|Input/output error", match.group()) is not None
    last = raised.frames[-1] if raised.frames else None
    terminal = last is not None and (
        last.function in _PRINTS and any(word in last.file for word in ("tqdm", "logging", "rich", "colorama", "io"))
    )
    if five and terminal and last is not None:
        yield Sight(
            saw=f"{line}, in {last.function} of {last.file}",
            evidence=("it was raised while something was printed",),
            means="the terminal was closed, and the training that printed to it died: no file is damaged",
            fix=("start it so that it outlives the terminal: nohup ... > train.log 2>&1 &, or in tmux",),
        )
        return
    root = case.disk.root if case.disk is not None else None
    where = (mount(root),) if root is not None and mount(root) else ()
    yield Sight(saw=line, evidence=(*where, *offered(case.disk)))


def not_what_it_is(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """CKC003: the first bytes say what a file is."""
    byte = next((group for group in match.groups() if group), "")
    sight = told(case, raised, match, ("CKC003",))
    if byte and sight.saw == (case.log.line_of(match) if case.log is not None else ""):
        code = (
            int(byte)
            if byte.isdigit()
            else int(byte[2:], 16)
            if re.fullmatch(r"\\x[0-9a-f]{2}", byte)
            else ord(byte[0])
        )
        guess = {
            118: "a git-LFS pointer begins with 'version'",
            60: "a web page begins with '<'",
            0: "zero bytes: the content never reached the disk",
        }
        if code not in guess:
            return
        sight = Sight(saw=f"{sight.saw} ({guess[code]})", evidence=sight.evidence, fix=sight.fix)
    yield sight

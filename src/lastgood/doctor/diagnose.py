"""`lastgood.diagnose`: every rule over all that is known, what says less about the same left out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lastgood.doctor.arguments import load
from lastgood.doctor.case import Case
from lastgood.doctor.disk import Disk
from lastgood.doctor.finding import ORDER, SERIOUS, Finding
from lastgood.doctor.log import Log, Raised, read
from lastgood.doctor.rule import Rule, Sight
from lastgood.doctor.rules import RULES
from lastgood.doctor.settings import Settings, settings_of
from lastgood.errors import NoRun, UsageError, wrong_type

LOG, ARGUMENTS = "log", "arguments"


def diagnose(
    run: str | os.PathLike[str] | None = None,
    *,
    log: str | bytes | None = None,
    args: Any = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    full: bool = False,
) -> tuple[Finding, ...]:
    """What is wrong with a run directory, a log (its text), training arguments, or any of them together.

    args: a TrainingArguments object, a mapping, or the path of a JSON or YAML file. select, ignore: codes or their
    beginnings ("CKR", "CKS001"). full: look at every checkpoint closely and read every byte of what has hashes.
    The worst first. Nothing is changed. Raises UsageError for what can't be read, NoRun for a run that isn't there.
    """
    if run is None and log is None and args is None:
        raise UsageError("there is nothing to look at", hint="give a run directory, log= or args=")
    if log is not None and not isinstance(log, (str, bytes)):
        raise wrong_type("log", log, "the text of a log")
    if run is not None and not Path(run).is_dir():
        raise NoRun(f"{os.fspath(run)} is not a directory", hint="name the directory that the checkpoints are in")
    disk = Disk(Path(run), full=full) if run is not None else None
    given = None if args is None else load(args)
    return examine(case_of(disk, None if log is None else read(log), given), select=select, ignore=ignore)


def case_of(disk: Disk | None, log: Log | None, arguments: Mapping[str, object] | None) -> Case:
    """The case; without arguments those of the newest checkpoint count."""
    recorded = arguments is None
    if arguments is None and disk is not None and disk.newest is not None:
        arguments = disk.arguments(disk.newest)
    settings = None
    if arguments:
        known: dict[str, Any] = {}
        if disk is not None:
            known["keep"] = disk.view.keep
            known["managed"] = disk.view.layout == "lastgood" and bool(disk.records)
            known["foreign"] = tuple(r.name for r in disk.records if r.state == "foreign")
        try:
            settings = settings_of(arguments, **known)
        except UsageError:
            if not recorded:
                raise
    return Case(log=log, disk=disk, arguments=arguments, settings=settings, recorded=recorded)


def examine(case: Case, *, select: Sequence[str] = (), ignore: Sequence[str] = ()) -> tuple[Finding, ...]:
    """All findings of a case, the worst first."""
    rules = chosen(select, ignore)
    found = [*_in_log(case, rules), *_by(case, rules)]
    silent = {code for rule in rules for code in rule.over if any(f.code == rule.code for f in found)}
    found = _merged([finding for finding in found if finding.code not in silent])
    return tuple(sorted(found, key=lambda finding: ORDER.index(finding.severity)))


def preflight(settings: Settings, select: Sequence[str] = ()) -> tuple[Finding, ...]:
    """What the settings alone say, before the first step: the worst first."""
    return examine(Case(settings=settings), select=select)


def chosen(select: Sequence[str], ignore: Sequence[str]) -> tuple[Rule, ...]:
    """The rules that codes or their beginnings name. Raises UsageError for a word that names none."""
    for word in (*select, *ignore):
        if not any(rule.code.startswith(word.upper()) for rule in RULES):
            raise UsageError(f"no rule begins with {word!r}", hint="`lastgood doctor --rules` lists them")
    wanted = tuple(word.upper() for word in select) or ("",)
    unwanted = tuple(word.upper() for word in ignore)
    return tuple(r for r in RULES if r.code.startswith(wanted) and not (unwanted and r.code.startswith(unwanted)))


def rule(code: str) -> Rule:
    """The rule with this code."""
    return next(rule for rule in RULES if rule.code == code)


def serious(findings: Sequence[Finding]) -> bool:
    """Whether anything in it is worth stopping for."""
    return any(finding.severity in SERIOUS for finding in findings)


def _in_log(case: Case, rules: Sequence[Rule]) -> Iterator[Finding]:
    """By the last exception that any rule knows, and by what stands anywhere."""
    if case.log is None:
        return
    for raised in case.log.raised:
        found = [f for rule in rules if rule.message for f in _matched(case, rule, rule.message, raised)]
        yield from found
        if found:
            break
    for rule in rules:
        if rule.warning:
            yield from _matched(case, rule, rule.warning, Raised("", case.log.text))


def _matched(case: Case, rule: Rule, pattern: str, raised: Raised) -> Iterator[Finding]:
    match = re.search(pattern, raised.text, re.MULTILINE)
    if match is None or case.log is None:
        return
    sights = [Sight(saw=case.log.line_of(match))] if rule.log is None else list(rule.log(case, raised, match))
    for sight in sights:
        yield rule.finding(case, sight, LOG)


def _by(case: Case, rules: Sequence[Rule]) -> Iterator[Finding]:
    for rule in rules:
        if case.disk is not None and rule.run is not None:
            for sight in rule.run(case):
                yield _in_time(case, rule.finding(case, sight, case.disk.root.name or str(case.disk.root)))
        if case.settings is not None and rule.arguments is not None:
            for sight in rule.arguments(case):
                yield rule.finding(case, sight, ARGUMENTS)


def _in_time(case: Case, finding: Finding) -> Finding:
    """What is half there because it is being written this minute is no trouble yet."""
    if case.disk is None or finding.severity not in SERIOUS or finding.where == case.disk.root.name:
        return finding
    whole = any(r.name == finding.where and r.state != "incomplete" for r in case.disk.records)
    path = case.disk.root / finding.where
    if whole or not path.exists() or not case.under_way(path):
        return finding
    why = "a save may be under way: it was written to less than a minute ago"
    return msgspec.structs.replace(finding, severity="info", evidence=(*finding.evidence, why))


def _merged(found: Sequence[Finding]) -> list[Finding]:
    """Log and disk about the same trouble are one finding: what is on disk is evidence for what the log says."""
    told: dict[str, Finding] = {}
    rest = []
    for finding in found:
        if finding.where == LOG and finding.code not in told:
            told[finding.code] = finding
        else:
            rest.append(finding)
    for finding in rest:
        if finding.code in told:
            first = told[finding.code]
            more = (f"{finding.where}: {finding.saw}", *finding.evidence)
            told[finding.code] = msgspec.structs.replace(
                first, evidence=(*first.evidence, *more), repair=first.repair or finding.repair
            )
    seen: set[tuple[str, str, str]] = set()
    out = list(told.values())
    for finding in rest:
        key = (finding.code, finding.where, finding.saw)
        if finding.code not in told and key not in seen:
            seen.add(key)
            out.append(finding)
    return out


def plain(finding: Finding) -> dict[str, Any]:
    """The finding as JSON has it."""
    value: dict[str, Any] = msgspec.to_builtins(finding)
    return value

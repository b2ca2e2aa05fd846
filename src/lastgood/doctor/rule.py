"""A rule: how one trouble is recognised, in a log, on disk or in the settings, and what there is to say about it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator

import msgspec

from lastgood.doctor.case import Case
from lastgood.doctor.finding import Finding, Repair, Severity
from lastgood.doctor.log import Raised

_PLACE = re.compile(r"\{(?:root|checkpoint|good)\}")


class Sight(msgspec.Struct, frozen=True, kw_only=True):
    """One place where a rule holds. What is left empty is taken from the rule."""

    saw: str
    where: str = ""
    evidence: tuple[str, ...] = ()
    means: str = ""
    fix: tuple[str, ...] = ()
    severity: Severity | None = None
    repair: Repair | None = None


def advice(sights: Iterator[Sight], case: Case) -> Iterator[Sight]:
    """What settings could do better. Of a run that is already under way, or over, it's worth knowing and no alarm."""
    for sight in sights:
        yield msgspec.structs.replace(sight, severity="info") if case.recorded else sight


InLog = Callable[[Case, Raised, "re.Match[str]"], Iterator[Sight]]
Look = Callable[[Case], Iterator[Sight]]


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """title: the trouble in one line. means: what comes of it. cause: how it comes about, for the rule's page.

    fix: commands or settings, the best first; {root}, {checkpoint} and {good} stand for the run directory, the
        checkpoint that the sight is about and the last good one.
    message: looked for in what the last exception says. warning: looked for in every line of a log. Both are regular
        expressions with (?i) where it matters, searched with MULTILINE.
    log: turns (case, the exception, the match) into sights; left out, the matched line is one.
    run: looks at the disk (case.disk is there). arguments: looks at the settings (case.settings is there).
    over: codes of rules that say less about the same: they are silent where this one speaks.
    source: where the behaviour comes from: library, version and function, public issue numbers.
    """

    code: str
    title: str
    severity: Severity
    means: str
    cause: str
    fix: tuple[str, ...]
    message: str = ""
    warning: str = ""
    log: InLog | None = None
    run: Look | None = None
    arguments: Look | None = None
    over: tuple[str, ...] = ()
    source: str = ""

    def finding(self, case: Case, sight: Sight, where: str) -> Finding:
        """The finding for one place."""
        at = sight.where or where
        good = case.disk.good.name if case.disk is not None and case.disk.good is not None else "latest"
        root = str(case.disk.root) if case.disk is not None else "RUN"
        # Quoted: what follows is pasted into a shell. In one go: a directory may be called {good}.
        words = {"{root}": shlex.quote(root), "{checkpoint}": shlex.quote(at), "{good}": good}
        fix = tuple(_PLACE.sub(lambda m: words[m.group()], line) for line in sight.fix or self.fix)
        return Finding(
            code=self.code,
            title=self.title,
            severity=sight.severity or self.severity,
            where=at,
            saw=sight.saw,
            evidence=sight.evidence,
            means=sight.means or self.means,
            fix=fix,
            repair=sight.repair,
        )

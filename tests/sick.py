"""What the tests of the doctor share: real logs of real errors, and the codes that are found."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lastgood.doctor.diagnose import diagnose
from lastgood.doctor.finding import Finding


def log_of(function: Callable[[], Any]) -> str:
    """The traceback of what `function` raises, as a script that ends by it would print it."""
    try:
        function()
    except BaseException:
        return traceback.format_exc()
    raise AssertionError("it was to raise something")


def codes(run: Path | None = None, **what: Any) -> list[str]:
    """Codes of the findings, the worst first."""
    return [finding.code for finding in diagnose(run, **what)]


def the(code: str, run: Path | None = None, **what: Any) -> Finding:
    """The one finding of this code; everything it has to say is there."""
    found = [finding for finding in diagnose(run, **what) if finding.code == code]
    assert len(found) == 1, [f"{finding.code} {finding.saw}" for finding in diagnose(run, **what)]
    assert found[0].saw and found[0].means and found[0].where and found[0].title
    assert "{" not in "".join(found[0].fix), found[0].fix
    return found[0]

"""Rules about versions, formats, and states that don't fit what is running."""

from __future__ import annotations

from lastgood.doctor.rule import Rule

RULES: tuple[Rule, ...] = ()

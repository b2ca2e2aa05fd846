"""Rules about files that aren't what was written."""

from __future__ import annotations

from lastgood.doctor.rule import Rule

RULES: tuple[Rule, ...] = ()

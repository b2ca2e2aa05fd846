"""Rules about adapters."""

from __future__ import annotations

from lastgood.doctor.rule import Rule

RULES: tuple[Rule, ...] = ()

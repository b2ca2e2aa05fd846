"""Rules about the data order, and what else makes a resumed run differ."""

from __future__ import annotations

from lastgood.doctor.rule import Rule

RULES: tuple[Rule, ...] = ()

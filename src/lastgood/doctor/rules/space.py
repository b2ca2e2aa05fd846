"""Rules about disks and memory that run out."""

from __future__ import annotations

from lastgood.doctor.rule import Rule

RULES: tuple[Rule, ...] = ()

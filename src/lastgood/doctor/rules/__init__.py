"""All rules, in the order of their codes; one file per group, named after what it is about."""

from __future__ import annotations

from lastgood.doctor.rule import Rule
from lastgood.doctor.rules import best, corruption, distributed, loader, peft, resume, space, version

GROUPS: dict[str, tuple[str, tuple[Rule, ...]]] = {
    "CKR": ("Resuming", resume.RULES),
    "CKC": ("Corruption", corruption.RULES),
    "CKV": ("Versions and formats", version.RULES),
    "CKP": ("PEFT", peft.RULES),
    "CKD": ("Distributed", distributed.RULES),
    "CKL": ("Data and determinism", loader.RULES),
    "CKS": ("Space and memory", space.RULES),
    "CKB": ("The best model", best.RULES),
}
"""Letters of the code -> (name of the group, its rules)."""

RULES: tuple[Rule, ...] = tuple(rule for _, rules in GROUPS.values() for rule in rules)

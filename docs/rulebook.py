"""Writes docs/rules/: a page per rule of the doctor, from the rules themselves, and the index.

python docs/rulebook.py
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from lastgood.doctor.rule import Rule
from lastgood.doctor.rules import GROUPS, RULES

HOME = Path(__file__).resolve().parent / "rules"

INTRODUCTION = """\
# The rules of the doctor

These pages are generated from the rules: `./scripts/record` writes them anew. How to ask: [doctor](../doctor.md).

`error`: something is lost or won't start. `warning`: something will be. `info`: worth knowing. `benign`: harmless,
though it looks bad. The exit status of `lastgood doctor` is 1 for errors and warnings. Codes are stable: a rule that
goes leaves its number empty.
"""

PLACES = """\
In a command, {root} is the run directory, {checkpoint} the checkpoint that the finding is about and {good} the last
good one.
"""


def pages() -> dict[str, str]:
    """File name -> text."""
    out = [INTRODUCTION]
    for letters, (name, rules) in GROUPS.items():
        out += [f"## {letters}: {name}\n", "| code | severity | |", "|---|---|---|"]
        out += [f"| [{rule.code}]({rule.code}.md) | {rule.severity} | {_cell(rule.title)} |" for rule in rules]
        out.append("")
    return {"README.md": "\n".join(out)} | {f"{rule.code}.md": page(rule) for rule in RULES}


def page(rule: Rule) -> str:
    """One rule's page."""
    out = [f"# {rule.code}: {rule.title}\n", f"Severity: {rule.severity}. Source: {rule.source}.\n"]
    out += ["## What it means\n", f"{_sentence(rule.means)}\n", "## How it comes about\n", f"{_sentence(rule.cause)}\n"]
    out += ["## What to do\n", "```text", *rule.fix, "```\n"]
    if any("{" in line for line in rule.fix):
        out.append(PLACES)
    out += ["## How it is recognised\n", *_recognised(rule), "", "[All rules](README.md)", ""]
    return "\n".join(out)


def _recognised(rule: Rule) -> list[str]:
    out = []
    for text, pattern in (
        ("By what the last exception in a log says, as a regular expression:", rule.message),
        ("By a line anywhere in a log, as a regular expression:", rule.warning),
    ):
        if pattern:
            out += [text, "", "```text", pattern, "```", ""]
    if rule.run is not None:
        out.append("In the run directory: `lastgood doctor RUN`.")
    if rule.arguments is not None:
        out.append("In the training arguments: `lastgood doctor --args FILE`, and whenever a run is managed.")
    return out


def _sentence(text: str) -> str:
    whole = text[:1].upper() + text[1:]
    return textwrap.fill(whole if whole.endswith((".", ":", ")")) else f"{whole}.", 118, break_long_words=False)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    wanted = pages()
    HOME.mkdir(exist_ok=True)
    for old in HOME.glob("*.md"):
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        (HOME / name).write_text(text)

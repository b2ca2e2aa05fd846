"""Writes the tables of docs/performance.md from the measurements in docs/figures/, and draws their plots.

Between `<!-- figures: NAME -->` and `<!-- end -->` comes what docs/figures/NAME.json holds: the command that measured
it, on what, and its table. Everything else in the page stays as it is. `--check` writes nothing and fails if it would.

    python benchmarks/report.py [--check] [--plots]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import durable, figures, restore, saves, scaling, stall

ROOT = Path(__file__).resolve().parent.parent
PAGE, FIGURES = ROOT / "docs" / "performance.md", ROOT / "docs" / "figures"
MODULES: dict[str, Any] = {"stall": stall, "saves": saves, "durable": durable, "restore": restore, "scaling": scaling}
BLOCK = re.compile(r"(<!-- figures: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def written(page: str, place: Path) -> str:
    """The page with every table as the measurements in `place` have it; those that aren't there yet are named."""

    def block(match: re.Match[str]) -> str:
        file = place / f"{match[2]}.json"
        text = told(json.loads(file.read_text())) if file.exists() else f"Not measured yet: `{match[2]}`.\n"
        return f"{match[1]}{text}{match[3]}"

    return BLOCK.sub(block, page)


def told(document: dict[str, Any]) -> str:
    """Command, machine and table of a run of a benchmark, as Markdown."""
    where = document["machine"]
    facts = [
        f"{where['cores']} cores",
        where["processor"],
        f"{figures.size(where['memory'])} of memory",
        where["system"],
    ]
    facts.append(f"torch {where['torch']}" if "torch" in where else "")
    about = ", ".join(fact for fact in facts if fact)
    return f"`{document['command']}` ({about}):\n\n{tables(document)}"


def tables(document: dict[str, Any]) -> str:
    """What the benchmark shows in a terminal."""
    kind = document["benchmark"]
    if kind == "scaling":
        parts = []
        for axis in ("bytes", "tensors"):
            parts.append(table((axis, *scaling.COSTS), scaling.rows(document, axis)))
        steep = [f"Not linear: {line}.\n" for line in scaling.steep(document)]
        return "\n".join([*parts, *steep])
    module = MODULES[kind]
    missing = [f"{way} ({why})" for way, why in document.get("missing", {}).items()]
    rest = f"\nNot measured: {'; '.join(missing)}.\n" if missing else ""
    return f"{module.title(document)}\n\n{table(module.COLUMNS, module.rows(document))}{rest}"


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---", *["---:"] * (len(columns) - 1)), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page is out of date")
    parser.add_argument("--plots", action="store_true", help="draw FIGURE.svg beside every FIGURE.json (matplotlib)")
    args = parser.parse_args()
    before = PAGE.read_text()
    after = written(before, FIGURES)
    if args.check:
        if before != after:
            raise SystemExit(f"{PAGE} isn't what {FIGURES} say: run benchmarks/report.py")
        return
    PAGE.write_text(after)
    for file in sorted(FIGURES.glob("*.json")) if args.plots else []:
        document = json.loads(file.read_text())
        MODULES[document["benchmark"]].draw(document, file.with_suffix(".svg"))


if __name__ == "__main__":
    main()

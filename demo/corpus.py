"""An instruction set out of the standard library at hand: signature and source of a function -> its docstring."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from rich.progress import track

SOURCE_LIMIT = 400
"""Characters of source code in a prompt."""

ANSWER_LIMIT = 240
"""Characters of docstring in an answer."""


def pairs(limit: int | None = None, quiet: bool = False) -> list[dict[str, str]]:
    """Thousands of {"prompt", "completion"}, always the same for the same Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = sorted(file for file in root.rglob("*.py") if not skipped & set(file.relative_to(root).parts))
    found: dict[str, dict[str, str]] = {}
    for file in track(files, "reading the standard library", disable=quiet, transient=True):
        for prompt, completion in _functions(file):
            found.setdefault(prompt, {"prompt": prompt, "completion": completion})
            if limit is not None and len(found) >= limit:
                return list(found.values())
    return list(found.values())


def _functions(file: Path) -> Iterator[tuple[str, str]]:
    try:
        text = file.read_text(encoding="utf-8")
        module = ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(module):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        doc = ast.get_docstring(node)
        if not doc or len(doc) < 20 or len(node.body) < 2:
            continue
        answer = doc.split("\n\n")[0].strip()
        if len(answer) > ANSWER_LIMIT:
            continue
        lines = text.splitlines()
        signature = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]).strip()
        body = "\n".join(lines[node.body[1].lineno - 1 : node.end_lineno])
        source = f"{signature}\n{body}"[:SOURCE_LIMIT]
        yield f"# Source\n{source}\n# Docstring\n", answer

"""The terminal sessions of the pages: every `$` line of a console block is run, in order, in a copy of the runs.

    python docs/sessions.py [PLACE]    writes the output into the pages; PLACE: runs that `docs/runs.py` made before

A command must end with status 0, or `$ echo $?` follows it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from runs import environment, prepare

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("disk-full", "deploy", "crashed", "doctor", "planning")
PAGES = [*(ROOT / "docs" / f"{name}.md" for name in NAMES), ROOT / "README.md"]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)

ASIDE = ("[transformers]", "Failed to load CPU gemm_4bit_forward")
"""What libraries say of themselves: the second one of bitsandbytes, on some processors."""


def commands(block: str) -> list[str]:
    return [line[2:] for line in block.splitlines() if line.startswith("$ ")]


class Terminal:
    """A directory with the runs in it, and commands run there one after the other."""

    def __init__(self, runs: Path, place: Path) -> None:
        self.place = place / "work"
        shutil.copytree(runs, self.place, symlinks=True)
        tools = place / "bin"
        tools.mkdir()
        for name, call in (("lastgood", "-m lastgood "), ("python", "")):
            (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {call}"$@"\n')
            (tools / name).chmod(0o755)
        path = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"
        self.environment = {**environment(), "PATH": path, "COLUMNS": "118", "LASTGOOD_CACHE": "0"}
        self.status = 0

    def run(self, command: str) -> str:
        """What the command says, both streams; its status is kept."""
        if command == "echo $?":
            return f"{self.status}\n"
        found = subprocess.run(
            ["bash", "-c", command], cwd=self.place, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
        )  # fmt: skip
        self.status = found.returncode
        return "".join(line for line in found.stdout.splitlines(True) if not line.startswith(ASIDE))


def play(block: str, terminal: Terminal) -> str:
    """The block with the output that its commands have now."""
    lines = block.splitlines(True)
    asked = commands(block)
    out = []
    for number, command in enumerate(asked):
        said = terminal.run(command)
        follows = asked[number + 1] if number + 1 < len(asked) else ""
        assert terminal.status == 0 or "echo $?" in (command, follows), f"{command}: {terminal.status}\n{said}"
        out.append(f"$ {command}\n{said}")
    assert lines[0].startswith("$ "), lines[0]
    return "".join(out)


def shape(session: str) -> list[str]:
    """What stays the same from run to run: no numbers, ages, sizes, ids, and no alignment."""
    found = []
    for line in session.splitlines():
        plain = re.sub(r"(?<![\w-])\d+\.\d+(?!\w)", "N", line)  # before its digits are taken for an id
        plain = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b", "ID", plain)
        plain = re.sub(r"disk \S+:", "disk MOUNT:", plain)
        plain = re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", "N", plain)
        plain = re.sub(r"N(st|nd|rd|th)\b", "Nth", plain)
        plain = re.sub(r"N ?([KMGTP]iB|B|ms|[smhdy])(?![a-z])", "N", plain)
        found.append(" ".join(re.sub(r"#+", "", plain).split()))
    return found


def replay(page: str, runs: Path) -> str:
    """The page with all of its sessions as they are now."""
    with tempfile.TemporaryDirectory() as place:
        terminal = Terminal(runs, Path(place))
        return BLOCK.sub(lambda match: f"```console\n{play(match[1], terminal)}```", page)


def main() -> None:
    with tempfile.TemporaryDirectory() as fresh:
        runs = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(fresh)
        if len(sys.argv) == 1:
            prepare(runs)
        for page in PAGES:
            page.write_text(replay(page.read_text(), runs))
            print(page.name)


if __name__ == "__main__":
    main()

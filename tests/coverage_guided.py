"""The targets of `parsers` for atheris: TARGET CORPUS [libFuzzer options]. `./scripts/fuzz --atheris` calls it."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def main(words: list[str]) -> None:
    if words[0] in ("--list", "--seeds", "--again"):
        tool(words)
        return
    import atheris

    with atheris.instrument_imports(include=["lastgood"]):
        from parsers import try_one
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    name = words[0]
    atheris.Setup([sys.argv[0], *words[1:]], lambda data: try_one(name, data, folder))
    atheris.Fuzz()


def tool(words: list[str]) -> None:
    """What needs no fuzzer: the names, the seeds as files, one input once more."""
    from parsers import TARGETS, try_one

    if words[0] == "--list":
        print("\n".join(TARGETS))
    elif words[0] == "--seeds":
        for number, seed in enumerate(TARGETS[words[1]].seeds):
            Path(words[2], f"seed-{number}").write_bytes(seed)
    else:
        with tempfile.TemporaryDirectory() as folder:
            try_one(words[1], Path(words[2]).read_bytes(), Path(folder))
        print("read or refused, as it should be")


if __name__ == "__main__":
    main(sys.argv[1:])

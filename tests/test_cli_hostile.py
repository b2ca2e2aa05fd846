"""Files that somebody made to do harm, and disks that did harm: a message and an exit code, and nothing else.

Nothing outside of the run is read or named, nothing that is pickled is executed, nothing hangs or grows.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import resource
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lastgood.format import manifest as codec
from lastgood.repo import metrics
from lastgood.repo.read import records

import cli
import realruns
from cli import HIDDEN, call, raw_controls, snapshot

CANARY, CONTENT = "canary", "what only the outside says"
EXITS = (0, 1, 2, 3, 4, 5, 6, 10, 11)
LOOKS: tuple[tuple[str, ...], ...] = (
    ("log",), ("log", "--all", "--json"), ("log", "--graph", "-o", "step,name,id,metrics,tags,note,why"), ("show",),
    ("show", "--tensors"), ("show", "--args", "--why"), ("show", "--json"), ("diff", "latest", "latest~1"),
    ("verify", "--full"), ("verify", "--all"), ("resume", "--check"), ("resume", "--json"), ("df",), ("du",),
    ("watch", "--once"), ("prune", "--keep-last", "1", "--stock", "--incomplete", "-n"), ("adopt", "-n"), ("tag",),
)  # fmt: skip


def looked_at(root: Path, verbs: Any = LOOKS) -> dict[tuple[str, ...], tuple[int, str, str]]:
    """Every look answers in the way that is promised; what each said."""
    said = {}
    for words in verbs:
        code, out, err = said[words] = call("-C", root, *words)
        assert code in EXITS, (words, code, out, err)
        assert "Traceback" not in err, (words, err)
        assert len(out) + len(err) < 1 << 20, (words, len(out), len(err))
        assert not raw_controls(out + err), (words, raw_controls(out + err))
        assert CONTENT not in out + err and "leaked" not in out + err, words
        if words[0] in ("log", "df", "du"):
            assert code == 0, (words, err)
    return said


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A managed run, with a directory beside it that nobody may look into."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / CANARY).write_text(CONTENT)
    (outside / "lastgood.json").write_text(CONTENT)
    shutil.copytree(cli.managed(tmp_path / "made") / "checkpoint-600", outside / "checkpoint-600")
    shutil.rmtree(tmp_path / "made")
    for path in [*outside.rglob("*"), outside]:
        os.utime(path, ns=(1, 1))
    before = {path: (path.lstat().st_atime_ns, path.lstat().st_mtime_ns) for path in [*outside.rglob("*"), outside]}
    yield cli.managed(tmp_path / "run")
    if os.environ.get("NO_ATIME") is None:
        for path, times in before.items():
            status = path.lstat()
            # The time of a directory changes when this loop, or pytest, lists it.
            seen = status.st_atime_ns if path.is_file() else times[0]
            assert (seen, status.st_mtime_ns) == times, f"{path} was touched"


def sealed(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a manifest as an attacker would, with a digest that is right."""
    from blake3 import blake3

    fields = json.loads((directory / codec.NAME).read_bytes())
    fields.pop("digest")
    change(fields)
    body = (json.dumps(fields, indent=1).removesuffix("\n}") + ",\n ").encode()
    (directory / codec.NAME).write_bytes(body + f'"digest": "{blake3(body).hexdigest()}"\n}}\n'.encode())


ESCAPES = "\x1b[31mred\x1b]0;title\x07\u202egnp.exe\nnewline\r\x9b2J\u200b\x7f"


def _files(name: str) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        fields["files"][name] = {"size": len(CONTENT), "blake3": "0" * 64}
        fields["parts"]["model"].append(name)

    return change


MANIFESTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "up": _files(f"../../outside/{CANARY}"),
    "absolute": _files(f"/etc/../tmp/{CANARY}"),
    "backslash": _files("..\\outside"),
    "drive": _files("C:/outside"),
    "itself": _files(codec.NAME),
    "empty": _files(""),
    "dot": _files("./a"),
    "nul": _files("a\0b"),
    "long": _files("a" * 5000),
    "surrogate": _files("a\udcff"),
    "ansi": _files(ESCAPES),
    "id": lambda fields: fields.update(id=ESCAPES),
    "id path": lambda fields: fields.update(id="../../outside/canary"),
    "parent": lambda fields: fields.update(parent=ESCAPES),
    "layout": lambda fields: fields.update(layout=ESCAPES),
    "layout of another": lambda fields: fields.update(layout="lightning"),
    "part": lambda fields: fields["parts"].update({ESCAPES: ["config.json"]}),
    "part of nothing": lambda fields: fields["parts"].update({"x": ["nothing"]}),
    "environment": lambda fields: fields["environment"].update({ESCAPES: ESCAPES}),
    "arguments": lambda fields: fields["arguments"].update({ESCAPES: [ESCAPES], "metric_for_best_model": ESCAPES}),
    "facts": lambda fields: fields["facts"].update({ESCAPES: ESCAPES, "loss": ESCAPES}),
    "many underscores": lambda fields: fields["arguments"].update({"metric_for_best_model": "_" * 100_000}),
    "created far": lambda fields: fields.update(created=1e300),
    "created before": lambda fields: fields.update(created=-1e300),
    "step far": lambda fields: fields.update(step=2**62),
    "step below": lambda fields: fields.update(step=-5),
    "seq far": lambda fields: fields.update(seq=2**62),
    "size below": lambda fields: fields["files"]["config.json"].update(size=-1),
    "size far": lambda fields: fields["files"]["config.json"].update(size=2**62),
    "lineage": lambda fields: fields.update(lineage=[[1, 2**62], [2**61, 3]]),
    "lineage of text": lambda fields: fields.update(lineage=[["a", "b"]]),
    "newer": lambda fields: fields.update(format=99, id=ESCAPES),
    "format of text": lambda fields: fields.update(format=ESCAPES),
    "another run": lambda fields: fields.update(run=ESCAPES),
    "deep": lambda fields: fields["arguments"].update(deep=functools.reduce(lambda v, _: {"a": v}, range(400), {})),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest(name: str, root: Path) -> None:
    sealed(root / "checkpoint-600", MANIFESTS[name])
    said = looked_at(root)
    assert "400" in said["log",][1], "one bad directory hides no other"
    code, _, err = call("-C", root, "checkout", "600", root.parent / "copy")
    assert code in EXITS and "Traceback" not in err
    code, _, err = call("-C", root, "prune", "--keep-last", "1", "--yes")
    assert code in EXITS and "Traceback" not in err
    assert code == 0 or "rror: " in err


JSON = {
    "empty": b"",
    "cut": b'{"format": 1, "run": "ab',
    "list": b"[]",
    "number": b"1",
    "null": b"null",
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "nearly too deep": b'{"log_history": [{"step": 2, "a": ' + b"[" * 960 + b"]" * 960 + b'}], "global_step": 2}',
    "binary": bytes(range(256)) * 8,
    "not utf-8": b'{"a": "\xff\xfe"}',
    "surrogates": b'{"\\ud800": {"\\udfff": "\\ud800"}, "monitor": "\\ud800", "mode": "min"}',
    "many digits": b'{"global_step": 2, "log_history": [{"step": 2, "eval_loss": 1' + b"0" * 3000 + b"}]}",
    "too many digits": b'{"global_step": 1' + b"0" * 9000 + b"}",
    "nan": b'{"global_step": NaN, "since": NaN, "within": NaN, "format": NaN, "run": NaN}',
    "infinity": b'{"time": 1e999, "since": 1e999, "step": 1e999, "event": "saved", "bytes": 1e999}',
    "wrong kinds": b'{"global_step": "2", "log_history": {"a": 1}, "run": [], "format": "x", "lineage": 3, "next": []}',
    "wrong rows": b'{"global_step": 2, "log_history": [1, null, {"step": "2"}, {"step": 2, "loss": "x", "eval_x": {}}]}',
    "escapes": json.dumps({"run": ESCAPES, "format": 1, "monitor": ESCAPES, "mode": "min", ESCAPES: [ESCAPES]}).encode(),
    "markup": b'{"monitor": "[/red][bold]", "mode": "min", "last": 2}',
    "metric of underscores": json.dumps({"monitor": "_" * 500_000, "last": 1}).encode(),
    "huge rules": b'{"last": 99999999999999999999, "within": 1e308, "every": 99999999999999999999}',
    "pins of everything": b'{"x": ["latest", "../../outside", 5, null]}',
    "spaces": b" " * (2 << 20),
}  # fmt: skip

OWN = ("run.json", "head.json", "policy.json", "pins.json", "notes.json", "journal.jsonl", "lock.json")


@pytest.mark.parametrize("name", JSON)
def test_hostile_json_in_the_runs_own_files(name: str, root: Path) -> None:
    for file in OWN:
        path = root / HIDDEN / file
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(JSON[name])
        looked_at(root, LOOKS[::3] if file not in ("policy.json", "journal.jsonl") else LOOKS)
        for words in (("tag", "good", "400"), ("untag", "good"), ("note", "400", "x"), ("undo",)):
            code, _, err = call("-C", root, *words)
            assert code in EXITS and "Traceback" not in err, (file, words, err)
        if before is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(before)


@pytest.mark.parametrize("name", JSON)
def test_hostile_json_in_checkpoints(name: str, root: Path, real: Callable[[str], Path]) -> None:
    (root / "checkpoint-600" / codec.NAME).write_bytes(JSON[name])
    identity = records(root)[0].id
    (root / HIDDEN / "metrics" / f"{identity}.jsonl").write_bytes(JSON[name])
    said = looked_at(root)
    assert "400" in said["log",][1]
    stock = real("trainer_sharded")
    for file in ("trainer_state.json", "config.json", "model.safetensors.index.json"):
        (stock / "checkpoint-6" / file).write_bytes(JSON[name])
    said = looked_at(stock)
    assert "checkpoint-4 " in said["resume", "--check"][1] or said["resume", "--check"][0] == 0
    assert said["verify", "--full"][0] == 1


JOURNAL: list[Any] = [
    {"event": "deleted", "step": 2**70, "id": "x" * 16, "time": 1e300},
    {"event": "saved", "step": 5, "id": "f" * 16, "time": "yesterday", "bytes": 2**70},
    {"event": "deleted", "step": 5, "id": "f" * 16, "time": None, "reasons": [ESCAPES, 5, None]},
    {"event": "deleted", "step": True, "id": "../../outside/canary", "reasons": ESCAPES},
    {"event": ESCAPES, "step": ESCAPES, "id": [ESCAPES], "time": -1e300, "reasons": {}},
    {"event": "saved", "step": 7, "time": 1e308, "bytes": 1},
    {"event": "saved", "step": 8, "time": -1e308, "bytes": True},
    {"event": None, "time": float("1e18")},
]


def test_a_hostile_journal(root: Path) -> None:
    for record in records(root):
        JOURNAL.append({"event": "saved", "id": record.id, "time": 1e300, "step": record.step, ESCAPES: ESCAPES})
    (root / HIDDEN / "journal.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in JOURNAL))
    looked_at(root)
    looked_at(
        root, (("log", "--all"), ("show", "200", "--why"), ("log", "--all", "-H"), ("log", "--all", "--sort", "when"))
    )


NAMES = [
    b"checkpoint-5\xff", b"\x1b[31mcheckpoint-7", b"check\npoint-8", b"-rf", b"--help", b"checkpoint_\xe2\x80\xae3",
    b"a" * 250, b"$(touch pwned)", b"[red]x[bold]", b"checkpoint-\xd9\xa3", b"\xe2\x80\x8bcheckpoint-9", b"; rm -rf x",
]  # fmt: skip


def test_hostile_names(root: Path, real: Callable[[str], Path]) -> None:
    """Of directories and files; in a Lightning run the names of files are those of checkpoints."""
    lightning = real("lightning_run")
    source = os.fsencode(lightning / "checkpoints" / "last.ckpt")
    dcp = real("dcp_run")
    for name in NAMES:
        shutil.copyfile(source, os.fsencode(lightning / "checkpoints") + b"/" + name[:240] + b".ckpt")
        shutil.copytree(os.fsencode(dcp / "step-2"), os.fsencode(dcp) + b"/" + name.replace(b".", b"") + b"2")
        for folder in (root, root / HIDDEN / "undo", root / HIDDEN / "tmp", root / HIDDEN / "quarantine"):
            os.makedirs(os.fsencode(folder) + b"/" + name, exist_ok=True)
        with open(os.fsencode(root / "checkpoint-600") + b"/" + name, "wb") as file:
            file.write(b"x")
    (root / HIDDEN / "undo" / "²").mkdir()
    for path in (root, lightning, dcp):
        looked_at(path)
        looked_at(path, (("log", "-H", "-o", "name"), ("log", "-o", "name"), ("du", "-H")))
        code, out, err = cli.run("-C", path, "log", "-o", "name", env={"PYTHONIOENCODING": "latin-1", "COLUMNS": "60"})
        assert (code, err) == (0, "") and out
    assert call("-C", root, "undo")[0] == 3
    (root / "checkpoint-400" / "lastgood.json").unlink()
    (root / "checkpoint-400" / os.fsdecode(NAMES[0])).write_bytes(b"{}")
    looked_at(root)
    assert not (root / "pwned").exists()


def test_hostile_words_of_the_user(root: Path) -> None:
    wild = [ESCAPES, "\udcff", "a" * 5000, "", "../../etc/passwd", "latest" + "~1" * 400, "best:", "best:x:y", "~",
            "step:", "step:" + "9" * 5000, "best:" + "_" * 300, "latest~999999999", "[/]", "%s%n", "..", "."]  # fmt: skip
    for word in wild:
        for words in (
            ("show", "--", word), ("tag", "--", word), ("tag", "--", word, "400"), ("untag", "--", word),
            ("note", "400", "--", word), ("record", "400", "--", f"{word}=1"), ("record", "400", "--", f"a={word}"),
            ("log", "--", word), ("verify", "--", word), ("pin", "--", word), ("checkout", "--", word, "copy"),
            ("prune", "--to-free", word), ("prune", "--keep-within", word), ("log", "-o", word), ("log", "--sort", word),
            ("log", "--best", word), ("resume", "--from", word), ("-C", word, "log"), (word,), ("verify", "--subset", word),
        ):  # fmt: skip
            code, _, err = call("-C", root, *words, cwd=root)
            assert code in EXITS and "Traceback" not in err, (words, err)
            assert code == 0 or "rror: " in err, (words, code, err)
    looked_at(root)


def test_hostile_notes_tags_and_metrics_on_disk(root: Path) -> None:
    first, second, third = records(root)
    (root / HIDDEN / "pins.json").write_text(json.dumps({first.id: [ESCAPES, "[/red]"], second.id: [ESCAPES]}))
    (root / HIDDEN / "notes.json").write_text(json.dumps({first.id: ESCAPES, third.id: "\ud800"}))
    metrics.record(root, third.id, 600, {ESCAPES: 1.0, "_" * 30_000: 2.0, "[/bold]": 3.0, "$(touch pwned)": 1.0})
    looked_at(root)
    env = {"COMP_WORDS": "lastgood show ", "COMP_CWORD": "2", "_LASTGOOD_COMPLETE": "bash_complete"}
    code, out, _ = cli.run(cwd=root, env=env)
    words = [line.partition(",")[2] for line in out.splitlines()]
    assert code == 0 and "600" in words and "best:eval_loss" in words
    assert not raw_controls(out) and not [word for word in words if set(word) & set(" $(;`\\")]


def fifos(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.stat().st_size:
            yield path


@pytest.mark.parametrize("kind", ["managed", "trainer_sharded", "lightning_run", "dcp_run"])
@pytest.mark.parametrize("thing", ["fifo", "socket", "directory", "link"])
def test_other_things_in_the_place_of_files(
    kind: str, thing: str, run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO without a writer blocks whoever opens it, for good: the alarm ends the test then."""
    import signal

    root = run_of(kind)
    outside = tmp_path / "outside"
    outside.mkdir()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for path in list(fifos(root)):
        aside = path.with_name("aside.tmp")
        path.rename(aside)
        if thing == "fifo":
            os.mkfifo(path)
        elif thing == "socket":
            monkeypatch.chdir(path.parent)
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        elif thing == "directory":
            path.mkdir()
        else:
            shutil.copyfile(aside, outside / "target")
            path.symlink_to(outside / "target")
        signal.alarm(20)
        looked_at(root, (("log", "--all"), ("show", "--args"), ("verify", "--full"), ("resume", "--check"), ("df",)))
        signal.alarm(0)
        path.rmdir() if thing == "directory" else path.unlink()
        aside.rename(path)


def test_links_in_the_place_of_checkpoints_lead_nowhere(root: Path, real: Callable[[str], Path]) -> None:
    outside = root.parent / "outside"
    (root / "checkpoint-700").symlink_to(outside / "checkpoint-600")
    (root / "checkpoint-800").symlink_to(outside)
    (root / HIDDEN / "undo").mkdir()
    (root / HIDDEN / "undo" / "00000009").symlink_to(outside)
    (root / HIDDEN / "trash").symlink_to(outside)
    said = looked_at(root)
    assert "700" not in said["log",][1] and "800" not in said["log",][1]
    for words in (("undo",), ("prune", "--keep-last", "1", "--yes"), ("strip", "200", "--yes"), ("adopt", "--yes")):
        assert call("-C", root, *words)[0] == 6, "what lies behind a link is not swept"
    (root / HIDDEN / "trash").unlink()
    assert call("-C", root, "undo")[0] == 3, "a linked directory is no operation"
    lightning = real("lightning_run")
    (outside / "checkpoints").mkdir()
    shutil.copyfile(lightning / "checkpoints" / "last.ckpt", outside / "checkpoints" / "leaked.ckpt")
    (lightning / "lightning_logs" / "version_7").symlink_to(outside)
    (lightning / "lightning_logs" / "version_8").mkdir()
    (lightning / "lightning_logs" / "version_8" / "checkpoints").symlink_to(outside / "checkpoints")
    (lightning / "checkpoints" / "link.ckpt").symlink_to(outside / "checkpoints" / "leaked.ckpt")
    looked_at(lightning)
    shutil.rmtree(outside / "checkpoints")
    os.utime(outside, ns=(1, 1))


def _header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


HEADERS = {
    "length of 2**63": struct.pack("<Q", 1 << 63) + b"{}",
    "length of 2**64-1": b"\xff" * 8 + b"{}",
    "length beyond": struct.pack("<Q", 5000) + b"{}",
    "length 0": bytes(8),
    "short": b"\x02",
    "deep": struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000,
    "long name": _header(
        json.dumps({"n" * 3_000_000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 9]}}).encode()
    ),
    "long shape": _header(
        json.dumps({"w": {"dtype": "F32", "shape": ["x" * 1_500_000], "data_offsets": [0, 4]}}).encode()
    ),
    "escapes": _header(
        json.dumps({ESCAPES: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    ) + b"abcd",
    "overflow": _header(
        json.dumps({"w": {"dtype": "F32", "shape": [2**40] * 60, "data_offsets": [0, 2**4000]}}).encode()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_safetensors(name: str, root: Path, real: Callable[[str], Path]) -> None:
    stock = real("trainer_full")
    (stock / "checkpoint-6" / "model.safetensors").write_bytes(HEADERS[name])
    said = looked_at(stock)
    assert said["verify", "--full"][0] == (0 if name == "escapes" else 1)
    (root / "checkpoint-600" / "model.safetensors").write_bytes(HEADERS[name])
    assert looked_at(root)["verify", "--full"][0] == 1
    code, _, err = call("-C", stock, "diff", "4", "6", "--values")
    assert code in EXITS and "Traceback" not in err
    code, _, err = call("-C", stock, "average", "4", "6", "-o", root.parent / "mean")
    assert code != 0 and "Traceback" not in err and not (root.parent / "mean").exists()


class Evil:
    """Unpickled, it would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def archive(path: Path, data: bytes, *, packed: bool = False, extra: dict[str, bytes] | None = None) -> None:
    """A file as torch.save writes it, around a pickle of our own."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
        for name, content in (extra or {}).items():
            file.writestr(f"archive/{name}", content)


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"(" * depth + b"l" * depth + b"."


def laughs(kind: bytes = b"\x86", depth: int = 60) -> bytes:
    """((((), ()), ((), ())), ...): a pair of the same pair of the same pair."""
    return b"\x80\x02)" + (b"2" + kind) * depth + b"."


def _global(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


LAUGHING_LIST = b"\x80\x02]" + b"".join(b"q\x00]h\x00ah\x00a" for _ in range(60)) + b"."
PICKLES = {
    "empty": b"",
    "stop": b".",
    "deep": nested(50_000),
    "laughs": laughs(),
    "laughs in a state": b"\x80\x02}X\x0a\x00\x00\x00state_dict}X\x01\x00\x00\x00a" + laughs()[2:-1] + b"ss.",
    "laughing lists": LAUGHING_LIST,
    "cycle": b"\x80\x02]q\x00h\x00a.",
    "cycle of dicts": b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s.",
    "memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "memo in text": b"Np4000000000\n.",
    "long string": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
    "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "long bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "long frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "digits": b"\x80\x02}X\x0b\x00\x00\x00global_step\x8b" + struct.pack("<I", 5000) + b"\x7f" * 5000 + b"sX\x0a\x00\x00\x00state_dict}s.",
    "many lists": b"\x80\x02(" + b"]" * 50_000 + b"l.",
    "class": b"\x80\x02" + _global("collections OrderedDict") + b".",
    "attributes of a class": b"\x80\x02" + _global("collections OrderedDict")
    + b"(N}X\x05\x00\x00\x00items" + _global("os system") + b"stb.",
    "rebuild of nothing": b"\x80\x02" + _global("torch._utils _rebuild_tensor_v2") + b")R.",
    "rebuild of text": b"\x80\x02" + _global("torch._utils _rebuild_tensor_v2") + b"(X\x01\x00\x00\x00aNNNNtR.",
    "parameter of nothing": b"\x80\x02" + _global("torch._utils _rebuild_parameter") + b")R.",
    "size of a number": b"\x80\x02" + _global("torch Size") + b"K\x05\x85R.",
    "persistent id": b"\x80\x02" + laughs()[2:-1] + b"Q.",
    "storage of a list": b"\x80\x02(X\x07\x00\x00\x00storageN]X\x03\x00\x00\x00cpuK\x01tQ.",
    "reduce of os": b"cos\nsystem\n(S'exit 3'\ntR.",
    "extension": b"\x80\x02\x82\x05.",
    "protocol 200": b"\x80\xc8N.",
    "getattr": b"\x80\x02" + _global("builtins getattr") + _global("os system") + b"X\x08\x00\x00\x00__call__\x86R.",
    "state of a node": b"\x80\x02" + _global("argparse Namespace") + b")\x81}X\x07\x00\x00\x00seconds" + laughs()[2:-1] + b"sb.",
}  # fmt: skip


def hostile_files(folder: Path, data: bytes) -> None:
    """The pickle in everything that might be unpickled."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
            archive(path, data)
        elif path.name == ".metadata":
            path.write_bytes(data)


PICKLED = ("trainer_full", "lightning_run", "dcp_run", "accelerate_run")


def test_nothing_that_is_pickled_is_executed(real: Callable[[str], Path], tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    evil = pickle.dumps({"state_dict": {"w": Evil(mark)}, "optimizer_states": [Evil(mark)], "global_step": 3}, 2)
    pickle.loads(evil)
    assert mark.exists(), "the weapon works"
    mark.unlink()
    for kind in PICKLED:
        root = real(kind)
        hostile_files(root, evil)
        looked_at(
            root, (*LOOKS, ("diff", "latest", "latest", "--values"), ("average", "2", "4", "-o", str(tmp_path / "a")))
        )
        for words in (
            ("adopt", "--yes"),
            ("checkout", "latest", str(tmp_path / "c")),
            ("prune", "--stock", "--keep-last", "1", "-y"),
        ):
            assert call("-C", root, *words)[0] in EXITS
        # A pickle without the archive around it, as torch wrote before 1.6.
        for path in root.rglob("*.pt"):
            path.write_bytes(evil)
        looked_at(root)
        assert not mark.exists(), kind


GROWING = """
import signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_cli_hostile import PICKLES, hostile_files, looked_at

root = Path(sys.argv[1])
for name, data in PICKLES.items():
    print(name, file=sys.stderr, flush=True)
    hostile_files(root, data)
    signal.alarm(20)
    looked_at(root, (("log",), ("show", "--args"), ("show", "--tensors"), ("verify", "--full"), ("resume",)))
# Not ru_maxrss, which counts what the process was before it became this one: a copy of the tests.
status = Path("/proc/self/status").read_text()
print(status.partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.parametrize("kind", PICKLED)
def test_pickles_that_grow(kind: str, real: Callable[[str], Path]) -> None:
    """In a process of its own, with 3 GiB of address space, and 20 seconds for each."""
    done = subprocess.run(
        [sys.executable, "-c", GROWING, real(kind), Path(__file__).parent],
        env=cli.environment(), capture_output=True, text=True, timeout=120, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 600 << 10, f"{int(done.stdout) >> 10} MiB"


def test_a_hostile_pickle_changes_nothing_for_the_next_file(tmp_path: Path) -> None:
    from lastgood.errors import CorruptCheckpoint
    from lastgood.format import inert

    with pytest.raises(CorruptCheckpoint):
        inert.loads(PICKLES["attributes of a class"], "x")
    from collections import OrderedDict

    assert dict(inert.loads(pickle.dumps(OrderedDict(a=1), 2), "x").items()) == {"a": 1}


def test_zip_bombs(real: Callable[[str], Path]) -> None:
    root = real("lightning_run")
    bomb = root / "checkpoints" / "bomb.ckpt"
    archive(bomb, b"\x80\x02}." + bytes(64 << 20), packed=True)
    looked_at(root)
    zeros = io.BytesIO()
    with (
        zipfile.ZipFile(zeros, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("archive/data/0", "w", force_zip64=True) as member,
    ):
        for _ in range(300):
            member.write(bytes(1 << 20))
    bomb.write_bytes(zeros.getvalue())
    code, out, _ = call("-C", root, "verify", "--full")
    assert code == 1 and "compressed" in out
    # The same stretch under a thousand names: nothing is compressed, and still it is a bomb.
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        file.writestr("archive/data/0", bytes(1 << 20))
        info = file.filelist[-1]
        for number in range(1, 1000):
            import copy

            other = copy.copy(info)
            other.filename = f"archive/data/{number}"
            file.filelist.append(other)
    bomb.write_bytes(stored.getvalue())
    code, out, _ = call("-C", root, "verify", "--full")
    assert code == 1 and "more bytes than the file" in out


def index(file: str, offset: Any, length: Any) -> bytes:
    """A `.metadata` of torch.distributed, that points where we want."""
    names = {"_StorageInfo": ["relative_path", "offset", "length"], "MetadataIndex": ["fqn", "offset", "index"]}
    import types

    module = types.ModuleType("torch_like")
    kinds = {name: type(name, (), {"__module__": "torch_like", "__qualname__": name}) for name in (*names, "Metadata")}
    module.__dict__.update(kinds)
    sys.modules["torch_like"] = module
    try:
        info, place, whole = kinds["_StorageInfo"](), kinds["MetadataIndex"](), kinds["Metadata"]()
        info.__dict__.update(relative_path=file, offset=offset, length=length)
        place.__dict__.update(fqn="model.w", offset=None, index=0)
        whole.__dict__.update(
            state_dict_metadata={}, storage_data={place: info}, planner_data={"model.w": ("model", "w")}
        )
        return pickle.dumps(whole, 2)
    finally:
        del sys.modules["torch_like"]


@pytest.mark.parametrize(
    ("file", "offset", "length"),
    [
        (f"../../outside/{CANARY}", 0, 5), ("/etc/passwd", 0, 5), ("__0_0.distcp", -1, 5), ("__0_0.distcp", 0, -5),
        ("__0_0.distcp", 1 << 70, 5), ("__0_0.distcp", 0, 10**5000), ("__0_0.distcp", -(10**5000), 1), ("", 0, 0),
        ("__0_0.distcp", 1 << 61, 1 << 61), (f"link/{CANARY}", 0, 5), ("a\0b", 0, 1), ("__0_0.distcp", None, "5"),
        ("..", 0, 1), (ESCAPES, 0, 1), (b"bytes", 0, 1), ("a" * 100_000, 0, 1),
    ],
    ids=range(16),
)  # fmt: skip
def test_an_index_that_points_elsewhere(
    file: Any, offset: Any, length: Any, root: Path, real: Callable[[str], Path]
) -> None:
    run = real("dcp_run")
    shutil.move(run, root.parent / "dcp")
    run = root.parent / "dcp"
    (run / "step-4" / "link").symlink_to(root.parent / "outside")
    (run / "step-4" / ".metadata").write_bytes(index(file, offset, length))
    said = looked_at(run)
    assert said["verify", "--full"][0] == 1
    assert "step-2" in said["resume", "--check"][1]


VERBS = (("log",), ("show", "--args"), ("verify", "--full"), ("resume",))


def small(cache: Path, base: Path) -> tuple[tuple[Path, Path], ...]:
    """(run, file) of every file in one checkpoint of each kind."""
    found = []
    for kind in ("trainer_full", "lightning_run", "dcp_run", "trainer_peft"):
        root = realruns.make(kind, base / kind, cache)
        keep = {"trainer_full": "checkpoint-6", "trainer_peft": "checkpoint-6", "dcp_run": "step-4"}.get(kind)
        for path in list(root.iterdir()):
            if keep is not None and path.name != keep:
                shutil.rmtree(path)
        found += [(root, path) for path in sorted(root.rglob("*")) if path.is_file()]
    return tuple(found)


@pytest.fixture(scope="module")
def smalls(realruns_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Path, Path], ...]:
    return small(realruns_cache, tmp_path_factory.mktemp("small"))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage_never_ends_in_a_traceback(data: st.DataObject, smalls: tuple[tuple[Path, Path], ...]) -> None:
    root, path = data.draw(st.sampled_from(smalls))
    before = path.read_bytes()
    size = len(before)
    kind = data.draw(st.sampled_from(["flip", "cut", "bytes", "zeros"]))
    # Headers and directories of archives, which steer the readers, lie at the ends.
    near = st.integers(0, min(400, size - 1))
    place = data.draw(st.one_of(near, near.map(lambda n: size - 1 - n), st.integers(0, size - 1)))
    after = bytearray(before)
    if kind == "flip":
        after[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del after[place:]
    else:
        new = bytes(16) if kind == "zeros" else data.draw(st.binary(min_size=1, max_size=16))
        after[place : place + len(new)] = new
    try:
        path.write_bytes(after)
        for words in VERBS:
            code, out, err = call("-C", root, *words)
            assert code in EXITS and "Traceback" not in err, (path.name, kind, place, words, err)
            assert not raw_controls(out + err)
    finally:
        path.write_bytes(before)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_flip_in_a_managed_checkpoint_is_found(data: st.DataObject, one: Path) -> None:
    root = one
    files = sorted(path for path in (root / "checkpoint-600").rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    before = path.read_bytes()
    cli.flip(path, data.draw(st.integers(0, len(before) - 1)))
    try:
        code, out, err = call("-C", root, "verify", "--full")
        assert code == 1 and "checkpoint-600  DAMAGED" in out and "1 of 3" in err, (path.name, out)
        code, out, _ = call("-C", root, "resume", "--check", "--print-path")
        assert (code, out.strip()) == (0, str(root / "checkpoint-400"))
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli.managed(tmp_path_factory.mktemp("flips") / "run")


def test_two_tools_in_one_directory(real: Callable[[str], Path]) -> None:
    """Whatever lies together, listing goes on."""
    for first in ("fsdp_trainer", "deepspeed_layout", "trainer_full", "dcp_run", "accelerate_run"):
        root = real(first)
        shutil.copytree(real("lightning_run"), root, dirs_exist_ok=True)
        before = snapshot(root)
        looked_at(root)
        assert snapshot(root) == before

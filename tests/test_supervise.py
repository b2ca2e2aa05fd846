"""Real commands that crash, are preempted or hang, and real signals to the process that supervises them."""

from __future__ import annotations

import os
import pty
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastgood.errors import LastgoodError, NotSupported, UsageError
from lastgood.supervise import PLACE, Limits, described, fill, supervise

import forked

FAST = Limits(restarts=2, backoff=0.01, backoff_max=0.05, grace=30)
ENDLESS = "mark('ready')\nwhile True: time.sleep(0.05)"
PARTS = st.sampled_from(["python", "train.py", "-", "--", "-r", "--resume", PLACE, f"--resume={PLACE}", "{{x}}", "{}"])


def script(where: Path, body: str) -> list[str]:
    """A command: `launches` counts its launches, step(n) completes a step, mark(name) leaves a file."""
    start = """
        import os, pathlib, signal, subprocess, sys, time
        where = pathlib.Path(sys.argv[1])
        def step(number): (where / f"step-{number}").touch()
        def mark(name, text=""):
            (where / (name + ".new")).write_text(str(text))
            os.replace(where / (name + ".new"), where / name)
        launches = len(list(where.glob("launched-*"))) + 1
        mark(f"launched-{launches}", os.getpid())
        """
    return [sys.executable, "-I", "-S", "-c", textwrap.dedent(start) + textwrap.dedent(body), os.fspath(where)]


def newest(where: Path) -> int:
    return max((int(path.name[5:]) for path in where.glob("step-*")), default=-1)


def go(where: Path, command: list[str], limits: Limits = FAST, **options: Any) -> None:
    """Supervise in this process and leave with its status."""
    hooks: dict[str, Any] = {"choose": lambda: None, "tidy": lambda ended: None} | options
    raise SystemExit(supervise(command, progress=lambda: newest(where), limits=limits, **hooks))


def supervised(where: Path, body: str, limits: Limits = FAST, **options: Any) -> int:
    return forked.run(go, where, script(where, body), limits, log=where / "log", timeout=60, **options)


def start(where: Path, body: str, limits: Limits = FAST, **options: Any) -> int:
    return forked.start(go, where, script(where, body), limits, log=where / "log", **options)


def launches(where: Path) -> int:
    return len(list(where.glob("launched-*")))


def until(what: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it didn't happen"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Ended: a zombie counts, the first process of a container may never reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def pid_in(path: Path) -> int:
    until(path.exists)
    return int(path.read_text())


@given(st.lists(PARTS, max_size=8), st.sampled_from([None, Path("/runs/a b/checkpoint-4")]))
def test_fill(command: list[str], checkpoint: Path | None) -> None:
    filled = fill(command, checkpoint)
    if checkpoint is not None:
        assert filled == [part.replace(PLACE, str(checkpoint)) for part in command]
        return
    kept = [
        part
        for part, following in zip(command, [*command, ""][1:], strict=True)
        if PLACE not in part and not (following == PLACE and part in ("-r", "--resume"))
    ]
    assert filled == kept


@pytest.mark.parametrize(
    ("command", "left"),
    [
        (["t", "--resume_from_checkpoint", PLACE, "--x"], ["t", "--x"]),
        (["t", f"--resume_from_checkpoint={PLACE}", "--x"], ["t", "--x"]),
        (["t", PLACE, "{{a}}", "{b}"], ["t", "{{a}}", "{b}"]),
        (["t", "-o", f"{PLACE}/file"], ["t", "-o"]),
        (["t", "-r", PLACE, PLACE], ["t"]),
    ],
)
def test_an_argument_without_checkpoint_vanishes_with_its_option(command: list[str], left: list[str]) -> None:
    assert fill(command, None) == left


def test_words_for_a_status() -> None:
    assert described(3) == "status 3"
    assert described(-9) == "killed by signal 9 (SIGKILL: perhaps out of memory)"
    assert described(137) == "status 137 (SIGKILL: perhaps out of memory)"
    assert described(143) == "status 143 (SIGTERM)"
    assert described(255) == "status 255"


def test_wrong_calls(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="restarts"):
        Limits(restarts=-1)
    with pytest.raises(UsageError, match="no command"):
        go(tmp_path, [])
    raised: list[BaseException] = []

    def elsewhere() -> None:
        try:
            go(tmp_path, ["true"])
        except NotSupported as error:
            raised.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])


def test_a_crash_is_followed_by_a_launch_from_the_checkpoint(tmp_path: Path) -> None:
    body = """
        mark(f"seen-{launches}", [sys.argv[2:], os.environ["LASTGOOD_RESUME"], os.environ["LASTGOOD_RESTARTS"]])
        step(launches)
        if launches == 1: os.kill(os.getpid(), signal.SIGKILL)
        """
    command = [*script(tmp_path, body), "--resume", PLACE, f"--also={PLACE}", "--x"]
    there = tmp_path / "checkpoint-1"
    choose = lambda: there if newest(tmp_path) > 0 else None  # noqa: E731
    log = tmp_path / "log"
    assert forked.run(go, tmp_path, command, log=log, choose=choose) == 0
    assert (tmp_path / "seen-1").read_text() == str([["--x"], "", "0"])
    assert (tmp_path / "seen-2").read_text() == str(
        [["--resume", str(there), f"--also={there}", "--x"], str(there), "1"]
    )
    said = log.read_text()
    assert "launch 1 from the beginning" in said and "launch 2 from checkpoint-1" in said
    assert "killed by signal 9 (SIGKILL: perhaps out of memory)" in said and "2 launches" in said


def test_crashes_without_progress_reach_the_limit(tmp_path: Path) -> None:
    assert supervised(tmp_path, "sys.exit(3)") == 3
    assert launches(tmp_path) == 3  # the first and two restarts
    said = (tmp_path / "log").read_text()
    assert "(crash 2 of 2 without progress); again in 0.02 s" in said
    assert "crash 3 in a row without progress, no more restarts" in said


def test_a_signal_that_kills_becomes_a_status(tmp_path: Path) -> None:
    assert supervised(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", Limits(restarts=0)) == 137
    assert launches(tmp_path) == 1


def test_progress_resets_the_count(tmp_path: Path) -> None:
    assert supervised(tmp_path, "if launches in (2, 4): step(launches)\nsys.exit(1)") == 1
    # The first crash counts 1; after a step in the fourth launch it takes three more.
    assert launches(tmp_path) == 7


@pytest.mark.parametrize("how", ["sys.exit(75)", "sys.exit(143)", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_preemptions_are_no_crashes_and_need_no_wait(tmp_path: Path, how: str) -> None:
    limits = Limits(restarts=0, backoff=1000, backoff_max=1000)
    assert supervised(tmp_path, f"if launches < 4: {how}", limits) == 0
    assert launches(tmp_path) == 4


def test_preemptions_can_be_limited(tmp_path: Path) -> None:
    assert supervised(tmp_path, "sys.exit(75)", Limits(preemptions=1)) == 75
    assert launches(tmp_path) == 2


def test_a_wrong_command_line_is_not_tried_again(tmp_path: Path) -> None:
    assert supervised(tmp_path, "sys.exit(2)") == 2
    assert launches(tmp_path) == 1


def test_status_2_after_progress_is_a_crash(tmp_path: Path) -> None:
    assert supervised(tmp_path, "step(1)\nif launches == 1: sys.exit(2)") == 0
    assert launches(tmp_path) == 2


def test_what_can_not_be_executed_is_not_tried_again(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("text")
    log = tmp_path / "log"
    assert forked.run(go, tmp_path, ["no-such-command-anywhere"], log=log) == 127
    assert forked.run(go, tmp_path, [str(plain)], log=log) == 126
    plain.chmod(0o755)
    assert forked.run(go, tmp_path, [str(plain)], log=log) == 126  # no program
    assert forked.run(go, tmp_path, ["sh", "-c", "no-such-command-anywhere"], log=log) == 127
    said = log.read_text()
    assert "no-such-command-anywhere can't be launched: No such file or directory" in said
    assert said.count("not tried again") == 4


SAVES = """
def save(number, frame):
    step(7)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
"""


def test_a_request_to_stop_reaches_the_command(tmp_path: Path) -> None:
    pid = start(tmp_path, SAVES + ENDLESS)
    until((tmp_path / "ready").exists)
    os.kill(pid, signal.SIGTERM)
    assert forked.wait(pid) == 75
    assert newest(tmp_path) == 7 and launches(tmp_path) == 1
    assert "stopped by SIGTERM; the command ended with status 75" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_command_that_just_dies_of_the_signal(tmp_path: Path, number: int, status: int) -> None:
    pid = start(tmp_path, f"signal.signal({int(number)}, signal.SIG_DFL)\n" + ENDLESS)
    until((tmp_path / "ready").exists)
    os.kill(pid, number)
    assert forked.wait(pid) == status
    assert launches(tmp_path) == 1


def test_other_signals_are_passed_on(tmp_path: Path) -> None:
    body = """
        signal.signal(signal.SIGUSR1, lambda *_: mark("usr1"))
        signal.signal(signal.SIGUSR2, lambda *_: mark("usr2"))
        mark("ready")
        while not ((where / "usr1").exists() and (where / "usr2").exists()): time.sleep(0.02)
        """
    pid = start(tmp_path, body)
    until((tmp_path / "ready").exists)
    os.kill(pid, signal.SIGUSR1)
    os.kill(pid, signal.SIGUSR2)
    assert forked.wait(pid) == 0


def test_a_deaf_command_is_killed_after_the_grace(tmp_path: Path) -> None:
    pid = start(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ENDLESS, Limits(grace=0.5))
    until((tmp_path / "ready").exists)
    os.kill(pid, signal.SIGTERM)
    assert forked.wait(pid) == 143
    assert gone(pid_in(tmp_path / "launched-1"))
    assert "still running 0.5 s after the request to stop: killed" in (tmp_path / "log").read_text()


def test_a_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    body = "signal.signal(signal.SIGINT, lambda *_: mark('heard'))\n" + ENDLESS
    pid = start(tmp_path, body, Limits(grace=1000))
    until((tmp_path / "ready").exists)
    os.kill(pid, signal.SIGINT)
    until((tmp_path / "heard").exists)
    os.kill(pid, signal.SIGINT)
    assert forked.wait(pid) == 130


def test_an_interrupt_of_the_foreground_group_reaches_the_command_once(tmp_path: Path) -> None:
    body = """
        heard = []
        signal.signal(signal.SIGINT, lambda *_: heard.append(1))
        mark("ready")
        while not heard: time.sleep(0.01)
        time.sleep(0.5)
        mark("count", len(heard))
        """

    def foreground() -> None:
        os.setpgid(0, 0)
        go(tmp_path, script(tmp_path, body))

    pid = forked.start(foreground, log=tmp_path / "log")
    until((tmp_path / "ready").exists)
    os.killpg(pid, signal.SIGINT)
    assert forked.wait(pid) == 130
    assert (tmp_path / "count").read_text() == "1"


def test_ctrl_c_and_input_at_a_terminal(tmp_path: Path) -> None:
    body = """
        mark("line", input())
        heard = []
        signal.signal(signal.SIGINT, lambda *_: heard.append(1))
        mark("ready")
        while not heard: time.sleep(0.01)
        time.sleep(0.2)
        mark("count", len(heard))
        """
    pid, terminal = pty.fork()
    if not pid:
        status = 1
        try:
            status = supervise(
                script(tmp_path, body), choose=lambda: None, progress=lambda: -1, tidy=lambda ended: None, limits=FAST
            )
        finally:
            os._exit(status)
    try:
        until((tmp_path / "launched-1").exists)
        os.write(terminal, b"hello\n")
        until((tmp_path / "ready").exists)
        os.write(terminal, b"\x03")
        assert forked.wait(pid) == 130
    finally:
        os.close(terminal)
    assert (tmp_path / "line").read_text() == "hello"
    assert (tmp_path / "count").read_text() == "1"


def test_input_that_is_no_terminal_is_not_passed_on(tmp_path: Path) -> None:
    assert supervised(tmp_path, "mark('input', repr(sys.stdin.read()))") == 0
    assert (tmp_path / "input").read_text() == "''"


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        go(tmp_path, script(tmp_path, "mark('ignored', signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)\n" + ENDLESS))

    pid = forked.start(nohup, log=tmp_path / "log")
    until((tmp_path / "ready").exists)
    os.kill(pid, signal.SIGHUP)
    os.kill(pid, signal.SIGTERM)
    assert forked.wait(pid) == 143
    assert (tmp_path / "ignored").read_text() == "True"


# A launcher that starts the training as its child, as `accelerate launch` does, and dies of SIGTERM.
LAUNCHER = """
inner = '''
import os, pathlib, signal, sys, time
where = pathlib.Path(sys.argv[1])
def saved(number, frame):
    time.sleep(0.3)
    (where / "saved").touch()
    os._exit(75)
signal.signal(signal.SIGTERM, REACTION)
(where / "pid.new").write_text(str(os.getpid()))
os.replace(where / "pid.new", where / "pid")
while True: time.sleep(0.05)
'''
process = subprocess.Popen([sys.executable, "-I", "-S", "-c", inner, str(where)])
while not (where / "pid").exists(): time.sleep(0.01)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc who runs")
@pytest.mark.parametrize("reaction", ["saved", "signal.SIG_IGN"])
def test_the_command_does_not_outlive_a_killed_supervisor(tmp_path: Path, reaction: str) -> None:
    grace = 30 if reaction == "saved" else 0.5
    pid = start(tmp_path, LAUNCHER.replace("REACTION", reaction) + "process.wait()", Limits(grace=grace))
    inner = pid_in(tmp_path / "pid")
    os.kill(pid, signal.SIGKILL)
    assert forked.wait(pid) == -9
    until(lambda: gone(inner) and gone(pid_in(tmp_path / "launched-1")))
    assert (tmp_path / "saved").exists() == (reaction == "saved")


def test_a_request_to_stop_waits_for_what_a_launcher_leaves(tmp_path: Path) -> None:
    pid = start(tmp_path, LAUNCHER.replace("REACTION", "saved") + "process.wait()")
    inner = pid_in(tmp_path / "pid")
    os.kill(pid, signal.SIGTERM)
    assert forked.wait(pid) == 143
    assert gone(inner) and (tmp_path / "saved").exists()


def test_what_a_crashed_command_leaves_is_ended_before_the_next_launch(tmp_path: Path) -> None:
    body = """
        if launches == 2:
            mark("saved-first", (where / "saved").exists())
            sys.exit(0)
        """
    body = textwrap.dedent(body) + LAUNCHER.replace("REACTION", "saved") + "sys.exit(1)"
    assert supervised(tmp_path, body) == 0
    assert (tmp_path / "saved-first").read_text() == "True"


def test_deaf_processes_of_the_group_are_killed_too(tmp_path: Path) -> None:
    body = LAUNCHER.replace("REACTION", "signal.SIG_IGN") + "sys.exit(1)"
    assert supervised(tmp_path, body, Limits(restarts=0, grace=0.3)) == 1
    assert gone(pid_in(tmp_path / "pid"))


def test_a_stop_ends_the_wait_between_launches(tmp_path: Path) -> None:
    pid = start(tmp_path, "sys.exit(1)", Limits(backoff=1000, backoff_max=1000))
    until(lambda: "again in 1000 s" in (tmp_path / "log").read_text() if (tmp_path / "log").exists() else False)
    os.kill(pid, signal.SIGTERM)
    assert forked.wait(pid, 30) == 143
    assert launches(tmp_path) == 1


def test_a_stop_while_choosing_launches_nothing(tmp_path: Path) -> None:
    def choose() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    assert supervised(tmp_path, "", choose=choose) == 143
    assert launches(tmp_path) == 0


def test_tidying_up(tmp_path: Path) -> None:
    calls = tmp_path / "calls"

    def tidy(ended: bool) -> None:
        with calls.open("a") as file:
            file.write("E" if ended else ".")
        raise (LastgoodError if ended else OSError)("a reason")

    body = """
        if launches == 1: sys.exit(1)
        while (where / "calls").read_text().rpartition("E")[2].count(".") < 3: time.sleep(0.01)
        """
    assert supervised(tmp_path, body, tidy=tidy, poll=0.02) == 0
    made = calls.read_text()
    assert made.count("E") == 2 and made.endswith("E") and "E..." in made
    assert (tmp_path / "log").read_text().count("tidying up failed") == 2  # once each message


def test_an_unexpected_error_leaves_nothing_running(tmp_path: Path) -> None:
    def tidy(ended: bool) -> None:
        until((tmp_path / "ready").exists)
        raise TypeError("a mistake")

    assert supervised(tmp_path, ENDLESS, tidy=tidy, poll=0.01) == 1
    assert gone(pid_in(tmp_path / "launched-1"))
    assert "TypeError: a mistake" in (tmp_path / "log").read_text()


def test_handlers_come_back(tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(SystemExit) as left:
        go(tmp_path, script(tmp_path, "sys.exit(0)"))
    assert left.value.code == 0
    assert [signal.getsignal(number) for number in numbers] == before

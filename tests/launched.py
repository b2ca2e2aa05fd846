"""A command that is a real process with its own environment and output, without paying for the imports again."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import forked

CLIENT = """
import json, os, signal, socket, sys
line = socket.socket(socket.AF_UNIX)
line.connect(sys.argv[1])
signal.signal(signal.SIGTERM, lambda number, frame: line.send(b"T"))
given = {k: v for k, v in os.environ.items() if k.startswith(("LASTGOOD_", "WANDB_"))}
socket.send_fds(line, [json.dumps([sys.argv[2:], given]).encode()], [1, 2])
told = line.recv(16)
os._exit(int(told) if told else 1)
"""


@contextmanager
def command(function: Callable[[list[str]], None], where: Path) -> Iterator[list[str]]:
    """The beginning of a command line whose further arguments `function` gets. It ends when its process is ended."""
    client, address = where / "client.py", str(where / "s")
    client.write_text(CLIENT)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        pid = forked.start(_serve, server, function, log=where / "server.log")
        try:
            yield [sys.executable, "-S", str(client), address]
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _serve(server: socket.socket, function: Callable[[list[str]], None]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for these
    while True:
        line, _ = server.accept()
        if os.fork() == 0:
            _answer(line, function)
        line.close()


def _answer(line: socket.socket, function: Callable[[list[str]], None]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, handles, _, _ = socket.recv_fds(line, 1 << 16, 2)
    arguments, environment = json.loads(data)
    for number, handle in enumerate(handles, 1):
        os.dup2(handle, number)
    os.environ.update(environment)
    threading.Thread(target=_leave_with, args=(line,), daemon=True).start()
    status = 1
    try:
        function(arguments)
        status = 0
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    line.send(str(status).encode())
    os._exit(status)


def _leave_with(line: socket.socket) -> None:
    while line.recv(1):
        os.kill(os.getpid(), signal.SIGTERM)  # passed on
    os._exit(1)

"""What lastgood tells the person in front of the terminal: one logger, lines that begin with `lastgood:`.

LASTGOOD_LOG sets the level (DEBUG, INFO, WARNING, ERROR; INFO if unset). A program that
configures logging itself gets the records through the logger `lastgood` and nothing twice.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, TextIO

_logger = logging.getLogger("lastgood")


if TYPE_CHECKING:
    _Handler = logging.StreamHandler[TextIO]
else:
    _Handler = logging.StreamHandler  # not subscriptable before Python 3.11


class _Stderr(_Handler):
    """Writes to whatever sys.stderr is at that moment: notebooks and test runners replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _prepare() -> None:
    if _logger.level == logging.NOTSET:
        level = os.environ.get("LASTGOOD_LOG", "INFO").upper()
        _logger.setLevel(level if level in ("DEBUG", "INFO", "WARNING", "ERROR") else "INFO")
    if not _logger.handlers and not logging.getLogger().handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("lastgood: %(message)s"))
        _logger.addHandler(handler)


def say(message: str) -> None:
    """News: what was resumed, what was decided."""
    _prepare()
    for line in message.splitlines():
        _logger.info(line)


def note(message: str) -> None:
    """What only somebody who looks for a fault wants to know."""
    _prepare()
    for line in message.splitlines():
        _logger.debug(line)


def warn(message: str) -> None:
    """Something to act on."""
    _prepare()
    for line in message.splitlines():
        _logger.warning(line)

"""A metric that is reckoned from others: "0.5*mmlu + 0.5*gsm8k". Pure, and nothing is ever given to eval.

    sum     = product { ("+" | "-") product }
    product = factor { ("*" | "/") factor }
    factor  = ("+" | "-") factor | number | name | name "(" sum { "," sum } ")" | "(" sum ")"

A name is a metric's: letters, digits and _ . / @ - inside. So `a-b` and `train/loss` are names, and a minus or a
division behind a name needs a space before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache

import msgspec

from lastgood.errors import UsageError

LONGEST = 200
"""Characters in a formula."""
DEEPEST = 20
"""Brackets and signs inside one another."""

FUNCTIONS: dict[str, tuple[Callable[..., float], int, int]] = {
    "min": (lambda *values: min(values), 1, 50),
    "max": (lambda *values: max(values), 1, 50),
    "abs": (abs, 1, 1),
    "log": (math.log, 1, 1),
}
"""name -> (function, fewest arguments, most arguments); log is the natural one."""

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))|(?P<name>[A-Za-z_](?:[\w.@]|[-/](?=\w))*)"
    r"|(?P<sign>[-+*/(),]))",
    re.ASCII,
)
_MEANT = re.compile(r"[*+]|\s[-/]|[-/]\s|^-|[-/]\(|\)[-/]")
"""What a metric's own name hardly has: where it occurs, a text that makes no sense is a formula with a slip in it."""

Lookup = Callable[[str], "float | None"]
Node = Callable[[Lookup], float]


class Formula(msgspec.Struct, frozen=True):
    """names: of the metrics in it, each once, in order."""

    text: str
    names: tuple[str, ...]
    node: Node

    def value(self, lookup: Lookup) -> float | None:
        """Its value for these metrics; None where one is missing, or where it has none (1/0, log(0), too large)."""
        try:
            value = self.node(lookup)
        except (_Missing, ArithmeticError, ValueError):
            return None
        return value if math.isfinite(value) else None


class _Missing(Exception):
    pass


@lru_cache(maxsize=256)
def parse(text: str) -> Formula | None:
    """The formula; None for what is the name of one metric. Raises UsageError for a formula with a slip in it."""
    if not _MEANT.search(text) and "(" not in text:
        return None  # a name, whatever characters it has
    try:
        parser = _Parser(text)
        node = parser.whole()
    except _Slip as slip:
        if not _MEANT.search(text):
            return None  # f1(macro)
        raise UsageError(
            f"{text[:60]!r} is no formula: {slip}",
            hint="metrics and numbers with + - * / ( ) min max abs log; a space before - and / behind a name",
        ) from None
    if not parser.names:
        raise UsageError(f"{text[:60]!r} has no metric in it", hint="for instance 0.5*mmlu + 0.5*gsm8k")
    return Formula(text, tuple(parser.names), node)


class _Slip(Exception):
    pass


class _Parser:
    """By recursive descent; the tree is of closures."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise _Slip(f"{len(text)} characters, more than {LONGEST}")
        self.tokens: list[tuple[str, str]] = []
        self.names: dict[str, None] = {}
        self.at = self.depth = 0
        end = len(text.rstrip())
        place = 0
        while place < end:
            match = _TOKEN.match(text, place)
            if match is None:
                raise _Slip(f"{text[place:].strip()[:10]!r} at character {place + 1}")
            kind = str(match.lastgroup)
            self.tokens.append((kind, match[kind]))
            place = match.end()

    def whole(self) -> Node:
        node = self._sum()
        if self.at < len(self.tokens):
            raise _Slip(f"{self.tokens[self.at][1]!r} is not expected there")
        return node

    def _next(self, *signs: str) -> str | None:
        """The next token, if it is one of these signs."""
        if self.at < len(self.tokens) and self.tokens[self.at] in [("sign", sign) for sign in signs]:
            self.at += 1
            return self.tokens[self.at - 1][1]
        return None

    def _sum(self) -> Node:
        node = self._product()
        while sign := self._next("+", "-"):
            node = _add(node, self._product()) if sign == "+" else _subtract(node, self._product())
        return node

    def _product(self) -> Node:
        node = self._factor()
        while sign := self._next("*", "/"):
            node = _multiply(node, self._factor()) if sign == "*" else _divide(node, self._factor())
        return node

    def _factor(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise _Slip(f"more than {DEEPEST} brackets or signs inside one another")
        node = self._atom()
        self.depth -= 1
        return node

    def _atom(self) -> Node:
        if sign := self._next("+", "-"):
            inner = self._factor()
            return inner if sign == "+" else lambda lookup: -inner(lookup)
        if self._next("("):
            return self._closed(self._sum())
        if self.at == len(self.tokens):
            raise _Slip("something is missing at the end")
        kind, word = self.tokens[self.at]
        self.at += 1
        if kind == "number":
            number = float(word)
            return lambda _: number
        if kind != "name":
            raise _Slip(f"{word!r} is not expected there")
        return self._call(word) if self._next("(") else self._metric(word)

    def _metric(self, name: str) -> Node:
        self.names[name] = None

        def node(lookup: Lookup) -> float:
            value = lookup(name)
            if value is None:
                raise _Missing
            return value

        return node

    def _call(self, name: str) -> Node:
        if name not in FUNCTIONS:
            raise _Slip(f"there is no function {name!r}")
        function, fewest, most = FUNCTIONS[name]
        arguments = [self._sum()]
        while self._next(","):
            arguments.append(self._sum())
        if not fewest <= len(arguments) <= most:
            raise _Slip(f"{name}() takes {fewest} value{'s' if fewest > 1 else ''}, not {len(arguments)}")
        return self._closed(lambda lookup: float(function(*(node(lookup) for node in arguments))))

    def _closed(self, node: Node) -> Node:
        if not self._next(")"):
            raise _Slip("a bracket isn't closed")
        return node


def _add(left: Node, right: Node) -> Node:
    return lambda lookup: left(lookup) + right(lookup)


def _subtract(left: Node, right: Node) -> Node:
    return lambda lookup: left(lookup) - right(lookup)


def _multiply(left: Node, right: Node) -> Node:
    return lambda lookup: left(lookup) * right(lookup)


def _divide(left: Node, right: Node) -> Node:
    return lambda lookup: left(lookup) / right(lookup)

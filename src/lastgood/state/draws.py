"""Which random states a replay wouldn't come to by itself.

Loading the same batches again, from the state that the epoch began with, draws the same numbers, unless training drew
from the same generator in between. The states before such draws are kept: a replay sets them where they belong.
"""

from __future__ import annotations

from lastgood.state import rng
from lastgood.state.rng import Rng

MOST = 500
"""States that are kept in one epoch: 13 KB each in a checkpoint."""


class Draws:
    """Follows the draws of one epoch, told before and after each of them.

    known: ordinal (from 1) -> the state before that draw; lost: generators ("torch") of which more states would have
    to be known than are kept, so that a replay isn't exact.
    """

    def __init__(self, last: Rng, known: dict[int, Rng] | None = None, lost: frozenset[str] = frozenset()) -> None:
        self.known = {} if known is None else dict(known)
        self.lost = lost
        self._last = self._before = last  # the state that a replay would be in
        self._stale: set[str] = set()

    def before(self) -> None:
        """A draw begins."""
        self._before = rng.capture()
        self._stale |= rng.differing(self._last, self._before)

    def after(self, ordinal: int) -> None:
        """It is over."""
        self._last = rng.capture()
        drawn = rng.differing(self._before, self._last) & self._stale if self._stale else set()
        if not drawn:
            return
        if len(self.known) < MOST:
            self.known[ordinal] = self._before
            self._stale = set()
        else:
            self.lost = self.lost | drawn

    def replay(self, ordinal: int) -> None:
        """Draw number `ordinal` is about to be repeated."""
        if ordinal in self.known:
            rng.restore(self.known[ordinal])

    def replayed(self) -> None:
        """All were repeated: the generators are where a replay leaves them."""
        self._last = rng.capture()
        self._stale = set()

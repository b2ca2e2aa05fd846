"""A user's own loader, made to tell a course of its iterations: its class is changed to a subclass, in place.

Nothing global is changed: another loader of the same class is as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from lastgood.errors import NotSupported
from lastgood.state.way import REWRITE

COURSE = "_lastgood_course"
"""The attribute of a followed loader that holds its course."""

Role = Callable[[Any], type[Any]]
"""Makes a subclass that tells a course of something."""


# A class whose first base isn't the loader's own can't become the class of that loader: so no mixins.


def _followed(cls: Any) -> type[Any]:
    class Followed(cls):  # type: ignore[misc]
        """What the loop iterates."""

        def __iter__(self) -> Any:
            original, course = super().__iter__, of(self)
            return original() if course is None else course.begin(original)

    return Followed


def _fetching(cls: Any) -> type[Any]:
    class Fetching(cls):  # type: ignore[misc]
        """What makes the batches: the same loader, or the torch loader inside one of Accelerate's."""

        def __iter__(self) -> Any:
            original, course = super().__iter__, of(self)
            return original() if course is None else course.fetches(self, original)

    return Fetching


def _indexed(cls: Any) -> type[Any]:
    class Indexed(cls):  # type: ignore[misc]
        """A torch loader, whose sampler may be followed as well."""

        @property
        def _index_sampler(self) -> Any:
            sampler, course = super()._index_sampler, of(self)
            return sampler if course is None else course.order(sampler)

        def _get_iterator(self) -> Any:
            original, course = super()._get_iterator, of(self)
            turn = 0 if course is None else course.turn(self.num_workers)
            own = getattr(original, "__func__", None) is not DataLoader._get_iterator
            return original() if own or not turn else Turned(self, turn)

    return Indexed


class Turned(_MultiProcessingDataLoaderIter):
    """Begins with another worker than the first: each batch comes from the worker that it came from before."""

    def __init__(self, loader: Any, turn: int) -> None:
        self._turn = turn
        super().__init__(loader)

    def _try_put_index(self) -> None:
        turn, self._turn = self._turn, 0
        for _ in range(turn):
            next(self._worker_queue_idx_cycle)
        super()._try_put_index()


def of(loader: Any) -> Any:
    """Its course; None if it has none, or is a copy of a loader that has one."""
    whose, course = getattr(loader, "__dict__", {}).get(COURSE, (None, None))
    return course if whose == id(loader) else None


def attach(loader: Any, inner: Any, course: Any) -> None:
    """Have the loader tell its course of its iterations. Raises NotSupported, and changes nothing then."""
    torch_ones = (_indexed,) if isinstance(inner, DataLoader) else ()
    if loader is inner:
        _change(loader, (*torch_ones, _fetching, _followed))
    else:
        _change(inner, (*torch_ones, _fetching))
        _change(loader, (_followed,))
    for one in (loader, inner):
        one.__dict__[COURSE] = (id(one), course)


def _change(thing: Any, roles: tuple[Role, ...]) -> None:
    if vars(type(thing)).get("_lastgood_roles") == roles:  # a copy of one that is followed
        return
    try:
        # Accelerate's loaders have a `__class__` of their own that says what they wrap.
        object.__dict__["__class__"].__set__(thing, _subclass(type(thing), roles))  # type: ignore[arg-type]
        vars(thing)
    except TypeError as error:
        raise NotSupported(
            f"the iterations of a {type(thing).__qualname__} can't be followed ({error})", hint=REWRITE
        ) from error


@cache
def _subclass(cls: type[Any], roles: tuple[Role, ...]) -> type[Any]:
    made: Any = cls
    for role in roles:
        made = role(made)
    made.__name__ = made.__qualname__ = f"Followed{cls.__name__}"
    made.__module__, made.__doc__, made._lastgood_roles = cls.__module__, cls.__doc__, roles
    return made  # type: ignore[no-any-return]

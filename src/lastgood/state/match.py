"""Which saved tensor belongs to which tensor of the run, where the two don't have the same names. Pure.

A difference between a checkpoint and a run is never guessed at: each one is named by a pattern, or it is an error.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lastgood.errors import Incompatible, UsageError, wrong_type


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """rename: pattern of saved names -> name here; `*` stands for the same text on both sides; the first that fits.
    new: patterns of tensors of the run that the checkpoint doesn't have; they start as they are.
    gone: patterns of tensors of the checkpoint that the run has no use for; what fits both starts afresh.
    cast: tensors saved in another dtype are converted to the run's.

    Patterns are those of a shell (`*`, `?`, `[abc]`) over whole names such as "encoder.layers.0.weight".
    """

    rename: Mapping[str, str] = field(default_factory=dict)
    new: Sequence[str] = ()
    gone: Sequence[str] = ()
    cast: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rename, Mapping):
            raise wrong_type("rename", self.rename, "a dict such as {'encoder.*': 'backbone.*'}")
        for name in ("new", "gone"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
                raise wrong_type(name, patterns, "a list of patterns such as ['head.*']")
        for old, here in self.rename.items():
            if here.count("*") > old.count("*"):
                raise UsageError(f"rename={{{old!r}: {here!r}}} has a * on the right that stands for nothing")

    @property
    def exact(self) -> bool:
        """Whether nothing may differ."""
        return not (self.rename or self.new or self.gone or self.cast)

    def here(self, saved: str) -> str:
        """What a saved tensor is called in the run."""
        for pattern, target in self.rename.items():
            found = re.fullmatch(_regex(pattern), saved, re.DOTALL)
            if found is not None:
                texts = target.split("*")
                return texts[0] + "".join(piece + text for piece, text in zip(found.groups(), texts[1:], strict=False))
        return saved

    def pair(self, saved: Iterable[str], live: Iterable[str], what: str) -> dict[str, str]:
        """Name here -> saved name, for every tensor that both have. what: "the model", for messages.

        Raises Incompatible for names that one side alone has and no pattern allows for, and where two saved tensors
        would get the same name.
        """
        pairs: dict[str, str] = {}
        for name in saved:
            here = self.here(name)
            if here in pairs:
                raise Incompatible(
                    f"{pairs[here]} and {name} of the checkpoint would both be {here} of {what}",
                    hint="make the patterns in rename= tell them apart",
                )
            pairs[here] = name
        known = set(live)
        for here in [here for here in pairs.keys() & known if _any(self.new, here) and _any(self.gone, pairs[here])]:
            known.discard(here)  # the same name for something else: it starts afresh
            del pairs[here]
        new = sorted(name for name in known - pairs.keys() if not _any(self.new, name))
        gone = sorted(pairs[name] for name in pairs.keys() - known if not _any(self.gone, pairs[name]))
        if new or gone:
            raise Incompatible(
                f"{what} differs from the checkpoint (new: {some(new)}; gone: {some(gone)})",
                hint="name what may differ: new=['head.*'], gone=['old.*'], rename={'encoder.*': 'backbone.*'}",
            )
        return {name: pairs[name] for name in pairs if name in known}


def _regex(pattern: str) -> str:
    """The pattern with a group for each star."""
    return "(.*)".join(re.escape(piece).replace(r"\?", ".") for piece in pattern.split("*"))


def _any(patterns: Sequence[str], name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def some(names: Iterable[str], limit: int = 8) -> str:
    """Up to `limit` names for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return (", ".join(ordered[:limit]) or "none") + more

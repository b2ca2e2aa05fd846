"""What a run will put onto the disk, before it is started: `lastgood.plan(...)`. No torch but where shapes need it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lastgood.plan.plan import Plan


class _Callable(ModuleType):
    """`lastgood.plan` is this package as soon as anything in it was imported; it is the function all the same."""

    def __call__(self, *args: Any, **options: Any) -> Plan:
        from lastgood.plan.plan import plan

        return plan(*args, **options)


sys.modules[__name__].__class__ = _Callable

"""What the run is on: a disk, its speed, how often something fails, and what storage costs. Pure."""

from __future__ import annotations

import msgspec

from lastgood import frequency
from lastgood.errors import wrong_type
from lastgood.model import finite

GB = 1e9
"""Bytes of a gigabyte as storage is billed."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """None: not known, and nothing that needs it is said.

    disk: its size in bytes; used: bytes that lie there already. bandwidth: bytes a second of a save. step_time:
    seconds of an optimizer step. mtbf: mean seconds between failures of the run. price: of a GB-month (10^9 bytes).
    restart: seconds from a failure until training goes on.
    """

    disk: int | None = None
    used: int = 0
    bandwidth: float | None = None
    step_time: float | None = None
    mtbf: float | None = None
    price: float | None = None
    restart: float = 0.0

    def __post_init__(self) -> None:
        for option in ("disk", "bandwidth", "step_time", "mtbf"):
            value = getattr(self, option)
            if value is not None and not ((number := finite(value)) is not None and number > 0):
                raise wrong_type(option, value, f"{'bytes' if option == 'disk' else 'a number'} above 0, or None")
        for option in ("used", "price", "restart"):
            value = getattr(self, option)
            if (value is not None or option != "price") and not ((n := finite(value)) is not None and n >= 0):
                raise wrong_type(option, value, "a number of 0 or more")


class Frequency(msgspec.Struct, frozen=True, kw_only=True):
    """How often to save. None where the machine doesn't say what is needed.

    interval: steps between saves. cost: seconds of a save. overhead: share of the time that goes into saves.
    young, daly: the best interval in steps, for the given mtbf. redone: steps that a failure costs on average, half
    the interval. failures: expected over the run. lost: seconds redone because of them. waste: share of the whole
    time that is neither new steps nor idle (saves, steps done again, restarts), by Daly's model.
    """

    interval: float
    redone: float
    cost: float | None = None
    overhead: float | None = None
    young: float | None = None
    daly: float | None = None
    failures: float | None = None
    lost: float | None = None
    waste: float | None = None


def how_often(machine: Machine, max_steps: int, interval: float, full: int) -> Frequency:
    """interval: steps between saves. full: bytes of a save. Formulas and their sources: lastgood.frequency."""
    found = Frequency(interval=interval, redone=interval / 2)
    cost = None if machine.bandwidth is None else full / machine.bandwidth
    if machine.step_time is None:
        return msgspec.structs.replace(found, cost=cost)
    work, gap = max_steps * machine.step_time, interval * machine.step_time
    overhead = None if cost is None else cost / (gap + cost)
    found = msgspec.structs.replace(found, cost=cost, overhead=overhead)
    if machine.mtbf is None:
        return found
    failures = (work + (cost or 0.0) * max_steps / interval) / machine.mtbf
    lost = failures * frequency.lost_per_failure(gap, cost or 0.0, machine.mtbf)
    found = msgspec.structs.replace(found, failures=failures, lost=lost)
    if cost is None:
        return found
    return msgspec.structs.replace(
        found,
        young=frequency.young(cost, machine.mtbf) / machine.step_time,
        daly=frequency.daly(cost, machine.mtbf) / machine.step_time,
        waste=frequency.waste(gap, cost, machine.mtbf, machine.restart),
    )


def monthly(machine: Machine, stored: int) -> float | None:
    """What so many bytes cost a month; None without a price."""
    return None if machine.price is None else machine.price * stored / GB

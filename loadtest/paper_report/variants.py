"""What is compared: the policies by the names of the figures, and the loads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import PecSchedError
from loadtest.simulator.scenario import PolicyName

TRACE = "trace"
SWEEP = "sweep"
LOADS = (TRACE, "50%", "80%", SWEEP)
"""Default ones. `trace`: arrivals as recorded. `N%`: scaled to that share of short capacity."""
SWEEP_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


class PaperError(PecSchedError):
    """The experiments cannot be run as asked, or one of them did not end. One line."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A policy with its switches, on the workload with longs or without."""

    name: str
    policy: PolicyName
    title: str
    off: tuple[str, ...] = ()
    """Switches of pecsched that are off."""
    longs: bool = True

    def switch(self, name: str) -> bool | None:
        """False if it is off here; None: as the scenario has it."""
        return False if name in self.off else None


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("no_longs", "pecsched", "PecSched, longs taken out", longs=False),
        Variant("fifo", "fifo", "FIFO"),
        Variant("reservation", "reservation", "Reservation"),
        Variant("priority", "priority", "Priority"),
        Variant("pecsched", "pecsched", "PecSched"),
        Variant("no_preemption", "pecsched", "/PE: no preemption", ("preemption",)),
        Variant("no_disaggregation", "pecsched", "/Dis: no disaggregation", ("disaggregation",)),
        Variant("no_colocation", "pecsched", "/CoL: no colocation", ("colocation",)),
        Variant("no_fast_sp", "pecsched", "/FSP: no fast SP", ("fast_sp",)),
        Variant("fifo_no_longs", "fifo", "FIFO, longs taken out", longs=False),
    )
}
"""The last one is there for the paper's first figure: FIFO with longs over FIFO without."""
SWEEP_VARIANTS = ("no_longs", "pecsched", "fifo")


def share_of(load: str) -> float | None:
    """Of short capacity; none: the trace's own rate. Raises: PaperError."""
    if load == TRACE:
        return None
    percent = re.fullmatch(r"(\d{1,2}(?:\.\d+)?)%", load)
    if not percent or float(percent[1]) <= 0.0:
        raise PaperError(f"--loads {load}: must be {TRACE}, {SWEEP}, or a share of short capacity like 50%")
    return float(percent[1]) / 100.0

"""Who used the GPUs: busy time as integrals, from which idleness and starvation follow.

A worker is busy while a pass of shorts, a long's prefill that is not paused, or a decode runs on it. A paused
long keeps nobody busy; the shorts it is paused for do.

*Starvation*, so that it means the same at every load and under every policy: in an overloaded cluster some
long always waits, under the fairest of policies. A long is **starved** if the run ends without it, or if it had
not begun when arrivals ended, though while it waited (a minute at least) all longs together were given less than
`DENIED_SHARE` of the GPU time that shorts left over. It is then not load that keeps it waiting but the
policy: however long the arrivals went on, longs would not be served.
"""

from __future__ import annotations

DENIED_SHARE = 0.1
DENIED_AFTER_S = 60.0
"""Who has waited for less was not denied anything: groups are not formed in an instant."""


class Usage:
    """GPU-seconds so far: of prefill workers by class (`short`, `long`: one worker can serve both), and of all workers
    in use by anybody. Counts are in workers; whoever reads multiplies by GPUs per worker."""

    __slots__ = ("_any", "_long", "_short", "_since_s", "any_s", "long_s", "short_s")

    def __init__(self) -> None:
        self._since_s = 0.0
        self._any = self._short = self._long = 0
        self.any_s = self.short_s = self.long_s = 0.0

    def advance(self, now_s: float) -> None:
        """Bring the integrals to now. Before they are read."""
        passed_s = now_s - self._since_s
        if passed_s > 0.0:
            self.any_s += passed_s * self._any
            self.short_s += passed_s * self._short
            self.long_s += passed_s * self._long
            self._since_s = now_s

    def add(self, now_s: float, any_: int, short: int, long: int) -> None:
        """So many more workers are in use (fewer: negative), by anybody, by shorts, by longs."""
        self.advance(now_s)
        self._any += any_
        self._short += short
        self._long += long


def is_denied(waited_s: float, workers: int, short_s: float, long_s: float) -> bool:
    """Whether longs got less than their due in a time of `waited_s` in which shorts used `short_s` and longs
    `long_s` worker-seconds of `workers` workers."""
    left_s = waited_s * workers - short_s
    return waited_s >= DENIED_AFTER_S and left_s > 0.0 and long_s < DENIED_SHARE * left_s

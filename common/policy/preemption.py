"""When a long prefill may be paused, and for how long.

The paper bounds neither a single pause nor their sum. Both are bounded here: peers measured that
unbounded suspension doubles the mean time to first token, and that pausing without hysteresis
thrashes. A long prefill

- yields at most a share σ of the time since it started: its pauses sum up to at most σ·elapsed + σ·P,
  where P is the longest single pause (the second term is what it may yield at once at the start);
- is not paused for longer than P at a time;
- runs undisturbed for a while after each pause;
- is not away for longer because its KV was moved out (`spill.py`): what bringing it back takes counts in the bounds;
- is not paused when it is nearly done. How far it is, it says at each pause; the estimate alone would not do:
  a long that its machine slows down would look nearly done long before it is, and hold up shorts all that time.
"""

from __future__ import annotations

from dataclasses import dataclass

EPSILON_S = 1e-6
"""Below the resolution of any of these estimates: a wait this short is no wait. (Without it, rounding makes
a deadline come due a hair before the condition it was computed from holds.)"""


@dataclass(frozen=True, slots=True)
class PauseBounds:
    pause_max_s: float
    share_max: float
    immunity_s: float
    remaining_min_s: float
    """A prefill with less than this left is not paused."""


@dataclass(slots=True)
class PauseAccount:
    """What one long prefill has yielded so far. Times are the scheduler's clock."""

    started_s: float
    estimate_s: float
    """Time the whole prefill takes undisturbed."""
    suspended_s: float = 0.0
    """Sum of the finished pauses."""
    paused_since_s: float | None = None
    immune_until_s: float = 0.0
    count: int = 0
    done_share: float = 0.0
    """Of its work, as it said at the last pause, after `done_s` of running; 0: it has said nothing yet."""
    done_s: float = 0.0
    base_share: float = 0.0
    """Of its work, done when its group last grew, after `base_s` of running: its pace is counted from there."""
    base_s: float = 0.0
    spilled: tuple[int, ...] = ()
    """Its KV lies elsewhere: by rank, the tokens that its room was reserved for, and will be again."""
    move_s: float = 0.0
    """What moving it there took, the last time; bringing it back takes as long."""
    spills_from_s: float = 0.0
    """It is not moved again before it has run for so long in all."""

    def paused(self, now_s: float, done_share: float = 0.0) -> None:
        """`done_share`: how much of its work it has done, 0 … 1; 0: unknown."""
        if done_share > 0.0:
            self.done_share, self.done_s = done_share, self.ran_s(now_s)
        self.paused_since_s = now_s
        self.count += 1

    def resumed(self, now_s: float, bounds: PauseBounds) -> None:
        """Ends the pause, if there is one."""
        if self.paused_since_s is not None:
            self.suspended_s += now_s - self.paused_since_s
            self.paused_since_s = None
            self.immune_until_s = now_s + bounds.immunity_s

    def regrouped(self, now_s: float, left_s: float, done_share: float) -> None:
        """Its group has grown, and so has `left_s` to run."""
        self.base_s = self.done_s = self.ran_s(now_s)
        self.base_share = self.done_share = done_share
        self.estimate_s = self.base_s + left_s

    def moved_out(self, now_s: float, took_s: float, reserved: tuple[int, ...]) -> None:
        """It is worth its trouble again when the long has run for as long as the way out and back took."""
        self.spilled, self.move_s = reserved, took_s
        self.spills_from_s = self.ran_s(now_s) + max(2.0 * took_s, EPSILON_S)

    def may_spill(self, now_s: float) -> bool:
        return self.ran_s(now_s) >= self.spills_from_s

    def suspended_by(self, now_s: float) -> float:
        running = 0.0 if self.paused_since_s is None else now_s - self.paused_since_s
        return self.suspended_s + running

    def ran_s(self, now_s: float) -> float:
        """Since it started, pauses not counted."""
        if self.paused_since_s is not None:
            now_s = self.paused_since_s
        return now_s - self.started_s - self.suspended_s

    def remaining_s(self, now_s: float) -> float:
        """Of running; by its own pace so far, or by the estimate until it has said anything. Below 0: it has run for
        longer than that, and nobody knows."""
        whole_s = self.estimate_s
        if self.done_share > self.base_share:
            pace_s = (self.done_s - self.base_s) / (self.done_share - self.base_share)
            whole_s = self.base_s + pace_s * (1.0 - self.base_share)
        return whole_s - self.ran_s(now_s)

    def budget_s(self, now_s: float, bounds: PauseBounds) -> float:
        """How much more it may yield in all, as of now (negative: overdrawn)."""
        share = bounds.share_max
        return share * (now_s - self.started_s) + share * bounds.pause_max_s - self.suspended_by(now_s)

    def pausable_from_s(self, now_s: float, needed_s: float, bounds: PauseBounds) -> float | None:
        """When a pause of `needed_s` may begin: now, later, or None: never."""
        share = bounds.share_max
        if share <= 0.0:
            return None
        needed_s = min(needed_s, bounds.pause_max_s)
        shortfall_s = needed_s - self.budget_s(now_s, bounds)
        from_s = max(now_s, self.immune_until_s)
        if shortfall_s > EPSILON_S:
            from_s = max(from_s, now_s + shortfall_s / share)
        left_s = self.remaining_s(now_s)
        if 0.0 < left_s < bounds.remaining_min_s:  # then it should be done by itself
            from_s = max(from_s, now_s + left_s)
        return from_s

    def pause_left_s(self, now_s: float, bounds: PauseBounds) -> float:
        """How much longer the running pause may last. A pause earns no budget that it can spend itself:
        while it runs, elapsed and suspended grow alike."""
        if self.paused_since_s is None:
            return min(bounds.pause_max_s, self.budget_s(now_s, bounds))
        single_s = bounds.pause_max_s - (now_s - self.paused_since_s)
        # budget(t) falls by (1 - σ) per second of pause: it lasts budget / (1 - σ) longer.
        fall = max(1e-9, 1.0 - bounds.share_max)
        left_s = min(single_s, self.budget_s(now_s, bounds) / fall)
        if self.spilled:
            left_s -= self.move_s
        return left_s if left_s > EPSILON_S else 0.0

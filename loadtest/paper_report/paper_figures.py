"""The paper's results, and how each is read from a run.

Source: PecSched, arXiv 2409.15104v2, tables 1 to 7 and the ranges in sections 3, 6.3, 6.4 and 6.6. The order of the
values is that of `MODELS`; where the paper gives a range over its models, it stands for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from loadtest.paper_report.targets import Policies, value
from loadtest.stats import ratio

MODELS = ("mistral-7b", "phi-3-14b", "yi-34b", "llama-3.1-70b")

Read = Callable[[Policies], float | None]
Unit = Literal["times", "change", "share", "count"]
"""A quotient; a change relative to 1; a share of a whole; a number of things."""
PerModel = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class PaperFigure:
    key: str
    title: str
    low: PerModel
    high: PerModel
    """The same as `low` where the paper gives one value per model."""
    read: Read
    unit: Unit
    neutral: float | None = None
    """Where there is no effect: on which side of it a figure lies is its direction. None: it has none."""
    lower_is_better: bool | None = None
    """Of PecSched's own figures, and of what longs pay; None: neither."""

    def paper(self, model: str) -> tuple[float, float]:
        """(lowest, highest)."""
        place = MODELS.index(model)
        return self.low[place], self.high[place]


def _over(above: tuple[str, ...], below: tuple[str, ...], less: float = 0.0) -> Read:
    """A policy's figure over another's, less a number."""

    def read(policies: Policies) -> float | None:
        quotient = ratio(value(policies, *above), value(policies, *below))
        return None if quotient is None else quotient - less

    return read


def _of(*keys: str) -> Read:
    return lambda policies: value(policies, *keys)


def _less(above: tuple[str, ...], below: tuple[str, ...]) -> Read:
    def read(policies: Policies) -> float | None:
        first, second = value(policies, *above), value(policies, *below)
        return None if first is None or second is None else first - second

    return read


def _each(number: float) -> PerModel:
    return (number, number, number, number)


P99 = ("short_delay_s", "p99")
RPS = ("short_rps",)
JCT = ("long_jct_s", "mean")
PREEMPTIONS: dict[str, PerModel] = {
    "pecsched": (94_057, 116_290, 139_247, 170_914),
    "no_disaggregation": (108_552, 133_784, 156_891, 203_628),
    "no_colocation": (130_925, 167_607, 209_834, 261_720),
    "no_fast_sp": (167_394, 205_947, 278_504, 379_305),
}
NAMES = {
    "no_preemption": "/PE",
    "no_disaggregation": "/Dis",
    "no_colocation": "/CoL",
    "no_fast_sp": "/FSP",
    "pecsched": "PecSched",
}


def _exact(
    key: str, title: str, paper: PerModel, read: Read, unit: Unit = "times", neutral: float | None = 1.0
) -> PaperFigure:
    return PaperFigure(key, title, paper, paper, read, unit, neutral)


def _range(
    key: str, title: str, low: float, high: float, read: Read, lower_is_better: bool | None = None
) -> PaperFigure:
    """A change, as the paper gives it over its four models."""
    return PaperFigure(key, title, _each(low), _each(high), read, "change", 0.0, lower_is_better)


def _fifo() -> list[PaperFigure]:
    idle_fifo: PerModel = (0.0004, 0.00009, 0.0005, 0.00008)
    idle_reserved: PerModel = (0.16, 0.22, 0.25, 0.41)
    more_idle: PerModel = (0.1596, 0.21991, 0.2495, 0.40992)
    return [
        _exact(
            "fifo_delay",
            "FIFO: p99 short delay, with longs over without",
            (2.5, 2.78, 3.84, 10.2),
            _over(("fifo", *P99), ("fifo_no_longs", *P99)),
        ),
        _exact(
            "fifo_rps",
            "FIFO: short throughput, with longs over without",
            (0.64, 0.56, 0.39, 0.19),
            _over(("fifo", *RPS), ("fifo_no_longs", *RPS)),
        ),
        _exact(
            "reservation_delay",
            "p99 short delay, Reservation over FIFO",
            (1.2, 1.35, 1.8, 1.94),
            _over(("reservation", *P99), ("fifo", *P99)),
        ),
        _exact(
            "reservation_rps",
            "short throughput, Reservation over FIFO",
            (0.49, 0.47, 0.46, 0.44),
            _over(("reservation", *RPS), ("fifo", *RPS)),
        ),
        _exact("idle_fifo", "GPU idle rate, FIFO", idle_fifo, _of("fifo", "gpu_idle"), "share", None),
        _exact(
            "idle_reservation",
            "GPU idle rate, Reservation",
            idle_reserved,
            _of("reservation", "gpu_idle"),
            "share",
            None,
        ),
        _exact(
            "idle_more",
            "GPU idle rate, Reservation less FIFO",
            more_idle,
            _less(("reservation", "gpu_idle"), ("fifo", "gpu_idle")),
            "share",
            0.0,
        ),
        _exact(
            "priority_starved",
            "Priority: longs that had not begun when requests stopped coming",
            (0.92, 0.97, 1.0, 1.0),
            _over(("priority", "not_begun_at_end_of_arrivals"), ("priority", "longs")),
            "share",
            0.0,
        ),
    ]


def _overall() -> list[PaperFigure]:
    ranges = {
        "fifo": ("FIFO", (-0.87, -0.58), (0.42, 3.18), (0.04, 0.07)),
        "reservation": ("Reservation", (-0.92, -0.61), (1.93, 5.95), (0.06, 0.13)),
    }
    figures = []
    for policy, (name, delay, rps, jct) in ranges.items():
        for key, title, (low, high), what, lower in (
            ("delay", "p99 short delay", delay, P99, True),
            ("rps", "short throughput", rps, RPS, False),
            ("jct", "mean long JCT", jct, JCT, True),
        ):
            read = _over(("pecsched", *what), (policy, *what), 1.0)
            figures.append(_range(f"pecsched_{policy}_{key}", f"PecSched over {name}: {title}", low, high, read, lower))
    return figures


def _ablations() -> list[PaperFigure]:
    jcts = {
        "no_preemption": (-0.18, -0.14),
        "no_disaggregation": (0.21, 0.29),
        "no_colocation": (0.23, 0.26),
        "no_fast_sp": (0.39, 0.55),
    }
    return [
        *(
            _range(
                f"{policy}_jct",
                f"{NAMES[policy]} over PecSched: mean long JCT",
                low,
                high,
                _over((policy, *JCT), ("pecsched", *JCT), 1.0),
            )
            for policy, (low, high) in jcts.items()
        ),
        _range(
            "no_preemption_delay",
            "/PE over PecSched: p99 short delay",
            0.75,
            3.76,
            _over(("no_preemption", *P99), ("pecsched", *P99), 1.0),
        ),
        _range(
            "no_preemption_rps",
            "/PE over PecSched: short throughput",
            -0.48,
            -0.21,
            _over(("no_preemption", *RPS), ("pecsched", *RPS), 1.0),
        ),
    ]


def _preemptions() -> list[PaperFigure]:
    own = PREEMPTIONS["pecsched"]
    counts = [
        _exact(
            f"{policy}_preemptions",
            f"{NAMES[policy]}: preemptions",
            counted,
            _of(policy, "preemptions"),
            "count",
            None,
        )
        for policy, counted in PREEMPTIONS.items()
    ]
    quotients = [
        PaperFigure(
            f"{policy}_preemptions_over",
            f"{NAMES[policy]} over PecSched: preemptions",
            (a := (counted[0] / own[0], counted[1] / own[1], counted[2] / own[2], counted[3] / own[3])),
            a,
            _over((policy, "preemptions"), ("pecsched", "preemptions")),
            "times",
            1.0,
        )
        for policy, counted in PREEMPTIONS.items()
        if policy != "pecsched"
    ]
    return [*counts, *quotients]


def _scheduling() -> list[PaperFigure]:
    shares: dict[str, PerModel] = {
        "short": (0.00354, 0.00282, 0.00196, 0.00071),
        "long": (0.00183, 0.00147, 0.00055, 0.00019),
    }
    return [
        _exact(
            f"scheduling_{length}",
            f"Scheduling time over JCT, p99 of {length}s",
            paper,
            _of("pecsched", "sched_over_jct_p99", length),
            "share",
            None,
        )
        for length, paper in shares.items()
    ]


GROUPS: dict[str, list[PaperFigure]] = {
    "What longs do to FIFO, and the baselines' price": _fifo(),
    "PecSched and the baselines": _overall(),
    "Ablations": _ablations(),
    "Preemptions": _preemptions(),
    "Cost of scheduling": _scheduling(),
}
"""In the paper's order."""

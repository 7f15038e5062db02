"""A small simulated cluster with costs made up so that every time can be worked out by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from common.messages.cluster import StepCost
from common.policy.scheduler_config import SchedulerConfig
from loadtest.simulator.result import Outcome, SimResult
from loadtest.simulator.workload import Arrival, Workload
from loadtest.simulator.world import ClusterShape, World

HOP_S = 0.001
LAYERS = 4
THRESHOLD = 1_000
PASS_S, TOKEN_S = 0.010, 1e-4
DECODE_S, ROW_S = 0.010, 0.001
TRANSFER_S = 0.040
LONG_TOKEN_S, LONG_STEP_S, LONG_CHUNK_S, LONG_DECODE_S = 1e-3, 0.050, 0.200, 0.020


class Costs:
    kv_capacity_tokens = 100_000

    def pass_s(self, tokens: int, past: int = 0) -> float:
        return PASS_S + TOKEN_S * tokens

    def batch_s(self, lengths: Sequence[int]) -> float:
        return PASS_S + TOKEN_S * sum(lengths)

    def decode_step_s(self, rows: int, kv_tokens: int) -> float:
        return DECODE_S + ROW_S * rows

    def shared_step_s(self, short_tokens: int, rows: int, kv_tokens: int) -> float:
        return DECODE_S + ROW_S * rows + TOKEN_S * short_tokens

    def kv_transfer_s(self, tokens: int, *, same_node: bool) -> float:
        return TRANSFER_S

    def step_s(self, tokens: int, past: int) -> float:
        return LONG_STEP_S

    def step_cost(self) -> StepCost:
        return StepCost(pass_s=PASS_S, token_s=TOKEN_S, pair_s=0.0)


class Longs:
    """Implements `LongCosts`; and `LongPlanner`, for groups of a fixed degree. `speed`: theirs, in times of a
    replica's, and they may be smaller; 0: as many times as they have members."""

    degree_max = 1_000

    def __init__(self, degree: int = 1, speed: float = 0.0) -> None:
        self._degree = degree
        self._speed = speed

    def degree(self, tokens: int, kv_tokens: int, free_by_node: Sequence[int], kv_free_tokens: int) -> int:
        free = sum(free_by_node)
        return min(self._degree, free) if self._speed or free >= self._degree else 0

    def prefill_s(self, tokens: int, layout: tuple[int, ...]) -> float:
        size = sum(layout)
        return LONG_TOKEN_S * tokens / (self._speed if self._speed and size > 1 else size)

    def took(self, degree: int, expected_s: float, ran_s: float) -> None:
        pass

    def step_s(self, tokens: int, layout: tuple[int, ...]) -> float:
        return LONG_STEP_S

    def chunk_s(self, tokens: int, layout: tuple[int, ...]) -> float:
        return LONG_CHUNK_S

    def decode_step_s(self, kv_tokens: int, layout: tuple[int, ...]) -> float:
        return LONG_DECODE_S


class Checked:
    """The scheduler's core, its invariants checked after every event."""

    def __init__(self, core: object) -> None:
        self._core = core

    def handle(self, event: object, now_s: float) -> list[object]:
        commands = self._core.handle(event, now_s)
        self._core.check()
        return commands

    def __getattr__(self, name: str) -> object:
        return getattr(self._core, name)


def workload(*arrivals: tuple[float, int, int]) -> Workload:
    return Workload("made up", tuple(Arrival(*arrival) for arrival in sorted(arrivals)), THRESHOLD)


def build(
    *,
    prefill: int = 1,
    decode: int = 1,
    degree: int = 1,
    group_speed: float = 0.0,
    per_node: int | None = None,
    seed: int = 0,
    record: bool = False,
    rows_max: int = 256,
    **config: object,
) -> World:
    settings = {
        "threshold_tokens": THRESHOLD,
        "batch_tokens_max": 400,
        "colocated_tokens_max": 100,
        "group_max": 64,
        "elastic": False,
        "group_gathers": False,
        "pause_immunity_s": 0.0,
        "wait_instead_of_pause_s": 0.0,
        **config,
    }
    per_node = per_node or prefill + decode
    shape = ClusterShape(
        nodes=(prefill + decode) // per_node,
        replicas_per_node=per_node,
        decode_replicas=decode,
        gpus_per_replica=2,
        layers=LAYERS,
        rows_max=rows_max,
    )
    longs = Longs(degree, group_speed)
    world = World(shape, SchedulerConfig(**settings), Costs(), longs, longs, seed=seed, hop_s=HOP_S, record=record)
    world._core = Checked(world._core)
    return world


def run(arrivals: Iterable[tuple[float, int, int]], **options: object) -> SimResult:
    return build(**options).run(workload(*arrivals))


def outcomes(arrivals: Iterable[tuple[float, int, int]], **options: object) -> list[Outcome]:
    return run(arrivals, **options).outcomes


def events(result: SimResult, request_id: str) -> list[str]:
    """Types of what the scheduler heard (plain) and said (→) about a request, in order."""
    told = []
    for line in result.event_log.decode().splitlines():
        words = line.split(" ")
        if request_id in words or f"request_id='{request_id}'" in words:
            told.append(" ".join(words[1:3]) if words[1] == "→" else words[1])
    return told

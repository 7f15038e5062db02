"""Which cluster serves which model, under which policy: from flags, from a TOML file, or a preset.

    name = "two nodes, slow network"
    model = "yi-34b"              # the only key that must be there; the rest is the model's preset
    gpu = "a100"
    nodes = 2
    gpus_per_node = 8
    tp = 4
    decode_replicas = 1
    policy = "pecsched"
    colocation = false            # switches: preemption, disaggregation, colocation, fast_sp

    [coefficients]                # any field of common.policy.cost_model.Coefficients
    attention_flops = 1.5e14

    [scheduler]                   # any limit of common.policy.cluster.SchedulerConfig
    pause_max_s = 1.0

    [workload]                    # what arrives: fields of WorkloadSpec
    trace = ["conv.csv", "code.csv"]
    rate_scale = 2.0

Relative paths are taken from the folder of the file. An unknown key, a wrong type or a cluster that cannot be is
refused before anything runs, with file, line and key. The presets are the paper's clusters (section 6.1): 4 nodes of 8
A100, and its numbers of decode replicas. The TP of the two smaller models could not be read from the paper with
certainty: 1 and 2 are taken.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from common import coefficients as coefficient_files
from common.errors import PecSchedError
from common.messages.base import Record
from common.policy.cost_model import MODELS, CostModel
from common.policy.processors import Coefficients
from common.policy.scheduler_config import SchedulerConfig
from loadtest.simulator.workload import LONG_PERCENTILE, LONG_TOKENS_HIGH, LONG_TOKENS_LOW, Workload

PolicyName = Literal["pecsched", "fifo", "reservation", "priority"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)

Positive = Annotated[float, Meta(gt=0.0, le=1e9)]
Nodes = Annotated[int, Meta(ge=1, le=100_000)]
PerNode = Annotated[int, Meta(ge=1, le=256)]
LongTokens = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Table = dict[str, Any]


class ScenarioError(PecSchedError):
    """A scenario that cannot be. Its text is one line: file and line, key, what is wrong."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = re.sub(r"\[\d+\]", "", key)
        """Path of the key, like `workload.trace`; empty: no single one is at fault."""


class WorkloadSpec(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What arrives. Order of the changes: longs rewritten, truncated, thinned, scaled, longs taken out."""

    trace: tuple[str, ...] = ()
    """Azure CSV files, a folder of them, or one Mooncake JSONL file; none: the synthetic generator."""
    synthetic_s: Positive = 3600.0
    """Length of a synthetic workload."""
    synthetic_rps: Positive | None = None
    """Its requests per second; none: those of the trace it was fitted to."""
    rewrite: bool = True
    """Make longs out of the longest prompts, as the paper does; false: prompts as they are."""
    long_low: LongTokens = LONG_TOKENS_LOW
    long_high: LongTokens = LONG_TOKENS_HIGH
    long_percentile: Annotated[float, Meta(ge=0.0, le=100.0)] = LONG_PERCENTILE
    """A prompt above this percentile of lengths is long."""
    first_s: Positive | None = None
    """Only what arrives in the first so many seconds of the trace; none: all."""
    keep: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    """Share of the requests that is kept, drawn by lot; their times stay as they are."""
    rate_scale: Positive = 1.0
    """Arrival rate as a multiple of the trace's: the same requests in less time."""
    without_longs: bool = False


class Scenario(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cluster, its model and its policy. A replica is `tp` GPUs of one node."""

    name: str = ""
    model: str
    """A key of `cost_model.MODELS`."""
    gpu: str = "a100"
    """A coefficients file that ships with the project, or the path of one."""
    nodes: Nodes = 4
    gpus_per_node: PerNode = 8
    tp: PerNode
    decode_replicas: Annotated[int, Meta(ge=0, le=1_000_000)]
    """How many of the replicas only decode shorts."""
    policy: PolicyName = "pecsched"
    preemption: bool = True
    disaggregation: bool = True
    colocation: bool = True
    fast_sp: bool = True
    coefficients: Table = msgspec.field(default_factory=dict)
    """Fields of `Coefficients` that differ from the file's; nested ones as tables."""
    scheduler: Table = msgspec.field(default_factory=dict)
    """Fields of `SchedulerConfig` that differ from its defaults."""
    workload: WorkloadSpec = WorkloadSpec()

    @property
    def replicas(self) -> int:
        """Of both kinds."""
        return self.nodes * self.replicas_per_node

    @property
    def prefill_replicas(self) -> int:
        """Without disaggregation, all of them; they decode too."""
        return self.replicas - (self.decode_replicas if self.disaggregation else 0)

    @property
    def replicas_per_node(self) -> int:
        return self.gpus_per_node // self.tp

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


PRESETS: Mapping[str, Scenario] = {
    model: Scenario(name=model, model=model, tp=tp, decode_replicas=decode_replicas)
    for model, tp, decode_replicas in (
        ("mistral-7b", 1, 4),
        ("phi-3-14b", 2, 4),
        ("yi-34b", 4, 1),
        ("llama-3.1-70b", 4, 1),
    )
}

PECSCHED_SWITCHES = ("preemption", "colocation", "fast_sp")
"""What the baselines do not do anyway."""

SAID_ELSEWHERE = frozenset({"policy", "threshold_tokens", "preemption", "disaggregation", "colocation"})
"""Fields of `SchedulerConfig` that the scenario itself, or its workload, decides."""

NOT_SIMULATED = frozenset({"spill"})
"""Of the others, what simulated workers do not do: here no KV is moved elsewhere."""


def load_scenario(path: str | Path, changes: Mapping[str, Any] = MappingProxyType({})) -> Scenario:
    """A scenario from a TOML file, with some of its keys changed. Relative paths in it are taken from its folder.
    Raises: ScenarioError."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
        said = tomllib.loads(text)
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: not TOML: {error}") from error
    try:
        return make_scenario(overlaid(_from_folder(said, file.parent), changes))
    except ScenarioError as error:
        if error.key and _is_in(changes, error.key):
            raise
        raise ScenarioError(f"{path}{_line_of(text, error.key)}: {error}") from error


def make_scenario(said: Mapping[str, Any]) -> Scenario:
    """The preset of the model, changed by what is said, and checked. Raises: ScenarioError."""
    model = said.get("model")
    if model is None:
        raise ScenarioError(f"the key is missing; known models: {_listed(PRESETS)}", "model")
    if not isinstance(model, str) or model not in PRESETS:
        raise ScenarioError(f"{model!r} is unknown; known: {_listed(PRESETS)}", "model")
    known = [field.name for field in msgspec.structs.fields(Scenario)]
    for key in said:
        if key not in known:
            raise ScenarioError(f"unknown key; known: {_listed(known)}", key)
    try:
        scenario = msgspec.convert({**msgspec.to_builtins(PRESETS[model]), **said}, Scenario)
    except msgspec.ValidationError as error:
        raise _in_words(error) from error
    check_scenario(scenario)
    return scenario


def workload_spec(said: Mapping[str, Any]) -> WorkloadSpec:
    """Its defaults, changed by what is said. Raises: ScenarioError."""
    try:
        return msgspec.convert(said, WorkloadSpec)
    except msgspec.ValidationError as error:
        raise _in_words(error) from error


def check_scenario(scenario: Scenario) -> None:
    """Whether such a cluster can be. Raises: ScenarioError."""
    if scenario.model not in MODELS:
        raise ScenarioError(f"{scenario.model!r} is unknown; known: {_listed(MODELS)}", "model")
    if scenario.gpus_per_node % scenario.tp:
        raise ScenarioError(f"{scenario.tp} does not divide the {scenario.gpus_per_node} GPUs of a node", "tp")
    if scenario.decode_replicas >= scenario.replicas:
        left = f"{scenario.decode_replicas} of {scenario.replicas} replicas leave none to prefill"
        raise ScenarioError(left, "decode_replicas")
    if scenario.workload.long_low > scenario.workload.long_high:
        raise ScenarioError("more than workload.long_high", "workload.long_low")
    if scenario.policy != "pecsched":
        for switch in PECSCHED_SWITCHES:
            if not getattr(scenario, switch):
                raise ScenarioError(
                    f"a switch of the policy pecsched: {scenario.policy} has nothing to switch off", switch
                )
    scheduler_config(scenario, threshold_tokens=1)
    cost_model(scenario)


def check_workload(scenario: Scenario, workload: Workload) -> None:
    """Whether every request fits: a short into one replica's KV, a long into that of all that prefill.

    Raises: ScenarioError, naming the first that does not.
    """
    capacity = cost_model(scenario).kv_capacity_tokens
    prefilling = scenario.prefill_replicas
    for number, arrival in enumerate(workload.arrivals, start=1):
        tokens = arrival.prompt_tokens + arrival.output_tokens
        if tokens <= capacity:
            continue
        is_long = arrival.prompt_tokens > workload.threshold_tokens
        if not is_long or tokens > capacity * prefilling:
            room = f"{prefilling} prefilling replicas hold" if is_long else "a replica holds"
            of = f"{workload.name}: request {number} (at {arrival.at_s:.3f} s)"
            held = capacity * prefilling if is_long else capacity
            raise ScenarioError(f"{of} needs KV for {tokens} tokens; {room} {held} of {scenario.model}")


def cost_model(scenario: Scenario) -> CostModel:
    """Of one replica. Raises: ScenarioError: unknown GPU or coefficient, TP that does not divide, weights that do
    not fit."""
    try:
        loaded = coefficient_files.load(scenario.gpu)
    except PecSchedError as error:
        raise ScenarioError(str(error), "gpu") from error
    changed = _changed_coefficients(loaded, scenario.coefficients)
    try:
        return CostModel(MODELS[scenario.model], changed, scenario.tp, scenario.gpus_per_node)
    except ValueError as error:
        raise ScenarioError(f"{scenario.model} at tp {scenario.tp} on {changed.name}: {error}", "tp") from error


def scheduler_config(scenario: Scenario, threshold_tokens: int) -> SchedulerConfig:
    """What the scheduler core is given. Raises: ScenarioError."""
    known = {field.name for field in msgspec.structs.fields(SchedulerConfig)} - SAID_ELSEWHERE
    for name, value in scenario.scheduler.items():
        key = f"scheduler.{name}"
        if name in SAID_ELSEWHERE:
            raise ScenarioError("not set here, but by the scenario itself or its workload", key)
        if name not in known:
            raise ScenarioError(f"unknown key; known: {_listed(known - NOT_SIMULATED)}", key)
        if name in NOT_SIMULATED:
            raise ScenarioError("has no effect: simulated workers do not do that; leave it out", key)
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ScenarioError(f"{value} must be 0 or more", key)
    said: Table = {
        **scenario.scheduler,
        "policy": scenario.policy,
        "threshold_tokens": threshold_tokens,
        "preemption": scenario.preemption,
        "disaggregation": scenario.disaggregation,
        "colocation": scenario.colocation,
        "spill": "off",
    }
    try:
        return msgspec.convert(said, SchedulerConfig)
    except msgspec.ValidationError as error:
        raise _in_words(error, "scheduler") from error


def overlaid(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Table:
    """`base` with the changes, tables within tables."""
    made = dict(base)
    for name, value in changes.items():
        below: Any = made.get(name)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        made[name] = overlaid(below, value) if both else value
    return made


def _from_folder(said: Table, folder: Path) -> Table:
    """The same with the paths in it taken from a folder, where they are relative."""
    made = dict(said)
    gpu, workload = said.get("gpu"), said.get("workload")
    if isinstance(gpu, str) and gpu.endswith(".json"):
        made["gpu"] = str(folder / Path(gpu).expanduser())
    if isinstance(workload, dict) and isinstance(workload.get("trace"), list):
        traces = [
            str(folder / Path(name).expanduser()) if isinstance(name, str) else name for name in workload["trace"]
        ]
        made["workload"] = {**workload, "trace": traces}
    return made


def _changed_coefficients(loaded: Coefficients, changes: Table) -> Coefficients:
    base = msgspec.to_builtins(loaded)
    _check_changes(base, changes, "coefficients")
    try:
        return msgspec.convert(overlaid(base, changes), Coefficients)
    except msgspec.ValidationError as error:
        raise _in_words(error, "coefficients") from error


def _check_changes(base: Table, changes: Table, path: str) -> None:
    """Raises: ScenarioError for a key that base has not, and for a number that is none of a processor's."""
    for name, value in changes.items():
        key = f"{path}.{name}"
        if name not in base:
            raise ScenarioError(f"unknown key; known: {_listed(base)}", key)
        if isinstance(value, dict) and isinstance(base[name], dict):
            _check_changes(base[name], value, key)
        elif isinstance(value, int | float) and not 0 < value < math.inf:
            raise ScenarioError(f"{value} must be more than 0", key)
        elif name == "memory_share" and isinstance(value, int | float) and value > 1:
            raise ScenarioError(f"{value} must not be more than 1", key)


def _in_words(error: msgspec.ValidationError, path: str = "") -> ScenarioError:
    """From msgspec's message, "Expected `int`, got `str` - at `$.tp`"."""
    what, _, where = str(error).partition(" - at ")
    inside = where.strip("`").removeprefix("$").removeprefix(".").replace("[...]", "")
    unknown = re.fullmatch(r"Object contains unknown field `(.+)`", what)
    if unknown:
        what = "unknown key"
    names = (path, inside, unknown[1] if unknown else "")
    return ScenarioError(f"{what[:1].lower()}{what[1:]}", ".".join(filter(None, names)))


def _is_in(table: Mapping[str, Any], key: str) -> bool:
    """Whether the table, or one within it, says something about the key."""
    first, _, rest = key.partition(".")
    below = table.get(first)
    return _is_in(below, rest) if rest and isinstance(below, Mapping) else first in table


def _line_of(text: str, key: str) -> str:
    """ ":7", the line of a TOML text on which the key is set, or the table within which; nothing if none is found."""
    if not key:
        return ""
    section = nearest = ""
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[\s*([\w.-]+)\s*\]", line)
        setting = re.match(r"\s*([\w.\"'-]+)\s*=", line)
        if header:
            section = place = header[1]
        elif setting:
            place = ".".join(filter(None, (section, setting[1].strip("\"'"))))
        else:
            continue
        if place == key:
            return f":{number}"
        if key.startswith(f"{place}."):
            nearest = f":{number}"
    return nearest


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))

"""Settings of every role: frozen, validated, and each field both a flag and an environment variable.

`nats_url` is `--nats-url` and `PECSCHED_NATS_URL`; the flag wins. `settings_loader.load` is the only
reader of the environment and of argv; everything else takes a settings object.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from common.messages.base import Record

PolicyName = Literal["pecsched", "fifo", "reservation", "priority"]
LongOrder = Literal["remaining", "arrival"]
EngineName = Literal["torch", "timed"]
SpillTo = Literal["off", "memory", "disk"]
DtypeName = Literal["auto", "bfloat16", "float32"]

Port = Annotated[int, Meta(ge=0, le=65535)]
Count = Annotated[int, Meta(ge=1, le=100_000)]
Duration = Annotated[float, Meta(gt=0.0, le=86_400.0)]
Wait = Annotated[float, Meta(ge=0.0, le=86_400.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Factor = Annotated[float, Meta(ge=0.0, le=100.0)]

ONLY_WITH = "only_with"
"""Key in `Meta.extra`: other settings by name, and the values they must have for this one to mean anything. Who sets
it where it means nothing is told so (`settings_loader.load`)."""

NOT_WITH = "not_with"
"""Key in `Meta.extra`: names of other settings that say the same thing another way. Who sets both is told so."""

_PECSCHED = Meta(extra={ONLY_WITH: {"policy": ("pecsched",)}})
_PAUSES = Meta(extra={ONLY_WITH: {"policy": ("pecsched",), "preemption": (True,)}})
_SPILLS = Meta(
    extra={ONLY_WITH: {"policy": ("pecsched",), "preemption": (True,), "disaggregation": (True,)}},
    description="where the KV of a paused long may be moved so that shorts have room, as a last resort",
)
_TO_DISK = Meta(extra={ONLY_WITH: {"spill": ("disk",)}})
_SPILLED = Meta(extra={ONLY_WITH: {"spill": ("memory", "disk")}})
_AGED = Meta(extra={ONLY_WITH: {"policy": ("pecsched",), "long_order": ("remaining",)}})
GROUP_MAX = 64
_ELASTIC = Meta(extra={ONLY_WITH: {"policy": ("pecsched",), "group_max": tuple(range(2, GROUP_MAX + 1))}})
_GROUPS = Meta(extra={ONLY_WITH: {"group_max": tuple(range(2, GROUP_MAX + 1))}})
_INSTEAD_OF_NODES = Meta(extra={NOT_WITH: ("workers_per_node",)})
_RESERVATION = Meta(extra={ONLY_WITH: {"policy": ("reservation",)}})


MetricsHost = Annotated[str, Meta(description="address that /metrics is served on")]
MetricsPort = Annotated[Port, Meta(description="port of /metrics, for Prometheus; 0: none")]
OtlpEndpoint = Annotated[
    str,
    Meta(
        description="OpenTelemetry collector that takes traces (OTLP over HTTP, such as http://host:4318); empty: none"
    ),
]


CpuSlice = Annotated[
    int,
    Meta(
        ge=0,
        le=100,
        description="length of this process's turns on a busy core (Linux): more requests per second where no engine "
        "computes beside; 0: as the system does",
    ),
]


class CommonSettings(Record, frozen=True, kw_only=True):
    """What every role needs."""

    nats_url: Annotated[str, Meta(description="NATS server")] = "nats://127.0.0.1:4222"
    redis_url: Annotated[str, Meta(description="Redis server")] = "redis://127.0.0.1:6379/0"
    node: Annotated[str, Meta(description="name of this machine in placement decisions")] = "node-0"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="least severe log line")] = (
        "info"
    )
    log_json: Annotated[bool, Meta(description="log lines as JSON")] = True
    heartbeat_s: Annotated[Duration, Meta(description="seconds between two signs of life")] = 1.0
    lease_s: Annotated[Duration, Meta(description="seconds without a sign of life until a process counts as lost")] = (
        4.0
    )
    journal: Annotated[str, Meta(description="file to record the core's events and commands in; empty: none")] = ""
    alive_file: Annotated[
        str,
        Meta(description="file to touch at every heartbeat once it serves, for health checks; empty: none"),
    ] = ""


class ModelSettings(CommonSettings, frozen=True, kw_only=True):
    """What a role that knows the model needs."""

    model: Annotated[str, Meta(description="folder or hub id of a causal LM; 'embedded': SmolLM2-135M-Instruct")] = (
        "embedded"
    )
    cache_dir: Annotated[str, Meta(description="where the converted model is kept; empty: ~/.cache/pecsched")] = ""


class RouterSettings(ModelSettings, frozen=True, kw_only=True):
    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="HTTP port; 0: any free one")] = 8000
    reuse_port: Annotated[
        bool,
        Meta(description="let other routers of this machine listen there too; the system deals connections out"),
    ] = False
    served_model_name: Annotated[str, Meta(description="name in the API; empty: the model's own")] = ""
    api_key: Annotated[str, Meta(description="bearer token that clients must send; empty: none asked")] = ""
    body_bytes_max: Annotated[int, Meta(ge=1, le=2**30, description="largest HTTP body or NATS payload in bytes")] = (
        4_194_304
    )
    requests_max: Annotated[Count, Meta(description="requests in hand at once; more get 429")] = 2_000
    submit_patience_s: Annotated[Duration, Meta(description="how long to seek a scheduler before 503")] = 8.0
    stall_s: Annotated[Duration, Meta(description="longest silence on a request before it is given up")] = 600.0
    inline_tokens_max: Annotated[Count, Meta(description="longer prompts travel by reference")] = 4_096
    default_max_tokens: Annotated[Count, Meta(description="max_tokens where the client names none")] = 256
    pages_max: Annotated[
        int, Meta(ge=0, le=1_000, description="live pages (at /) open at once; more get 503; 0: there is none")
    ] = 32
    late_s: Annotated[
        Wait, Meta(description="at a stop, how long requests on connections that are open already are still taken")
    ] = 0.5
    otlp_endpoint: OtlpEndpoint = ""
    cpu_slice_ms: CpuSlice = 0
    log_prompts: Annotated[bool, Meta(description="log what clients send, with the request's id")] = False
    drain_s: Annotated[
        Duration, Meta(description="at a stop, how long running requests may take before their clients get an error")
    ] = 10.0


class SchedulerSettings(CommonSettings, frozen=True, kw_only=True):
    metrics_host: MetricsHost = "127.0.0.1"
    metrics_port: MetricsPort = 0
    otlp_endpoint: OtlpEndpoint = ""
    cpu_slice_ms: CpuSlice = 0
    policy: Annotated[
        PolicyName, Meta(description="who runs when: PecSched, or one of the policies it is compared with")
    ] = "pecsched"
    preemption: Annotated[bool, _PECSCHED, Meta(description="shorts may pause the prefill of longs")] = True
    disaggregation: Annotated[
        bool, Meta(description="shorts are decoded by decode workers; without, where they were prefilled")
    ] = True
    colocation: Annotated[
        bool, _PECSCHED, Meta(description="shorts share the steps of a long's decode; without, it waits for them")
    ] = True
    long_order: Annotated[
        LongOrder, _PECSCHED, Meta(description="which long goes first: the one with the least work, or the oldest")
    ] = "remaining"
    long_aging: Annotated[
        Factor, _AGED, Meta(description="seconds of work that a second of waiting makes up for among longs")
    ] = 0.5
    shorts_spare: Annotated[
        Factor,
        _PECSCHED,
        Meta(description="replicas that longs leave to shorts, for each that these have kept busy lately"),
    ] = 2.5
    elastic: Annotated[
        bool, _ELASTIC, Meta(description="a long that prefills takes in idle workers, and gives back what others need")
    ] = True
    reserved_long_tokens: Annotated[
        int, _RESERVATION, Meta(ge=1, le=10_000_000, description="longest prompt that replicas are set aside for")
    ] = 500_000
    threshold_tokens: Annotated[Count, Meta(description="prompts above this are long")] = 2_048
    queue_max: Annotated[Count, Meta(description="requests waiting for a worker; more are refused with 429")] = 10_000
    attempts_max: Annotated[Count, Meta(description="how often a request is served again after a loss")] = 4
    no_worker_s: Annotated[Duration, Meta(description="how long a request waits for a role that has no worker")] = 8.0
    pause_max_s: Annotated[Duration, _PAUSES, Meta(description="longest single pause of a long prefill")] = 10.0
    pause_share_max: Annotated[
        Share, _PAUSES, Meta(description="largest share of its time that a long prefill yields")
    ] = 0.9
    pause_immunity_s: Annotated[
        Duration, _PAUSES, Meta(description="after a pause, how long a prefill runs undisturbed")
    ] = 0.05
    pause_remaining_min_s: Annotated[
        Wait, _PAUSES, Meta(description="a prefill with less than this left is not paused")
    ] = 0.1
    wait_instead_of_pause_s: Annotated[
        Duration,
        _PECSCHED,
        Meta(description="a short waits this long for a free replica rather than disturb a long"),
    ] = 0.05
    spill: Annotated[SpillTo, _SPILLS] = "memory"
    colocated_tokens_max: Annotated[Count, Meta(description="short tokens that share a step with a long's decode")] = (
        192
    )
    batch_tokens_max: Annotated[Count, Meta(description="tokens of shorts in hand at one replica")] = 1_024
    group_max: Annotated[
        int, Meta(ge=1, le=GROUP_MAX, description="prefill workers that may share one long prompt")
    ] = 1
    group_gathers: Annotated[
        bool,
        _GROUPS,
        Meta(description="after the prefill, one of a ring takes in all its KV if it has room, and decodes alone"),
    ] = True
    internode_bytes_s: Annotated[
        float,
        _GROUPS,
        Meta(ge=0.0, le=1e15, description="bytes per second between two nodes, each way; 0: as within one"),
    ] = 0.0


class CoordinatorSettings(CommonSettings, frozen=True, kw_only=True):
    metrics_host: MetricsHost = "127.0.0.1"
    metrics_port: MetricsPort = 0
    answer_s: Annotated[Duration, Meta(description="longest silence of a rank after an order")] = 5.0
    move_s: Annotated[Duration, Meta(description="how long a rank may take to move the KV of a paused long")] = 60.0


class WorkerSettings(ModelSettings, frozen=True, kw_only=True):
    """Common to prefill and decode workers."""

    worker_id: Annotated[str, Meta(description="name of this worker; empty: made from role, host and pid")] = ""
    replica: Annotated[str, Meta(description="copy of the weights this worker holds a shard of; empty: its own")] = ""
    engine: Annotated[EngineName, Meta(description="'torch', or 'timed': answers at a cost model's speed")] = "torch"
    dtype: Annotated[DtypeName, Meta(description="'auto': bfloat16 where the machine is fast at it")] = "auto"
    device: Annotated[str, Meta(description="'auto', 'cpu', 'cuda', 'cuda:1' …")] = "auto"
    threads: Annotated[Count, Meta(description="compute threads (CPU)")] = 1
    kv_capacity_tokens: Annotated[Count, Meta(description="tokens of KV this worker holds at most")] = 32_768
    data_host: Annotated[
        str,
        Meta(description="address that peers reach this worker's data plane at; 'auto': the one it reaches NATS from"),
    ] = "127.0.0.1"
    data_port: Annotated[Port, Meta(description="data plane port; 0: any free one")] = 0
    data_secret: Annotated[str, Meta(description="shared secret of the data plane; the same on every worker")] = ""
    transfer_s: Annotated[Duration, Meta(description="longest silence on a KV transfer")] = 5.0
    drain_s: Annotated[Duration, Meta(description="when told to stop, how long what is in hand may take")] = 5.0
    metrics_host: MetricsHost = "127.0.0.1"
    metrics_port: MetricsPort = 0


class PrefillWorkerSettings(WorkerSettings, frozen=True, kw_only=True):
    chunk_tokens: Annotated[Count, Meta(description="tokens of a long prompt per pass, at most")] = 512
    step_ms_max: Annotated[Duration, Meta(description="a step (one layer of one chunk) is sized to stay below")] = 15.0
    batch_tokens_max: Annotated[Count, Meta(description="tokens of shorts prefilled in one pass")] = 512
    colocated_tokens_max: Annotated[Count, Meta(description="short tokens that share a step with a long's decode")] = (
        192
    )
    long_itl_ms_max: Annotated[
        Duration,
        Meta(description="longest time from a long's token to the next; others share or stop their steps to keep it"),
    ] = 250.0
    silence_s: Annotated[
        Duration, Meta(description="longest silence of another worker in a pass of a long that both compute")
    ] = 5.0
    join_s: Annotated[Duration, Meta(description="how long workers that are to share a long wait for each other")] = 4.0
    spill: Annotated[SpillTo, Meta(description="where this worker moves the KV of a paused long, if it is asked")] = (
        "memory"
    )
    spill_bytes_max: Annotated[
        int, _SPILLED, Meta(ge=1, le=2**50, description="bytes of KV moved there at once, at most")
    ] = 2**30
    spill_dir: Annotated[
        str, _TO_DISK, Meta(description="folder for that on disk; empty: the system's for temporary files")
    ] = ""
    long_nice: Annotated[
        int, Meta(ge=0, le=19, description="niceness of the thread that prefills longs (CPU): shorts come first")
    ] = 8


class DecodeWorkerSettings(WorkerSettings, frozen=True, kw_only=True):
    rows_max: Annotated[Count, Meta(description="sequences in one decode batch")] = 32
    expect_s: Annotated[Duration, Meta(description="how long KV stays reserved for a prompt that does not come")] = 30.0
    token_gather_ms: Annotated[
        Wait,
        Meta(
            description="tokens of steps that follow each other faster share a message to a router (with several "
            "rows: 4 ms a row, to 20); 0: none do"
        ),
    ] = 5.0
    decode_nice: Annotated[
        int, Meta(ge=0, le=19, description="niceness of the thread that decodes (CPU): prompts come first")
    ] = 16
    crowded_itl_ms: Annotated[
        float,
        Meta(
            ge=0.0,
            le=10_000.0,
            description="milliseconds between two decode steps while others want the same cores (CPU); 0: none",
        ),
    ] = 250.0


POSITIONAL = "positional"
"""Key in `Meta.extra`: the setting is an argument without a flag and without an environment variable."""

MaybeUrl = Annotated[str, Meta(description="empty: the one of the `pecsched serve` that runs here")]


class ServeSettings(SchedulerSettings, frozen=True, kw_only=True):
    """All roles on this machine. What they have in common and what people change most has a flag here;
    any other setting of a role is passed on from its environment variable."""

    nats_url: Annotated[str, Meta(description="NATS server; empty: start one")] = ""
    redis_url: Annotated[str, Meta(description="Redis server; empty: start one")] = ""
    log_json: Annotated[bool, Meta(description="log lines of the roles as JSON")] = False
    model: Annotated[str, Meta(description="folder or hub id of a causal LM; 'embedded': SmolLM2-135M-Instruct")] = (
        "embedded"
    )
    cache_dir: Annotated[str, Meta(description="where the converted model is kept; empty: ~/.cache/pecsched")] = ""
    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="HTTP port; 0: any free one")] = 8000
    served_model_name: Annotated[str, Meta(description="name in the API; empty: the model's own")] = ""
    api_key: Annotated[str, Meta(description="bearer token that clients must send; empty: none asked")] = ""
    metrics_port: Annotated[
        Port, Meta(description="of the roles' /metrics the first port, the others after it; 0: any free ones")
    ] = 0
    nodes: Annotated[
        int, Meta(ge=1, le=64, description="nodes that the workers are dealt out to, as if each were a machine")
    ] = 1
    workers_per_node: Annotated[
        int, Meta(ge=0, le=256, description="prefill workers of each node; 0: the prefill workers, shared out")
    ] = 0
    prefill_workers: Annotated[
        int, _INSTEAD_OF_NODES, Meta(ge=1, le=256, description="prefill worker processes, on all nodes together")
    ] = 2
    decode_workers: Annotated[int, Meta(ge=1, le=256, description="decode worker processes")] = 1
    tp: Annotated[int, Meta(ge=1, le=64, description="workers that share one copy of the weights; only 1 works")] = 1
    engine: Annotated[EngineName, Meta(description="'torch', or 'timed': answers at a cost model's speed")] = "torch"
    dtype: Annotated[DtypeName, Meta(description="'auto': bfloat16 where the machine is fast at it")] = "auto"
    device: Annotated[str, Meta(description="'auto', 'cpu', 'cuda', 'cuda:1' …")] = "auto"
    threads: Annotated[
        int, Meta(ge=0, le=1_024, description="compute threads of each worker (CPU); 0: the cores, shared out")
    ] = 0
    kv_capacity_tokens: Annotated[Count, Meta(description="tokens of KV each worker holds at most")] = 32_768
    restarts_max: Annotated[
        int, Meta(ge=0, le=1_000, description="crashes of one role within a minute after which all stops")
    ] = 5
    drain_s: Annotated[Duration, Meta(description="at Ctrl-C, how long running requests may take to finish")] = 20.0
    start_s: Annotated[Duration, Meta(description="how long the cluster may take to be complete")] = 300.0
    log_dir: Annotated[
        str, Meta(description="folder of the roles' logs; empty: a new one in ~/.cache/pecsched/runs")
    ] = ""


class StatusSettings(Record, frozen=True, kw_only=True):
    """What runs, where, and what waits."""

    nats_url: MaybeUrl = ""
    json: Annotated[bool, Meta(description="print the scheduler's answer as JSON")] = False
    timeout_s: Annotated[Duration, Meta(description="how long to wait for an answer")] = 5.0


class StorySettings(Record, frozen=True, kw_only=True):
    """What happened to one request, from the scheduler's log."""

    request_id: Annotated[str, Meta(description="as in the answer's `id`", extra={POSITIONAL: True})]
    nats_url: MaybeUrl = ""
    timeout_s: Annotated[Duration, Meta(description="how long to wait for an answer")] = 5.0


class AskSettings(Record, frozen=True, kw_only=True):
    """One question, the answer as it is generated."""

    question: Annotated[
        str, Meta(description="what to ask; '-': read it from standard input", extra={POSITIONAL: True})
    ]
    via: Annotated[Literal["http", "nats"], Meta(description="door to go through")] = "http"
    url: MaybeUrl = ""
    nats_url: MaybeUrl = ""
    max_tokens: Annotated[Count, Meta(description="longest answer in tokens")] = 256
    temperature: Annotated[float, Meta(ge=0.0, le=2.0, description="0: always the likeliest token")] = 0.0
    api_key: Annotated[str, Meta(description="bearer token, where the router asks for one")] = ""
    timeout_s: Annotated[Duration, Meta(description="longest silence")] = 120.0


EVERY_SETTINGS: tuple[type[Record], ...] = (
    RouterSettings,
    SchedulerSettings,
    CoordinatorSettings,
    PrefillWorkerSettings,
    DecodeWorkerSettings,
    ServeSettings,
    StatusSettings,
    StorySettings,
    AskSettings,
)
"""Of every command: what an environment variable may name."""

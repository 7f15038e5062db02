"""`python -m loadtest COMMAND`: see the package's docstring."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import loadtest
from common import logs
from common.errors import PecSchedError
from loadtest import (
    compare,
    control,
    engine,
    fidelity,
    fit_costs,
    mixed,
    mixed_report,
    overhead,
    page,
    paper,
    pause,
    pause_groups,
    report,
    run,
    scale,
    sim,
    sp,
)
from loadtest.flags import at_least_two, cluster_flags, not_negative, positive, rate, token_range

EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Benchmark:
    summary: str
    doc: str | None
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], dict[str, Any]]
    show: Callable[[dict[str, Any]], None]


def _mixed_flags(parser: argparse.ArgumentParser) -> None:
    cluster_flags(parser)
    defaults = mixed.MixedOptions()
    parser.add_argument(
        "--serve-pecsched", default="", metavar="FLAGS", help="as --serve, for the clusters whose policy is pecsched"
    )
    parser.add_argument(
        "--groups",
        type=at_least_two,
        default=0,
        metavar="N",
        help="measure PecSched with groups of up to N workers, too",
    )
    parser.add_argument("--rounds", type=positive, default=1, help="of PecSched without groups and with, in turn [1]")
    parser.add_argument("--shorts", type=positive, default=defaults.shorts, help="at least so many per setting [200]")
    parser.add_argument("--longs", type=not_negative, default=defaults.longs, help="at least so many per setting [8]")
    parser.add_argument(
        "--capacity-level-s", type=rate, default=defaults.capacity_level_s, help="seconds per level of concurrency [7]"
    )
    parser.add_argument("--short-rps", type=rate, help="arrivals per second [40 %% of the capacity, measured]")
    parser.add_argument("--long-rps", type=rate, help="arrivals per second [30 %% of the machine, measured]")
    parser.add_argument("--short-tokens", type=token_range, default=defaults.short_tokens, metavar="LOW-HIGH")
    parser.add_argument("--long-tokens", type=token_range, default=defaults.long_tokens, metavar="LOW-HIGH")


def _mixed(flags: argparse.Namespace) -> dict[str, Any]:
    return mixed.run(
        mixed.MixedOptions(
            seed=flags.seed,
            shorts=flags.shorts,
            longs=flags.longs,
            capacity_level_s=flags.capacity_level_s,
            short_rps=flags.short_rps,
            long_rps=flags.long_rps,
            short_tokens=flags.short_tokens,
            long_tokens=flags.long_tokens,
            url=flags.url,
            nats_url=flags.nats_url,
            api_key=flags.api_key,
            serve_flags=tuple(shlex.split(flags.serve)),
            pecsched_flags=tuple(shlex.split(flags.serve_pecsched)),
            groups=flags.groups,
            rounds=flags.rounds,
        )
    )


def _overhead_flags(parser: argparse.ArgumentParser) -> None:
    cluster_flags(parser)
    parser.add_argument("--requests", type=positive, default=overhead.OverheadOptions().requests, help="[200]")


def _overhead(flags: argparse.Namespace) -> dict[str, Any]:
    return overhead.run(
        overhead.OverheadOptions(
            seed=flags.seed,
            requests=flags.requests,
            url=flags.url,
            nats_url=flags.nats_url,
            api_key=flags.api_key,
            serve_flags=tuple(shlex.split(flags.serve)),
        )
    )


def _model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=not_negative, default=0, help="of all that is random [0]")
    parser.add_argument("--model", default="embedded", help="folder or hub id of a causal LM")
    parser.add_argument("--cache-dir", default="", help="where the converted model is kept")
    parser.add_argument("--tokens", type=positive, default=7_000, help="of the long prompt [7000]")
    parser.add_argument("--threads", type=positive, default=1, help="compute threads [1]")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")


def _pause_flags(parser: argparse.ArgumentParser) -> None:
    _model_flags(parser)
    parser.add_argument("--pauses", type=positive, default=pause.PauseOptions().pauses, help="at least so many [120]")
    parser.add_argument("--ranks", type=positive, default=1, help="workers that prefill the long together [1]")


def _pause(flags: argparse.Namespace) -> dict[str, Any]:
    run = pause.run if flags.ranks == 1 else pause_groups.run
    return run(
        pause.PauseOptions(
            seed=flags.seed,
            model=flags.model,
            cache_dir=flags.cache_dir,
            tokens=flags.tokens,
            threads=flags.threads,
            dtype=flags.dtype,
            pauses=flags.pauses,
            ranks=flags.ranks,
        )
    )


def _sp_flags(parser: argparse.ArgumentParser) -> None:
    _model_flags(parser)
    options = sp.SpOptions()
    parser.set_defaults(tokens=options.tokens, dtype=options.dtype)
    parser.add_argument("--ranks", type=positive, default=options.ranks, help="workers in the group [2]")
    parser.add_argument(
        "--runs", type=positive, default=options.runs, help="of each way, in turn; their median counts [3]"
    )


def _sp(flags: argparse.Namespace) -> dict[str, Any]:
    return sp.run(
        sp.SpOptions(
            seed=flags.seed,
            model=flags.model,
            cache_dir=flags.cache_dir,
            tokens=flags.tokens,
            threads=flags.threads,
            dtype=flags.dtype,
            ranks=flags.ranks,
            runs=flags.runs,
        )
    )


def _engine_flags(parser: argparse.ArgumentParser) -> None:
    _model_flags(parser)
    parser.add_argument("--runs", type=positive, default=3, help="of each way, in turn; their median counts [3]")


def _engine(flags: argparse.Namespace) -> dict[str, Any]:
    return engine.run(
        engine.EngineOptions(
            seed=flags.seed,
            model=flags.model,
            cache_dir=flags.cache_dir,
            tokens=flags.tokens,
            threads=flags.threads,
            dtype=flags.dtype,
            runs=flags.runs,
        )
    )


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError("must be whole numbers, like 0,1,2") from None
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError("must be different, and none negative")
    return seeds


def _fidelity_flags(parser: argparse.ArgumentParser) -> None:
    options = fidelity.FidelityOptions()
    parser.add_argument("--seeds", type=_seeds, default=options.seeds, metavar="N,N", help="a load for each [0,1,2]")
    parser.add_argument("--shorts", type=positive, default=options.shorts, help="at least so many per seed [120]")
    parser.add_argument("--longs", type=positive, default=options.longs, help="at least so many per seed [3]")
    parser.add_argument("--short-rps", type=rate, default=options.short_rps, help="arrivals per second [0.5]")
    parser.add_argument("--long-rps", type=rate, default=options.long_rps, help="arrivals per second [0.012]")
    parser.add_argument("--short-tokens", type=token_range, default=options.short_tokens, metavar="LOW-HIGH")
    parser.add_argument("--long-tokens", type=token_range, default=options.long_tokens, metavar="LOW-HIGH")
    parser.add_argument(
        "--serve", default="", metavar="FLAGS", help="more flags for `pecsched serve`, as one argument: --serve '…'"
    )


def _fidelity(flags: argparse.Namespace) -> dict[str, Any]:
    return fidelity.run(
        fidelity.FidelityOptions(
            seeds=flags.seeds,
            shorts=flags.shorts,
            longs=flags.longs,
            short_rps=flags.short_rps,
            long_rps=flags.long_rps,
            short_tokens=flags.short_tokens,
            long_tokens=flags.long_tokens,
            serve_flags=tuple(shlex.split(flags.serve)),
        )
    )


BENCHMARKS = {
    "mixed": Benchmark(
        "shorts alone, mixed under FIFO, mixed under PecSched", mixed.__doc__, _mixed_flags, _mixed, mixed_report.show
    ),
    "overhead": Benchmark(
        "what everything but the engine adds to a short",
        overhead.__doc__,
        _overhead_flags,
        _overhead,
        overhead.show,
    ),
    "control": Benchmark(
        "what routers, scheduler and bus can do", control.__doc__, control.add_flags, control.run_flags, control.show
    ),
    "pause": Benchmark(
        "pause latency of a prefill worker, or of a group", pause.__doc__, _pause_flags, _pause, pause.show
    ),
    "engine": Benchmark("stepped prefill and decode steps", engine.__doc__, _engine_flags, _engine, engine.show),
    "sp": Benchmark("long prefill by a group of workers", sp.__doc__, _sp_flags, _sp, sp.show),
    "run": Benchmark("a trace replayed on a live cluster, open loop", run.__doc__, run.add_flags, run.run, run.show),
    "compare": Benchmark("two runs side by side", compare.__doc__, compare.add_flags, compare.run, compare.show),
    "fit-costs": Benchmark(
        "coefficients of a GPU from measured tables",
        fit_costs.__doc__,
        fit_costs.add_flags,
        fit_costs.run_flags,
        fit_costs.show,
    ),
    "page": Benchmark(
        "what the live page costs, and its frames per second", page.__doc__, page.add_flags, page.run_flags, page.show
    ),
    "sim": Benchmark("a workload on a simulated cluster", sim.__doc__, sim.add_flags, sim.run, sim.show),
    "paper": Benchmark(
        "the paper's experiments, simulated, beside its figures", paper.__doc__, paper.add_flags, paper.run, paper.show
    ),
    "scale": Benchmark(
        "what a decision costs, 32 to 8,192 GPUs", scale.__doc__, scale.add_flags, scale.run, scale.show
    ),
    "fidelity": Benchmark(
        "the simulator's predictions beside the live cluster",
        fidelity.__doc__,
        _fidelity_flags,
        _fidelity,
        fidelity.show,
    ),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Leaves with status 2 and one line if they are wrong."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m loadtest", description=loadtest.__doc__, formatter_class=raw, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(
            name, help=benchmark.summary, description=benchmark.doc, formatter_class=raw, allow_abbrev=False
        )
        command.add_argument("--json", default="", metavar="FILE", help="write the figures there too")
        benchmark.add_flags(command)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 measured, 1 not, 130 interrupted."""
    flags = parse(sys.argv[1:] if argv is None else argv)
    benchmark = BENCHMARKS[flags.command]
    logs.setup("loadtest", level="warning", as_json=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the cluster is drained, not orphaned
    try:
        report.check_writable(flags.json)
        figures = benchmark.run(flags)
        benchmark.show(figures)
        if flags.json:
            report.write_json(flags.json, figures)
    except PecSchedError as error:
        print(f"loadtest {flags.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())

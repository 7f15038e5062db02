"""The cores of scheduler and workers as machine code, where there was a C compiler when PecSched was set up.

`python -m common.compiled` (a step of `make setup` and of `make test`) compiles the modules below with mypyc: the same
files, the same decisions (tests/policy/test_compiled.py), half the time. They are used only if they were made from
exactly what now stands in the source: who changes a file runs that file, with nothing to remember. Without a compiler
all runs from source.

    python -m common.compiled             compile, if that has not been done
    python -X from_source -m loadtest …   run from source this once
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

MODULES = (
    "capacity",
    "cluster",
    "colocation",
    "cost_model",
    "costs",
    "decode_pace",
    "decode_rows",
    "decode_worker",
    "elastic",
    "fifo",
    "growing",
    "leases",
    "ledger",
    "lifecycle",
    "lines",
    "load_index",
    "membership",
    "paces",
    "parting",
    "pecsched",
    "placement",
    "preemption",
    "prefill_books",
    "prefill_growth",
    "prefill_jobs",
    "prefill_outbox",
    "prefill_parting",
    "prefill_passes",
    "prefill_spill",
    "prefill_worker",
    "priority",
    "queues",
    "reconcile",
    "replica_pool",
    "reservation",
    "scheduler",
    "sequence_costs",
    "sequence_plan",
    "spill",
    "story",
    "timers",
    "transitions",
    "unpaused",
    "view",
)
"""Of common.policy: what runs in a scheduler's or a worker's event. No module with a `Record`: mypyc forgets the bounds
of fields. The coordinator's core costs its process little."""

LIBRARY = "pecsched_policy"
TOO_LONG_S = 600.0
_COMMON = Path(__file__).parent
_FOLDER = _COMMON / "policy" / "_compiled"
_MADE_FROM = "made_from.txt"


def digest() -> str:
    """Of all source that a compiled module was made from: its own, what it takes types and constants from, and this."""
    found = hashlib.sha256(f"{sys.version} {sysconfig.get_platform()}".encode())
    how = [_COMMON / name for name in ("units.py", "compiled.py", "compile_policy.py")]
    for path in [*sorted((_COMMON / "policy").glob("*.py")), *sorted((_COMMON / "messages").glob("*.py")), *how]:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def state(folder: Path = _FOLDER) -> str:
    """In the words that reports use: "compiled", or "from source" and why."""
    if "from_source" in sys._xoptions:
        return "from source (-X from_source)"
    try:
        made_from = (folder / _MADE_FROM).read_text()
    except OSError:
        return "from source (not compiled: make setup does it where there is a C compiler)"
    return "compiled" if made_from == digest() else "from source (changed since it was compiled: make setup)"


def folders(folder: Path = _FOLDER) -> list[str]:
    """Where to look for modules of common.policy before the source: the folder of the compiled ones, or nowhere."""
    if state(folder) != "compiled":
        return []
    name = LIBRARY + "__mypyc"
    path = folder / (name + str(sysconfig.get_config_var("EXT_SUFFIX")))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return [str(folder)]


def cannot() -> str | None:
    """Why nothing can be compiled here; None: it can."""
    compiler = str(sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return f"no C compiler here ({compiler})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers are not installed"
    if importlib.util.find_spec("mypyc") is None or importlib.util.find_spec("setuptools") is None:
        return "needs the packages mypy and setuptools (the extra dev)"
    return None


def compile_policy(folder: Path = _FOLDER) -> str:
    """The outcome, as one line. What cannot be compiled is not an error: it runs from source."""
    if state(folder) == "compiled":
        return "compiled before"
    reason = cannot()
    if reason is None:
        try:
            with tempfile.TemporaryDirectory(prefix="pecsched-policy-") as scratch:
                reason = _compile(folder, Path(scratch))
        except OSError as error:
            reason = str(error)
    return "compiled" if reason is None else f"runs from source: {reason}"


def _compile(folder: Path, scratch: Path) -> str | None:
    """Why it failed; None: it did not. Raises: OSError: no room, or no right to write there."""
    wanted, made = digest(), scratch / "made"
    command = [sys.executable, "-m", "common.compile_policy", str(made), str(scratch / "c")]
    try:
        ran = subprocess.run(
            command, cwd=_COMMON.parent, capture_output=True, text=True, timeout=TOO_LONG_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"compiling took more than {TOO_LONG_S:.0f} s"
    if ran.returncode != 0:
        log = _COMMON.parent / "build" / "compile_policy.log"
        log.parent.mkdir(exist_ok=True)
        log.write_text(ran.stdout + ran.stderr)
        return f"compiling failed, see {log}"
    compiled = made / "common" / "policy"
    for library in made.glob(f"{LIBRARY}__mypyc*"):
        library.rename(compiled / library.name)
    (compiled / _MADE_FROM).write_text(wanted)
    # A copy under another name first: what another process reads is whole, or not there.
    arriving = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    shutil.copytree(compiled, arriving, dirs_exist_ok=True)
    arriving.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
    arriving.rename(folder)
    return None


if __name__ == "__main__":
    sys.stdout.write(f"== the cores of scheduler and workers: {compile_policy()}\n")

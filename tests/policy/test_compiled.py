"""Cores compiled and from source: the same decisions, and never code that is not the source's."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common import compiled
from common.messages.base import Record

ROOT = Path(__file__).parents[2]
TOO_LONG_S = 300

compiled_here = pytest.mark.skipif(compiled.state() != "compiled", reason=f"the core runs {compiled.state()}")


def python(*arguments: str) -> str:
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=TOO_LONG_S, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_where_there_is_a_compiler_the_core_is_compiled():
    """`make test` has just done it; else every other test here would pass without having looked at anything."""
    if "from_source" in sys._xoptions or compiled.cannot():
        pytest.skip(compiled.cannot() or "from source because that was asked for")
    assert compiled.state() == "compiled"


@compiled_here
def test_the_same_events_get_the_same_answers_as_from_source():
    """Every policy's, over random requests, work, pauses, growth and faults: byte for byte."""
    script = "from tests.policy.test_determinism import digests; print(*digests(), sep='\\n')"
    as_compiled, from_source = python("-c", script), python("-X", "from_source", "-c", script)
    assert len(as_compiled.split()) >= 4
    assert as_compiled == from_source


@compiled_here
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("decision_cost", "scheduler_machine"), id="scheduler"),
        pytest.param(("prefill_worker_machine", "golden", "decode_worker"), id="workers"),
    ],
)
def test_from_source_holds_what_only_source_can_show(names):
    """That a decision's cost does not grow with the cluster is counted in calls; the machine's checks look inside. The
    workers' cores give from source what `make test` asks of them compiled. Apart, because hypothesis draws from the
    constants of all modules that are loaded, and a machine counts on what its draws come to."""
    files = [f"tests/policy/test_{name}.py" for name in names]
    said = python("-X", "from_source", "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert "skipped" not in said


@compiled_here
@pytest.mark.parametrize("module", compiled.MODULES)
def test_a_module_is_run_from_where_it_was_compiled(module):
    found = importlib.import_module(f"common.policy.{module}")
    assert Path(found.__spec__.origin).suffix in (".so", ".pyd")


def test_all_that_runs_in_an_event_of_scheduler_or_worker_is_compiled_or_has_its_reason():
    """Words, costs and plans, the protocol of a core (its error is a builtin's heir), the checks that tests make."""
    script = """import sys, common.policy.scheduler, common.policy.decode_worker, common.policy.prefill_worker
print(*(m for m in sys.modules if m.startswith('common.policy.')))"""
    listed = python("-X", "from_source", "-c", script)
    runs = {name.removeprefix("common.policy.") for name in listed.split()}
    assert set(compiled.MODULES) <= runs
    assert runs - set(compiled.MODULES) == {
        *("core", "scheduler_config", "scheduler_io", "decisions", "spill_orders", "invariants"),
        *("decode_events", "prefill_events", "words"),
        *("processors", "live_costs", "model_shapes", "sp_shares"),
        *("long_planner", "live_planner", "planned"),
    }


@pytest.mark.parametrize("module", compiled.MODULES)
def test_no_record_is_compiled(module):
    """Of a compiled class the annotations are plain types: the bounds of what is decoded into it would be gone."""
    found = vars(importlib.import_module(f"common.policy.{module}"))
    assert not [name for name, value in found.items() if _is_record_of(value, f"common.policy.{module}")]


def _is_record_of(value: object, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, Record) and value.__module__ == module


@compiled_here
def test_what_was_compiled_from_other_source_is_not_used(tmp_path):
    folder = tmp_path / "compiled"
    shutil.copytree(compiled._FOLDER, folder)
    assert compiled.state(folder) == "compiled"
    (folder / "made_from.txt").write_text("another digest")
    assert compiled.state(folder).startswith("from source (changed since")
    assert compiled.folders(folder) == []


def test_where_nothing_is_compiled_the_source_runs_and_says_why(tmp_path, monkeypatch):
    nowhere = tmp_path / "compiled"
    assert compiled.folders(nowhere) == []
    assert "not compiled: make setup" in compiled.state(nowhere) or "-X" in compiled.state(nowhere)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert compiled.compile_policy(nowhere).startswith("runs from source: no C compiler here")
    assert not nowhere.exists()

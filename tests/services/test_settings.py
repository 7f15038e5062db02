"""The settings loader: precedence, bounds, and one clear line for every mistake."""

from typing import get_args

import pytest

from common import settings as classes
from common.policy.scheduler import Scheduler
from common.policy.scheduler_config import SchedulerConfig
from common.settings import (
    AskSettings,
    PolicyName,
    PrefillWorkerSettings,
    RouterSettings,
    SchedulerSettings,
    ServeSettings,
)
from common.settings_loader import SettingsError, environment, load, settings_of
from services.scheduler.service import config_of


def refusal(cls, argv=(), env=None) -> str:
    with pytest.raises(SettingsError) as caught:
        load(cls, list(argv), env or {}, prog="pecsched role")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_flag_wins_over_variable_and_variable_over_default():
    env = {"PECSCHED_PORT": "9001"}
    assert load(RouterSettings, [], {}).port == 8000
    assert load(RouterSettings, [], env).port == 9001
    assert load(RouterSettings, ["--port", "9002"], env).port == 9002
    assert load(RouterSettings, ["--port=9003"], env).port == 9003


def test_values_have_the_type_of_their_field():
    settings = load(
        ServeSettings,
        ["--pause-share-max", "0.25", "--no-colocation", "--model", "42"],
        {"PECSCHED_RESTARTS_MAX": "0", "PECSCHED_LONG_ORDER": "arrival", "PECSCHED_DISAGGREGATION": "off"},
    )
    assert (settings.pause_share_max, settings.policy, settings.model) == (0.25, "pecsched", "42")
    assert (settings.colocation, settings.disaggregation, settings.long_order) == (False, False, "arrival")
    assert settings.restarts_max == 0


@pytest.mark.parametrize(("text", "value"), [("true", True), ("YES", True), ("1", True), ("off", False), ("0", False)])
def test_booleans_from_the_environment(text, value):
    assert load(RouterSettings, [], {"PECSCHED_LOG_JSON": text}).log_json is value


def test_boolean_flags_come_in_pairs():
    assert load(RouterSettings, ["--no-log-json"], {"PECSCHED_LOG_JSON": "1"}).log_json is False
    assert load(RouterSettings, ["--log-json"], {"PECSCHED_LOG_JSON": "0"}).log_json is True


@pytest.mark.parametrize(
    ("cls", "argv", "env", "parts"),
    [
        (RouterSettings, ["--port", "99999"], {}, ["--port", "whole number of 0 to 65535", "'99999'"]),
        (RouterSettings, [], {"PECSCHED_PORT": "http"}, ["PECSCHED_PORT", "whole number", "'http'"]),
        (SchedulerSettings, ["--policy", "lifo"], {}, ["--policy", "pecsched, fifo", "'lifo'"]),
        (SchedulerSettings, ["--pause-max-s", "0"], {}, ["--pause-max-s", "over 0.0", "86400"]),
        (SchedulerSettings, ["--pause-max-s", "nan"], {}, ["--pause-max-s"]),
        (RouterSettings, [], {"PECSCHED_LOG_JSON": "maybe"}, ["PECSCHED_LOG_JSON", "true or false", "'maybe'"]),
        (RouterSettings, ["--prot", "1"], {}, ["--prot", "no such flag", "--port"]),
        (RouterSettings, ["--por", "1"], {}, ["--por", "no such flag"]),
        (RouterSettings, ["surplus"], {}, ["surplus", "no such argument"]),
        (RouterSettings, ["--port"], {}, ["--port", "expected one argument"]),
        (AskSettings, [], {}, ["QUESTION", "required"]),
    ],
)
def test_a_mistake_is_one_line_that_names_flag_or_variable(cls, argv, env, parts):
    message = refusal(cls, argv, env)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("argv", "env", "message"),
    [
        (["--policy", "fifo", "--no-preemption"], {}, "--no-preemption: has no effect with --policy fifo"),
        (["--policy", "priority", "--preemption"], {}, "--preemption: has no effect with --policy priority"),
        (["--policy", "reservation", "--no-colocation"], {}, "--no-colocation: has no effect with"),
        (["--policy", "fifo", "--shorts-spare", "1"], {}, "it needs --policy pecsched"),
        (["--policy", "fifo", "--spill", "disk"], {}, "--spill: has no effect with --policy fifo"),
        (["--no-disaggregation", "--spill", "memory"], {}, "has no effect with --no-disaggregation; it needs"),
        (["--policy", "fifo", "--pause-max-s", "1"], {}, "--pause-max-s: has no effect with --policy fifo"),
        (["--no-preemption", "--pause-max-s", "1"], {}, "has no effect with --no-preemption; it needs --preemption"),
        (["--long-order", "arrival", "--long-aging", "0.1"], {}, "it needs --long-order remaining"),
        (["--internode-bytes-s", "1e9"], {}, "has no effect with --group-max 1; it needs --group-max 2"),
        (["--no-elastic"], {}, "--no-elastic: has no effect with --group-max 1; it needs --group-max 2"),
        (
            ["--policy", "fifo", "--group-max", "2", "--no-elastic"],
            {},
            "--no-elastic: has no effect with --policy fifo",
        ),
        (["--reserved-long-tokens", "9"], {}, "with --policy pecsched; it needs --policy reservation"),
        (["--policy", "fifo"], {"PECSCHED_COLOCATION": "0"}, "PECSCHED_COLOCATION: has no effect with --policy fifo"),
    ],
)
@pytest.mark.parametrize("cls", [SchedulerSettings, ServeSettings])
def test_a_setting_without_effect_beside_the_others_is_refused(cls, argv, env, message):
    assert message in refusal(cls, argv, env)


@pytest.mark.parametrize(
    ("argv", "env"),
    [
        (["--prefill-workers", "4", "--workers-per-node", "2"], {}),
        (["--prefill-workers", "2", "--nodes", "2", "--workers-per-node", "1"], {}),
        (["--workers-per-node", "2"], {"PECSCHED_PREFILL_WORKERS": "3"}),
        (["--prefill-workers", "3"], {"PECSCHED_WORKERS_PER_NODE": "2"}),
    ],
)
def test_two_settings_that_say_the_same_thing_are_not_both_taken(argv, env):
    message = refusal(ServeSettings, argv, env)
    assert "says the same thing as" in message
    assert "give one of them" in message
    for name in ("prefill_workers", "workers_per_node"):
        assert ("PECSCHED_" + name.upper() if "PECSCHED_" + name.upper() in env else "--" + name.replace("_", "-")) in (
            message
        )


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_every_policy_and_no_disaggregation_with_each_reach_the_scheduler_through_serve(policy):
    serve = load(ServeSettings, ["--policy", policy, "--no-disaggregation"], {"PECSCHED_PREEMPTION": "true"})
    scheduler = load(SchedulerSettings, [], environment(serve, SchedulerSettings))
    config = config_of(scheduler)
    assert (config.policy, config.disaggregation, config.preemption) == (policy, False, True)
    assert Scheduler(config, epoch=1).next_deadline_s() is None


def test_every_switch_of_the_core_that_is_offered_has_the_cores_default():
    core, offered = SchedulerConfig(), SchedulerSettings()
    differ = {n for n in SchedulerConfig.__struct_fields__ if getattr(core, n) != getattr(offered, n, getattr(core, n))}
    assert not differ


def test_a_variable_that_no_command_knows_is_refused_with_the_likeliest_meant():
    message = refusal(RouterSettings, env={"PECSCHED_TRESHOLD_TOKENS": "1"})
    assert message == "PECSCHED_TRESHOLD_TOKENS: no such setting; did you mean PECSCHED_THRESHOLD_TOKENS?"


def test_one_environment_may_serve_all_roles():
    env = {"PECSCHED_THRESHOLD_TOKENS": "512", "PECSCHED_CHUNK_TOKENS": "256", "HOME": "somewhere"}
    assert load(SchedulerSettings, [], env).threshold_tokens == 512
    assert load(PrefillWorkerSettings, [], env).chunk_tokens == 256
    assert load(RouterSettings, [], env) == RouterSettings()


def test_environment_hands_common_settings_to_another_command():
    serve = load(ServeSettings, ["--threshold-tokens", "64", "--no-log-json", "--threads", "3"], {})
    env = environment(serve, PrefillWorkerSettings, worker_id="prefill-7", threads=2)
    worker = load(PrefillWorkerSettings, [], env)
    assert (worker.worker_id, worker.threads, worker.log_json) == ("prefill-7", 2, False)
    assert "PECSCHED_CHUNK_TOKENS" not in env, "a field that serve lacks keeps its own variable"
    scheduler = load(SchedulerSettings, [], environment(serve, SchedulerSettings))
    assert scheduler.threshold_tokens == 64


def test_help_lists_every_setting_with_default_and_variable(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as left:
        load(ServeSettings, ["--help"], {}, prog="pecsched serve")
    assert left.value.code == 0
    text = capsys.readouterr().out
    for setting in settings_of(ServeSettings):
        assert setting.flag in text
        assert setting.variable in text
    assert "default 2048" in text


@pytest.mark.parametrize("cls", classes.EVERY_SETTINGS, ids=lambda cls: cls.__name__)
def test_every_setting_is_described_and_has_a_valid_default(cls):
    required = [setting for setting in settings_of(cls) if setting.positional]
    loaded = load(cls, ["text"] * len(required), {})
    assert load(cls, ["text"] * len(required), environment(loaded, cls) if not required else {}) == loaded
    for setting in settings_of(cls):
        assert setting.description, setting.name

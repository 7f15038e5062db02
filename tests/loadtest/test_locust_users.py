"""Pieces of the locustfile: the loop beside gevent (in processes of their own, patched as locust's are), the shape."""

from __future__ import annotations

import subprocess
import sys

PATCHED = "from gevent import monkey; monkey.patch_all()\n"


def output_of(script: str) -> list[str]:
    """What a script prints, in a process that gevent has patched."""
    ended = subprocess.run([sys.executable, "-c", PATCHED + script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return ended.stdout.splitlines()


def test_greenlets_wait_together_for_coroutines() -> None:
    script = """
import asyncio, time, gevent
from loadtest.locust_users.bridge import LoopThread
bridge = LoopThread()
met = asyncio.Event()
waiting = 0

async def meet():
    global waiting
    waiting += 1
    if waiting == 3:
        met.set()
    await met.wait()  # one that held the loop, or the hub, would hold up all
    return waiting

print([g.get(timeout=30) for g in [gevent.spawn(bridge.run, meet) for _ in range(3)]])
bridge.stop()
print("ended")
"""
    assert output_of(script) == ["[3, 3, 3]", "ended"]


def test_an_error_comes_back_and_a_killed_greenlet_cancels() -> None:
    script = """
import asyncio, gevent
from gevent.event import Event
from loadtest.locust_users.bridge import LoopThread
bridge = LoopThread()
told = []

async def fail():
    raise ValueError("as it was")

begun = asyncio.Event()

async def hang():
    begun.set()
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        told.append("cancelled")
        raise

async def look():
    return list(told)

try:
    bridge.run(fail)
except ValueError as error:
    print(error)
waiting = gevent.spawn(bridge.run, hang)
gevent.sleep(0)
bridge.run(begun.wait)
waiting.kill()
print(bridge.run(look) or bridge.run(look))
bridge.stop()
"""
    assert output_of(script) == ["as it was", "['cancelled']"]


def test_there_are_as_many_users_as_the_rate_wants() -> None:
    script = """
from loadtest.locust_users.shape import TraceShape
slow, fast = [at / 2 for at in range(200)], [200 + at / 10 for at in range(1000)]
shape = TraceShape([*slow, *fast], 0.5)
print([shape.users_at(now_s) for now_s in (0.0, 50.0, 150.0, 250.0)])
for now_s in (50.0, 290.0, 301.0):
    shape.get_run_time = lambda: now_s
    print(shape.tick())
short = TraceShape(slow, 0.5, 5.0)
short.get_run_time = lambda: 6.0
print(short.tick())
"""
    assert output_of(script) == ["[4, 4, 1, 20]", "(4, 4.0)", "(20, 20.0)", "None", "None"]


def test_without_a_number_there_are_users_of_both_kinds() -> None:
    """Locust's own default is one user, who would be of one kind only."""
    script = """
from argparse import Namespace
from locust.env import Environment
from loadtest.locust_users.start import crowd
for num_users, spawn_rate in ((None, None), (1, None), (3, 2.0)):
    said = Namespace(num_users=num_users, spawn_rate=spawn_rate)
    crowd(Environment(parsed_options=said))
    print((said.num_users, said.spawn_rate))
"""
    assert output_of(script) == ["(8, 4.0)", "(1, 4.0)", "(3, 2.0)"]

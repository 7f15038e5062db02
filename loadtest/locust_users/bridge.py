"""An asyncio loop beside gevent.

Locust has patched the process before this is imported: sockets, threads, locks and selectors of the standard library
are gevent's, and a `threading.Thread` is a greenlet. nats-py wants an asyncio loop, and an asyncio loop that runs in a
greenlet would stop all others while it waits. So:

*The loop runs in a real thread of the system*, one of gevent's own thread pool, which is not patched. It is uvloop's:
polling, sockets, name resolution and waking up are libuv's, in C, so that nothing patched is called in that thread.

*A greenlet hands a coroutine over* with `call_soon_threadsafe` and waits for a gevent `AsyncResult`, as greenlets wait.

*The loop's thread answers* by putting the finished task into a deque and sending an `async` watcher of the hub, the
one call of gevent that any thread may make. The hub then wakes the greenlet. No lock is shared.

A greenlet that is killed meanwhile cancels its coroutine.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import gevent
import uvloop
from gevent.event import AsyncResult
from gevent.threadpool import ThreadPool

T = TypeVar("T")


class LoopThread:
    """One for all users of a process."""

    def __init__(self) -> None:
        self._ended: deque[tuple[AsyncResult, asyncio.Task[Any]]] = deque()
        self._bell = gevent.get_hub().loop.async_(ref=False)  # an idle bridge does not keep the hub alive
        self._bell.start(self._wake)
        self._loop = uvloop.new_event_loop()
        self._thread = ThreadPool(1)
        self._running = self._thread.spawn(self._loop.run_forever)

    def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run the coroutine on the loop; only the calling greenlet waits. Raises: what the coroutine raises."""
        result = AsyncResult()
        begun: list[asyncio.Task[T]] = []

        def begin() -> None:
            task = self._loop.create_task(make())
            begun.append(task)
            task.add_done_callback(lambda ended: self._ring(result, ended))

        def cancel() -> None:
            for task in begun:
                task.cancel()

        self._loop.call_soon_threadsafe(begin)
        try:
            value: T = result.get()
        except gevent.GreenletExit:
            self._loop.call_soon_threadsafe(cancel)  # after `begin`: the loop keeps the order
            raise
        return value

    def stop(self) -> None:
        """End the thread. What still runs on the loop is left where it stands."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._running.wait()
        self._bell.stop()

    def _ring(self, result: AsyncResult, ended: asyncio.Task[Any]) -> None:
        """In the loop's thread."""
        self._ended.append((result, ended))
        self._bell.send()

    def _wake(self) -> None:
        """In the hub."""
        while self._ended:
            result, task = self._ended.popleft()
            if task.cancelled():
                result.set_exception(asyncio.CancelledError())
            elif (error := task.exception()) is not None:
                result.set_exception(error)
            else:
                result.set(task.result())

"""The router's ear for the live page: a silent second subscriber to what the roles send each other.

Nobody sends anything for it, and while nobody looks it hears nothing. One feed serves all pages of a router: what it
hears is folded once (`activity.py`) and encoded once, at most every `TICK_S`. Of most messages the tag alone is read.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec

from common.logs import get_logger
from common.messages.base import Message
from common.messages.views import ClusterView
from common.runtime import subjects, wire
from common.runtime.bus import Bus, BusError, Delivery
from common.runtime.supervisor import Supervisor
from services.router.activity import Activity, Heard
from services.router.activity_records import Change, State
from services.router.api_errors import ApiError

SUBJECTS = (subjects.SCHEDULER, subjects.COORDINATOR, subjects.WORKERS)
TICK_S = 0.1
"""Least time between two changes that pages are sent."""
LOOK_S = 1.0
"""How often the scheduler is asked for its view."""
LINGER_S = 5.0
"""After the last page left: a page that is loaded again finds what it has shown."""
CHUNKS_MAX = 64
"""What waits for a slow page; then it is let go, and begins anew."""

log = get_logger(__name__)

_KINDS: dict[str, type[Message]] = {str(kind.__struct_config__.tag): kind for kind in get_args(Heard)}


@dataclass(slots=True, eq=False)
class Page:
    """One that looks."""

    _chunks: deque[bytes] = field(default_factory=deque)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: bool = False

    async def chunks(self) -> AsyncIterator[bytes]:
        """Server-sent events, until the page is too slow or the router stops."""
        while True:
            while self._chunks:
                yield self._chunks.popleft()
            if self._ended:
                return
            self._wake.clear()
            await self._wake.wait()

    def put(self, chunk: bytes) -> None:
        if len(self._chunks) >= CHUNKS_MAX:
            self.end("this page reads too slowly")
        elif not self._ended:
            self._chunks.append(chunk)
            self._wake.set()

    def end(self, reason: str) -> None:
        """It hears why, and nothing more."""
        if not self._ended:
            self._ended = True
            self._chunks.clear()
            self._chunks.append(event("end", reason))
            self._wake.set()


class ActivityFeed:
    def __init__(
        self,
        bus: Bus,
        ask: Callable[[], Awaitable[ClusterView]],
        spawn: Callable[..., object],
        *,
        model: str,
        pages_max: int,
    ) -> None:
        """`ask` raises ApiError where no scheduler answers; `spawn(coroutine, name=…)` owns the feed's task."""
        self._bus = bus
        self._ask = ask
        self._spawn: Callable[[Coroutine[Any, Any, None], str], object] = lambda work, name: spawn(work, name=name)
        self._model = model
        self._pages_max = pages_max
        self._pages: set[Page] = set()
        self._activity: Activity | None = None
        """None: nobody looks, nothing is heard."""
        self._news = asyncio.Event()
        self._came = asyncio.Event()

    def __repr__(self) -> str:
        return f"ActivityFeed(pages={len(self._pages)}, {self._activity})"

    @property
    def is_listening(self) -> bool:
        return self._activity is not None

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[Page]:
        """Raises: ApiError 503, when `pages_max` look already."""
        if len(self._pages) >= self._pages_max:
            text = f"{self._pages_max} live pages are open, and no more may be (--pages-max); close one"
            raise ApiError(503, "too_many_pages", text, retry_after_s=5.0)
        page = Page()
        self._pages.add(page)
        self._came.set()
        if self._activity is None:
            self._activity = Activity(_now_s())
            self._spawn(self._listen(self._activity), "activity")
        now_s = _now_s()
        history = tuple(self._activity.history)
        page.put(event("state", State(self._model, self._activity.whole(now_s), history)))
        try:
            yield page
        finally:
            self._pages.discard(page)
            self._news.set()

    def close(self) -> None:
        """The router stops: every page hears it."""
        for page in self._pages:
            page.end("the router stops")

    # --- while somebody looks --------------------------------------------------------------------

    async def _listen(self, activity: Activity) -> None:
        try:
            async with AsyncExitStack() as ears, Supervisor() as tasks:
                for subject in SUBJECTS:
                    subscription = await self._bus.subscribe(subject, self._hear)
                    ears.push_async_callback(subscription.unsubscribe)
                tasks.spawn(self._look(activity), name="cluster views")
                while await self._somebody_looks():
                    await self._news.wait()
                    self._news.clear()
                    self._tell(activity)
                    await asyncio.sleep(TICK_S)
                self._activity = None  # at once: whoever comes now begins anew
        except BusError as error:
            log.warning("the live page hears nothing", error=str(error))
            for page in self._pages:
                page.end("the router cannot reach NATS")
        finally:
            if self._activity is activity:
                self._activity = None

    async def _somebody_looks(self) -> bool:
        """Waits a while for the next page after the last one left."""
        if self._pages:
            return True
        self._came.clear()
        try:
            async with asyncio.timeout(LINGER_S):
                await self._came.wait()
        except TimeoutError:
            return bool(self._pages)
        return True

    async def _look(self, activity: Activity) -> None:
        while True:
            try:
                view = await self._ask()
            except ApiError:
                activity.scheduler_lost(_now_s())
            else:
                activity.reconcile(view, _now_s())
            self._news.set()
            await asyncio.sleep(LOOK_S)

    async def _hear(self, delivery: Delivery) -> None:
        kind = _KINDS.get(wire.tag_of(delivery.data))
        if kind is None or self._activity is None:
            return  # most: heartbeats, orders whose answers tell more
        try:
            message: Any = wire.decode(delivery.data, kind)
        except wire.WireError as error:
            log.warning("an unreadable message is not shown", subject=delivery.subject, error=str(error))
            return
        self._activity.handle(message, _now_s())
        self._news.set()

    def _tell(self, activity: Activity) -> None:
        if not activity.is_changed:
            return
        chunk = event("change", activity.take_change(_now_s()))
        for page in self._pages:
            page.put(chunk)


def event(name: str, data: State | Change | str) -> bytes:
    """A server-sent event: JSON has no line ends."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))


def _now_s() -> float:
    return asyncio.get_running_loop().time()

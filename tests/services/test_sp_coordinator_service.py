"""The SP coordinator's shell on the in-memory bus and store, in virtual time."""

import asyncio
from contextlib import asynccontextmanager

from common.messages.cluster import CoordinatorHeartbeat, CoordinatorLeft
from common.messages.requests import Prompt, RequestSpec
from common.messages.sp import (
    DropSegment,
    FormGroup,
    GroupFailed,
    GroupFinished,
    GroupFormed,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    LoadSegment,
    PauseGroup,
    PauseSegment,
    ResumeGroup,
    RunSegment,
    SegmentDropped,
    SegmentLoaded,
    SegmentPaused,
    SegmentRunning,
)
from common.runtime import subjects
from common.runtime.bus_memory import MemoryBroker, MemoryBus
from common.runtime.store_memory import MemoryStore
from common.runtime.virtual_time import virtual
from common.runtime.wire import decode, encode
from common.settings import CoordinatorSettings
from services.sp_coordinator.service import SpCoordinator

SETTINGS = CoordinatorSettings()
ToScheduler = (
    CoordinatorHeartbeat
    | CoordinatorLeft
    | GroupFormed
    | GroupPaused
    | GroupResumed
    | GroupPrefillFinished
    | GroupFinished
    | GroupFailed
)
ToWorker = LoadSegment | RunSegment | PauseSegment | DropSegment


class World:
    """A coordinator between a scheduler's ears and one obedient worker."""

    def __init__(self):
        self.broker = MemoryBroker()
        self.store = MemoryStore()
        self.bus = MemoryBus(self.broker, "world")
        self.heard = []
        self.worker_answers = True
        self.tasks = {}

    async def listen(self):
        async def scheduler(delivery):
            self.heard.append(decode(delivery.data, ToScheduler))

        await self.bus.subscribe(subjects.SCHEDULER, scheduler)
        await self.bus.subscribe(subjects.worker("w"), self.obey)

    async def obey(self, delivery):
        order = decode(delivery.data, ToWorker)
        if not self.worker_answers:
            return
        spec = getattr(order, "spec", order)
        ids = {"worker_id": "w", "request_id": spec.request_id, "attempt": spec.attempt}
        match order:
            case LoadSegment():
                answer = SegmentLoaded(**ids)
            case RunSegment():
                answer = SegmentRunning(**ids)
            case PauseSegment():
                answer = SegmentPaused(**ids, step=3, prefilled_tokens=512, pause_latency_s=0.01)
            case DropSegment():
                answer = SegmentDropped(**ids)
        await self.bus.publish(subjects.COORDINATOR, encode(answer))

    def coordinator(self, incarnation):
        service = SpCoordinator(SETTINGS, MemoryBus(self.broker, incarnation), self.store, incarnation=incarnation)
        self.tasks[service] = asyncio.get_running_loop().create_task(service.run())
        return service

    async def order(self, message):
        await self.bus.publish(subjects.COORDINATOR, encode(message))
        await asyncio.sleep(0.01)

    async def form(self, request_id="a"):
        spec = RequestSpec(request_id=request_id, router_id="r", prompt=Prompt(tokens=4_000, key="k"), max_tokens=8)
        await self.order(FormGroup(spec=spec, members=("w",), epoch=1))

    def words(self):
        return [message for message in self.heard if type(message) is not CoordinatorHeartbeat]

    def beats(self):
        return [message for message in self.heard if type(message) is CoordinatorHeartbeat]


@asynccontextmanager
async def world():
    found = World()
    await found.listen()
    try:
        yield found
    finally:
        for task in found.tasks.values():
            task.cancel()
        await asyncio.gather(*found.tasks.values(), return_exceptions=True)


IDS = {"request_id": "a", "attempt": 0, "epoch": 1}


@virtual
async def test_a_group_is_formed_paused_and_resumed_over_the_bus():
    async with world() as w:
        w.coordinator("one")
        await asyncio.sleep(0.1)
        await w.form()
        await w.order(PauseGroup(**IDS))
        await w.order(ResumeGroup(**IDS))
        assert [type(word) for word in w.words()] == [GroupFormed, GroupPaused, GroupResumed]
        assert w.words()[1].step == 3


@virtual
async def test_heartbeats_name_the_groups_and_say_again_where_they_stand():
    async with world() as w:
        w.coordinator("one")
        await asyncio.sleep(0.1)
        assert (w.beats()[-1].incarnation, w.beats()[-1].driving) == ("one", ())
        await w.form()
        await w.order(PauseGroup(**IDS))
        said = len(w.words())
        beats = len(w.beats())
        await asyncio.sleep(3 * SETTINGS.heartbeat_s)
        assert len(w.beats()) - beats == 3
        assert w.beats()[-1].driving == (("a", 0),)
        assert [type(word) for word in w.words()[said:]] == [GroupFormed, GroupPaused] * 3


@virtual
async def test_a_heartbeat_follows_a_reconnect_at_once():
    async with world() as w:
        w.coordinator("one")
        await asyncio.sleep(0.1)
        beats = len(w.beats())
        w.broker.cut("one")
        w.broker.heal("one")
        await asyncio.sleep(0.01)
        assert len(w.beats()) == beats + 1


@virtual
async def test_of_two_only_one_obeys():
    async with world() as w:
        first, second = w.coordinator("one"), w.coordinator("two")
        await asyncio.sleep(0.1)
        await w.form()
        assert (first.core.driving(), second.core.driving()) == ((("a", 0),), ())
        assert [type(word) for word in w.words()] == [GroupFormed]
        first.stop()
        await asyncio.sleep(SETTINGS.lease_s)
        assert w.beats()[-1].incarnation == "two"


@virtual
async def test_stop_dissolves_what_runs_and_says_so():
    async with world() as w:
        service = w.coordinator("one")
        await asyncio.sleep(0.1)
        await w.form()
        service.stop()
        await asyncio.wait_for(w.tasks.pop(service), 1.0)
        assert [type(word) for word in w.words()] == [GroupFormed, CoordinatorLeft, GroupFailed]
        assert w.words()[-1].retryable
        assert type(w.heard[-1]) is not CoordinatorHeartbeat


@virtual
async def test_stop_with_nothing_to_do_returns_at_once():
    async with world() as w:
        service = w.coordinator("one")
        await asyncio.sleep(0.1)
        service.stop()
        await asyncio.wait_for(w.tasks.pop(service), 0.1)


@virtual
async def test_stop_does_not_wait_for_a_silent_member_for_ever():
    async with world() as w:
        service = w.coordinator("one")
        await asyncio.sleep(0.1)
        await w.form()
        w.worker_answers = False
        service.stop()
        await asyncio.wait_for(w.tasks.pop(service), 2 * SETTINGS.answer_s)
        assert type(w.words()[-1]) is GroupFailed


@virtual
async def test_a_silent_member_fails_its_group():
    async with world() as w:
        w.coordinator("one")
        w.worker_answers = False
        await asyncio.sleep(0.1)
        await w.form()
        await asyncio.sleep(SETTINGS.answer_s)
        assert [type(word) for word in w.words()] == [GroupFailed]
        assert "has not answered" in w.words()[0].reason


@virtual
async def test_unreadable_messages_change_nothing():
    async with world() as w:
        w.coordinator("one")
        await asyncio.sleep(0.1)
        await w.bus.publish(subjects.COORDINATOR, b"\xc1")
        await w.form()
        assert [type(word) for word in w.words()] == [GroupFormed]

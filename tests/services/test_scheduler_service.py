"""The scheduler's shell on the in-memory bus and store, in virtual time."""

import asyncio
import json
from contextlib import asynccontextmanager, nullcontext

import pytest

from common.messages.cluster import RouterHeartbeat, RouterLeft, WorkerHeartbeat
from common.messages.prefill import RunPrefill
from common.messages.records import RequestRecord
from common.messages.requests import Prompt, RequestSpec
from common.messages.scheduling import (
    CancelRequested,
    RequestAccepted,
    RequestInterrupted,
    RequestRefused,
    RequestSubmitted,
)
from common.messages.views import ClusterView, DescribeCluster, QueryFailed, StoryTold, TellStory
from common.runtime import keys, subjects
from common.runtime.bus import NoResponders
from common.runtime.bus_memory import MemoryBroker, MemoryBus
from common.runtime.lease import LeaseLost
from common.runtime.store import Delete, Put, StoreError
from common.runtime.store_memory import MemoryStore
from common.runtime.virtual_time import virtual
from common.runtime.wire import decode, decode_record, encode
from common.settings import SchedulerSettings
from services.scheduler.service import GATHER_S, STORE_REST_S, WRITE_S, SchedulerService, config_of
from tests.policy.scenario import profile

SETTINGS = SchedulerSettings()
ToRouter = RequestAccepted | RequestRefused | RequestInterrupted


class World:
    """A broker, a store, and one router's and one worker's ears."""

    def __init__(self):
        self.broker = MemoryBroker()
        self.store = MemoryStore()
        self.bus = MemoryBus(self.broker, "world")
        self.router = []
        self.worker = []
        self.running = {}

    async def listen(self):
        async def router(delivery):
            self.router.append(decode(delivery.data, ToRouter))

        async def worker(delivery):
            self.worker.append(delivery.data)

        await self.bus.subscribe(subjects.router("r"), router)
        await self.bus.subscribe(subjects.worker("p0"), worker)

    def scheduler(self, name, **more):
        service = SchedulerService(SETTINGS, MemoryBus(self.broker, name), self.store, owner=name, **more)
        self.running[service] = asyncio.get_running_loop().create_task(service.run())
        return service

    async def say(self, message):
        await self.bus.publish(subjects.SCHEDULER, encode(message))
        await asyncio.sleep(0.01)

    async def submit(self, request_id, attempt=0, reply_inbox=None):
        spec = RequestSpec(
            request_id=request_id,
            attempt=attempt,
            router_id="r",
            prompt=Prompt(tokens=3, inline=b"\0" * 12),
            max_tokens=4,
            reply_inbox=reply_inbox,
        )
        await self.say(RequestSubmitted(spec=spec))

    async def ask(self, query):
        answer = await self.bus.request(subjects.SCHEDULER_QUERY, encode(query), timeout_s=1.0)
        return decode(answer.data, ClusterView | StoryTold | QueryFailed)


@asynccontextmanager
async def world():
    found = World()
    await found.listen()
    try:
        yield found
    finally:
        for task in found.running.values():
            task.cancel()
        await asyncio.gather(*found.running.values(), return_exceptions=True)


async def until_active(service):
    for _ in range(1_000):
        if service.epoch is not None:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{service} never became active")


@virtual
async def test_the_record_of_a_request_follows_its_order():
    async with world() as w:
        await until_active(w.scheduler("s1"))
        for worker_profile in (profile("p0"), profile("d0", "decode")):
            await w.say(WorkerHeartbeat(profile=worker_profile))
        await w.submit("a")
        assert [type(m) for m in w.router] == [RequestAccepted]
        (order,) = [decode(data, RunPrefill) for data in w.worker]
        assert order.epoch == 1
        await asyncio.sleep(2 * GATHER_S)
        record = decode_record(await w.store.get(keys.request("a")), RequestRecord)
        assert (record.spec.request_id, record.state, set(record.workers)) == ("a", "prefilling", {"p0", "d0"})


@virtual
async def test_records_of_a_burst_share_a_transaction_and_the_last_word_counts():
    async with world() as w:
        service = w.scheduler("s1")
        await until_active(service)
        commits, commit = [], w.store.commit

        async def slow(writes):
            commits.append(len(writes))
            await asyncio.sleep(0.1)
            await commit(writes)

        w.store.commit = slow
        for number in range(20):
            await w.submit(f"r{number}")
        assert len(w.router) == 20, "no message waits for the store"
        for number in range(20):
            await w.say(CancelRequested(request_id=f"r{number}", router_id="r"))
        await asyncio.sleep(1.0)
        assert await w.store.scan(keys.requests()) == {}
        assert len(commits) <= 6


@virtual
async def test_a_request_that_ends_at_once_leaves_no_trace_in_the_store():
    async with world() as w:
        await until_active(w.scheduler("s1"))
        commits, commit = [], w.store.commit

        async def counting(writes):
            commits.extend(writes)
            await commit(writes)

        w.store.commit = counting
        await w.submit("a")
        await w.say(CancelRequested(request_id="a", router_id="r"))
        await asyncio.sleep(2 * GATHER_S)
        assert commits == []
        await w.submit("b")
        await asyncio.sleep(2 * GATHER_S)
        await w.say(CancelRequested(request_id="b", router_id="r"))
        await asyncio.sleep(2 * GATHER_S)
        assert [type(write) for write in commits] == [Put, Delete]


@virtual
async def test_a_scheduler_that_stops_leaves_its_last_records():
    async with world() as w:
        service = w.scheduler("s1")
        await until_active(service)
        commit = w.store.commit

        async def slow(writes):
            await asyncio.sleep(0.2)
            await commit(writes)

        w.store.commit = slow
        await w.submit("a")
        await w.submit("b")
        service.stop()
        await w.running.pop(service)
        assert len(await w.store.scan(keys.requests())) == 2


@virtual
async def test_a_standby_hears_nothing_and_takes_over_with_a_higher_epoch():
    async with world() as w:
        first, second = w.scheduler("s1"), w.scheduler("s2")
        await until_active(first)
        await w.submit("a")
        assert second.epoch is None
        assert second.core is None
        view = await w.ask(DescribeCluster())
        assert view.queued_shorts == 1
        first.stop()
        await until_active(second)
        assert second.epoch == first.epoch + 1
        # The router's heartbeat names what the new one cannot know: it is submitted again.
        await w.say(RouterHeartbeat(router_id="r", waiting=(("a", 0),)))
        assert w.router[-1].epoch == second.epoch
        assert type(w.router[-1]) is RequestInterrupted
        await w.submit("a", attempt=1)
        assert type(w.router[-1]) is RequestAccepted


@virtual
async def test_a_killed_scheduler_is_followed_when_its_lease_ends():
    async with world() as w:
        first, second = w.scheduler("s1"), w.scheduler("s2")
        await until_active(first)
        release = first._lease.release
        first._lease.release = lambda: asyncio.sleep(0)  # a killed process releases nothing
        w.running[first].cancel()
        killed_s = asyncio.get_running_loop().time()
        await until_active(second)
        assert asyncio.get_running_loop().time() - killed_s <= SETTINGS.lease_s * 1.5
        await release()


@virtual
async def test_losing_the_lease_ends_the_process_with_a_clear_line():
    async with world() as w:
        service = w.scheduler("s1")
        await until_active(service)
        await w.store.commit([Put(keys.scheduler_lease(), b"somebody else")])
        with pytest.raises(LeaseLost, match=r"lease:scheduler is no longer ours"):
            await w.running.pop(service)


@virtual
async def test_a_store_that_forgot_the_lease_gives_it_back():
    async with world() as w:
        service = w.scheduler("s1")
        await until_active(service)
        await w.store.release_lease(keys.scheduler_lease(), "s1")
        await asyncio.sleep(3 * SETTINGS.lease_s)
        assert not w.running[service].done()
        assert await w.store.renew_lease(keys.scheduler_lease(), "s1", 1.0)


@virtual
async def test_without_the_store_messages_go_on_and_records_follow():
    async with world() as w:
        service = w.scheduler("s1")
        await until_active(service)
        w.store.down = True
        for number in range(50):
            await w.submit(f"r{number}")
        assert [type(m) for m in w.router] == [RequestAccepted] * 50
        await asyncio.sleep(GATHER_S)
        view = await w.ask(DescribeCluster())
        assert view.counters["store_errors"] == service.store_errors
        assert 1 <= service.store_errors < 50
        w.store.down = False
        await asyncio.sleep(STORE_REST_S + 0.1)
        assert len(await w.store.scan(keys.requests())) == 50


@virtual
async def test_a_store_that_hangs_holds_no_message_up():
    async with world() as w:
        service = w.scheduler("s1")
        await until_active(service)

        async def hang(writes):
            await asyncio.sleep(3_600)

        w.store.commit = hang
        await w.submit("a")
        await w.submit("b")
        assert len(w.router) == 2
        await asyncio.sleep(GATHER_S + WRITE_S + 0.01)
        assert service.store_errors == 1


@virtual
async def test_a_store_that_is_away_does_not_end_an_active_scheduler():
    async with world() as w:
        service = w.scheduler("s1")
        await until_active(service)
        w.store.down = True
        await asyncio.sleep(5 * SETTINGS.lease_s)
        await w.submit("a")
        assert type(w.router[-1]) is RequestAccepted
        assert not w.running[service].done()


@virtual
async def test_records_of_a_former_scheduler_go():
    async with world() as w:
        await w.store.commit([Put(keys.request("old"), b"x")])
        await until_active(w.scheduler("s1"))
        assert await w.store.scan(keys.requests()) == {}


@virtual
async def test_the_client_of_a_lost_router_is_told():
    async with world() as w:
        told = []

        async def client(delivery):
            told.append(delivery)

        await w.bus.subscribe("_INBOX.client", client)
        await until_active(w.scheduler("s1"))
        await w.submit("a", reply_inbox="_INBOX.client")
        await w.say(RouterLeft(router_id="r"))
        (end,) = told
        body = json.loads(end.data)
        assert body["request_id"] == "a"
        assert body["done"] is True
        assert "router" in body["error"]["message"]
        assert "Pecsched-Done" in end.headers


@virtual
async def test_questions_are_answered_and_nonsense_refused():
    async with world() as w:
        service = w.scheduler("s1")
        with pytest.raises(NoResponders):
            await w.ask(DescribeCluster())
        await until_active(service)
        await w.submit("a")
        view = await w.ask(DescribeCluster())
        assert view.policy == "pecsched"
        assert view.decision_p50_s <= view.decision_p99_s
        assert view.decision_p99_s > 0
        story = await w.ask(TellStory(request_id="a"))
        assert any("RequestSubmitted" in line for line in story.lines)
        assert (await w.ask(TellStory(request_id="nobody"))).lines == ()
        refused = await w.bus.request(subjects.SCHEDULER_QUERY, b"\xc1", timeout_s=1.0)
        assert type(decode(refused.data, QueryFailed)) is QueryFailed


@virtual
async def test_unreadable_messages_are_counted_and_change_nothing():
    async with world() as w:
        await until_active(w.scheduler("s1"))
        await w.bus.publish(subjects.SCHEDULER, b"\xc1")
        await w.bus.publish(subjects.SCHEDULER, encode(DescribeCluster()))
        await asyncio.sleep(0.01)
        view = await w.ask(DescribeCluster())
        assert view.counters["refused_messages"] == 2


@virtual
async def test_each_epoch_has_its_own_journal_and_stop_leaves_it_whole():
    async with world() as w:
        entries = []

        class Journal:
            def append(self, now_s, event, commands):
                entries.append(event)

        epochs = []

        def journal_of(epoch):
            epochs.append(epoch)
            return nullcontext(Journal())

        service = w.scheduler("s1", journal_of=journal_of)
        await until_active(service)
        await w.bus.publish(subjects.SCHEDULER, encode(RouterHeartbeat(router_id="r")))
        service.stop()
        await w.running.pop(service)
        assert epochs == [1]
        assert [type(event) for event in entries] == [RouterHeartbeat]
        with pytest.raises(NoResponders):
            await w.ask(DescribeCluster())


@virtual
async def test_stop_while_standing_by():
    async with world() as w:
        first, second = w.scheduler("s1"), w.scheduler("s2")
        await until_active(first)
        second.stop()
        await asyncio.wait_for(w.running.pop(second), 5.0)
        assert second.epoch is None


@virtual
async def test_a_standby_waits_for_a_store_that_is_away():
    async with world() as w:
        w.store.down = True
        service = w.scheduler("s1")
        await asyncio.sleep(60.0)
        with pytest.raises(StoreError):
            await w.store.ping()
        w.store.down = False
        await until_active(service)


def test_every_field_of_the_config_is_a_setting():
    config = config_of(SchedulerSettings(threshold_tokens=99, pause_max_s=0.5, policy="fifo"))
    assert (config.threshold_tokens, config.pause_max_s, config.policy) == (99, 0.5, "fifo")

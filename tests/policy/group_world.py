"""Several prefill workers' cores, each in a world of its own (`prefill_world.py`), and the coordinator's core: orders
and words in queues, in order per sender, and what engines of a group do for each other, as their port says it.

Rank 0 calls the others one after another; a rank does a step when the others have done the one before; rank 0 decides
after each of its steps whether all stop there. A group that breaks fails the passes of all its ranks; one that a rank
left after its last pass, those that need that rank; passes with other sequences in them go on with these.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from common.messages.base import Message
from common.messages.groups import RING, Announcement, GroupScheme
from common.messages.prefill import RunPrefill
from common.messages.sp import (
    DissolveGroup,
    FormGroup,
    GroupFailed,
    GroupFinished,
    GroupGrown,
    GroupNotSpilled,
    GroupParted,
    GroupPaused,
    GroupPrefillFinished,
    GroupSpilled,
    GrowGroup,
    LoadSegment,
    MeetRanks,
    PartGroup,
    PauseGroup,
    RestoreGroup,
    ResumeGroup,
    SpillGroup,
)
from common.policy.core import TimePassed
from common.policy.prefill_events import (
    EnterGroup,
    GroupCalled,
    GroupLost,
    MeetOthers,
    OthersMet,
    PassSegment,
    SpillKv,
)
from common.policy.prefill_jobs import LongJob, LongState
from common.policy.prefill_worker import PrefillWorkerCore
from common.policy.sp_coordinator import SpCoordinator
from common.policy.sp_io import CoordinatorEvent, GroupWord, MemberOrder, MemberWord
from common.units import RequestId, WorkerId
from tests.policy.prefill_world import LAYERS, STOP_TOKEN, World, config, spec

Key = tuple[RequestId, int]
LinkKey = tuple[RequestId, int, int]
"""With the number of the growth."""
ANSWER_S = 5.0


@dataclass(eq=False)
class Led:
    """A pass that rank 0 has begun."""

    call: Announcement
    led_to: int
    """Steps of it that rank 0 has done."""
    stop_at: int | None = None
    joined: set[WorkerId] = field(default_factory=set)


@dataclass(eq=False)
class Link:
    """One group's connections."""

    members: tuple[WorkerId, ...]
    prompt_tokens: int
    passes: int = 0
    led: Led | None = None
    to_call: deque[WorkerId] = field(default_factory=deque)
    called: WorkerId | None = None
    """Who has not joined yet."""
    within: dict[WorkerId, Led] = field(default_factory=dict)
    """The last pass that each rank joined; rank 0 may be in the next one already."""
    left: set[WorkerId] = field(default_factory=set)
    to_tell: set[WorkerId] = field(default_factory=set)
    """Ranks that do not know yet that another one was killed."""
    broken: bool = False


class GroupWorld:
    def __init__(self, seed: int, workers: int) -> None:
        self.random = random.Random(seed)
        self.coordinator = SpCoordinator(ANSWER_S)
        self.now_s = 0.0
        self.worlds: dict[WorkerId, World] = {}
        self.links: dict[LinkKey, Link] = {}
        self.at: dict[tuple[WorkerId, Key], int] = {}
        """By which growth's link a worker computes; not here: the first."""
        self.meeting: list[tuple[WorkerId, MeetOthers]] = []
        self.members: dict[Key, tuple[WorkerId, ...]] = {}
        self.growths: Counter[Key] = Counter()
        self.answered: set[tuple[Key, int]] = set()
        self.orders: dict[WorkerId, deque[MemberOrder]] = {}
        self.words: dict[WorkerId, deque[MemberWord]] = {}
        self.said: list[GroupWord] = []
        self.endings: dict[Key, GroupFinished | GroupFailed] = {}
        self.seen: Counter[str] = Counter()
        self.stop_token_share = 0.0
        self.unmet_share = 0.0
        """Of the times that ranks are to meet."""
        self.refused_share = 0.0
        """Of the ranks that are to move their KV out: who cannot."""
        for number in range(workers):
            self.start(WorkerId(f"p{number}"))

    # --- processes ---

    def start(self, worker_id: WorkerId) -> None:
        world = World(core=PrefillWorkerCore(config(worker_id=worker_id)), auto_open=False, group=self)
        self.worlds[worker_id] = world
        self.meeting = [(who, order) for who, order in self.meeting if who != worker_id]
        self.orders[worker_id], self.words[worker_id] = deque(), deque()

    def kill(self, worker_id: WorkerId) -> None:
        """And start it anew, empty: what was under way to it and from it is lost."""
        for link in self.links.values():
            if worker_id in link.members:
                link.broken = True
                link.to_tell = set(link.members) - {worker_id}
        self.start(worker_id)
        self.seen["killed"] += 1

    # --- what engines do (`prefill_world.Group`) ---

    def began(self, worker_id: WorkerId, segment: PassSegment, step: int) -> None:
        link = self._link(worker_id, segment.request_id)
        if link.broken or link.left:
            link.broken = True
            return  # its first step fails
        if worker_id == link.members[0]:
            assert not link.to_call
            assert link.called is None
            link.passes += 1
            kind = "row" if segment.start >= link.prompt_tokens else "chunk"
            call = Announcement(
                pass_no=link.passes,
                kind=kind,
                start=segment.start,
                tokens=segment.tokens,
                step=step,
                gathers=segment.gathers,
            )
            link.led = link.within[worker_id] = Led(call, led_to=step, joined={worker_id})
            link.to_call = deque(link.members[1:])
            return
        assert link.called == worker_id, "joined what it was not called to"
        assert link.led is not None
        call = link.led.call
        assert (segment.start, segment.tokens, step) == (call.start, call.tokens, call.step)
        assert segment.gathers == call.gathers
        link.called = None
        link.led.joined.add(worker_id)
        link.within[worker_id] = link.led

    def broke(self, worker_id: WorkerId, request_id: RequestId, attempt: int) -> None:
        self._link_at(worker_id, (request_id, attempt)).broken = True

    def left(self, worker_id: WorkerId, request_id: RequestId, attempt: int) -> None:
        self._link_at(worker_id, (request_id, attempt)).left.add(worker_id)

    def meets(self, worker_id: WorkerId, order: MeetOthers) -> None:
        self.meeting.append((worker_id, order))

    def entered(self, worker_id: WorkerId, order: EnterGroup) -> None:
        key = (order.request_id, order.attempt)
        if (former := self.links.get((*key, self.at.get((worker_id, key), 0)))) is not None:
            former.broken = former.broken or self.links[*key, order.growth] is not former
        self.at[worker_id, key] = order.growth
        assert self.links[*key, order.growth].members[order.rank] == worker_id
        self.seen["entered"] += 1

    def _link(self, worker_id: WorkerId, request_id: RequestId) -> Link:
        return self._link_at(worker_id, (request_id, self.worlds[worker_id].held[request_id].spec.attempt))

    def _link_at(self, worker_id: WorkerId, key: Key) -> Link:
        return self.links[*key, self.at.get((worker_id, key), 0)]

    def _shared(self, worker_id: WorkerId) -> Link | None:
        """Of the pass that runs there."""
        world = self.worlds[worker_id]
        assert world.running is not None
        for segment in world.running.segments:
            if world.held[segment.request_id].shared:
                return self._link(worker_id, segment.request_id)
        return None

    # --- what can happen next ---

    def possible(self) -> Iterator[Callable[[], None]]:
        for worker_id, world in self.worlds.items():
            if self.orders[worker_id]:
                yield lambda w=worker_id: self.deliver(w)
            if self.words[worker_id]:
                yield lambda w=worker_id: self.hear(w)
            yield from (lambda w=worker_id, r=r: self.on(w, lambda: self.worlds[w].opened(r)) for r in world.opening)
            yield from (
                lambda w=worker_id, r=r: self.on(w, lambda: self.worlds[w].open_failed(r)) for r in world.leaving
            )
            yield from (lambda w=worker_id, r=r: self.on(w, lambda: self.worlds[w].handoff(r)) for r in world.streams)
            yield from (lambda w=worker_id, r=r: self.move_ends(w, r) for r in world.moving)
            if world.running is not None and self._can_step(worker_id):
                yield lambda w=worker_id: self.step(w)
            if world.core.next_deadline_s() is not None:
                yield lambda w=worker_id: self.wake(w)
        yield from (lambda m=m: self.met(m) for m in self.meeting)
        for key, link in self.links.items():
            yield from (lambda k=key, w=w: self.tell_lost(k, w) for w in link.to_tell)
            if link.to_call and link.called is None and not (link.broken or link.left) and self._hears(link):
                yield lambda k=key: self.call(k)

    def _hears(self, link: Link) -> bool:
        """The next to be called is not in a pass of this group still."""
        running = self.worlds[link.to_call[0]].running
        return running is None or self._shared(link.to_call[0]) is not link

    def _can_step(self, worker_id: WorkerId) -> bool:
        link = self._shared(worker_id)
        if link is None or self._is_lost(worker_id, link):
            return True
        mine, led = self.worlds[worker_id].running.steps_done, link.within[worker_id]
        if worker_id != link.members[0]:
            return mine < led.led_to
        others = [self.worlds[member].running for member in link.members[1:]]
        return len(led.joined) == len(link.members) and all(
            other is None or other.steps_done >= mine for other in others
        )

    def _is_lost(self, worker_id: WorkerId, link: Link) -> bool:
        """The pass that runs there cannot go on."""
        leader, led, running = link.members[0], link.within.get(worker_id), self.worlds[worker_id].running
        if link.broken or led is None or running is None:
            return True
        if worker_id == leader:
            return bool(link.left)
        return leader in link.left and running.steps_done == led.led_to

    def step(self, worker_id: WorkerId) -> None:
        world, link = self.worlds[worker_id], self._shared(worker_id)
        if link is not None and self._is_lost(worker_id, link):
            self.seen["broken pass"] += 1
            self.seen["broke off"] += len(world.running.segments) > 1
            self.on(worker_id, world.break_off)
            return
        running = world.running
        assert running is not None
        led = link.within[worker_id] if link is not None else None
        if led is not None and link is not None and worker_id == link.members[0]:
            led.led_to = running.steps_done + 1
            led.stop_at = led.led_to if world.stop_asked and led.led_to < LAYERS else None
            self.seen["stop"] += led.stop_at is not None
            led = None
        token = STOP_TOKEN if self.random.random() < self.stop_token_share else 7
        self.on(worker_id, lambda: world.step(token))
        if led is not None and led.stop_at == running.steps_done:
            self.on(worker_id, world.stop_here)

    def wake(self, worker_id: WorkerId) -> None:
        """Its chunk has held up what decodes there for long enough, or no call came. Nobody else's time has passed."""
        world = self.worlds[worker_id]
        deadline_s = world.core.next_deadline_s()
        assert deadline_s is not None
        before_s, self.now_s = self.now_s, max(self.now_s, deadline_s)
        self.on(worker_id, lambda: world.tell(TimePassed()))
        self.now_s = before_s
        self.seen["turn ended" if world.stop_asked else "not called"] += 1
        next_s = world.core.next_deadline_s()
        assert next_s is None or next_s > deadline_s, "it wakes for nothing, again and again"

    def met(self, meeting: tuple[WorkerId, MeetOthers]) -> None:
        self.meeting.remove(meeting)
        worker_id, order = meeting
        key, reason = (order.request_id, order.attempt), ""
        if self.links[*key, order.growth].broken or self.random.random() < self.unmet_share:
            reason = "not all came"
        event = OthersMet(request_id=order.request_id, attempt=order.attempt, growth=order.growth, reason=reason)
        self.on(worker_id, lambda: self.worlds[worker_id].tell(event))

    def call(self, key: LinkKey) -> None:
        link = self.links[key]
        link.called = link.to_call.popleft()
        assert link.led is not None
        event = GroupCalled(request_id=key[0], attempt=key[1], announcement=link.led.call)
        world = self.worlds[link.called]
        self.seen["called while busy"] += world.running is not None
        self.on(link.called, lambda: world.tell(event))

    def tell_lost(self, key: LinkKey, worker_id: WorkerId) -> None:
        self.links[key].to_tell.discard(worker_id)
        if self.at.get((worker_id, key[:2]), 0) != key[2]:
            return  # it has gone over to a larger group, or does not count on this one yet
        event = GroupLost(request_id=key[0], attempt=key[1], reason="a rank is gone")
        self.on(worker_id, lambda: self.worlds[worker_id].tell(event))

    def move_ends(self, worker_id: WorkerId, request_id: RequestId) -> None:
        world = self.worlds[worker_id]
        out = isinstance(world.moving[request_id], SpillKv)
        failed = self.random.random() < (0.5 if request_id in world.unwanted else self.refused_share * out)
        self.seen["not spilled"] += failed and out
        self.on(worker_id, lambda: world.moved(request_id, failed=failed))

    def deliver(self, worker_id: WorkerId) -> None:
        order = self.orders[worker_id].popleft()
        if isinstance(order, LoadSegment):
            key = (order.spec.request_id, order.spec.attempt)
            self.links.setdefault((*key, order.growth), Link(order.members, order.spec.prompt.tokens))
            self.at[worker_id, key] = order.growth
        elif isinstance(order, MeetRanks):
            key = (order.request_id, order.attempt)
            members = tuple(WorkerId(address.removesuffix(":1")) for address in order.addresses)
            self.links.setdefault((*key, order.growth), Link(members, self.links[*key, 0].prompt_tokens))
        self.on(worker_id, lambda: self.worlds[worker_id].tell(order))

    def on(self, worker_id: WorkerId, act: Callable[[], object]) -> None:
        """Something happens there; its words to the coordinator get on their way."""
        world = self.worlds[worker_id]
        world.now_s = self.now_s
        before = len(world.sent)
        act()
        self.words[worker_id] += [word for word in world.sent[before:] if isinstance(word, MemberWord)]
        self.check()

    def hear(self, worker_id: WorkerId) -> None:
        self.feed(self.words[worker_id].popleft())

    def feed(self, event: CoordinatorEvent) -> None:
        for command in self.coordinator.handle(event, self.now_s):
            if isinstance(command, MemberOrder):
                self.orders[command.worker_id].append(command)
                continue
            self.said.append(command)
            key = (command.request_id, command.attempt)
            if isinstance(command, GroupGrown):
                self.answered.add((key, command.growth))
                self.seen["grown" if len(command.members) > len(self.members[key]) else "not grown"] += 1
                self.members[key] = command.members
            if isinstance(command, GroupPaused):
                self.require_paused(key, command.step)
            if isinstance(command, GroupPrefillFinished | GroupParted):
                fewer = len(command.members) < len(self.members[key])
                self.seen["parted" if isinstance(command, GroupParted) else "parted at the end"] += fewer
                self.members[key] = command.members
            if isinstance(command, GroupSpilled | GroupNotSpilled):
                self.require_moved(key, out=isinstance(command, GroupSpilled))
            if isinstance(command, GroupFinished | GroupFailed):
                assert type(self.endings.setdefault(key, command)) is type(command)
        self.coordinator.check()

    # --- what people do ---

    def form(
        self,
        name: str,
        members: tuple[str, ...],
        tokens: int,
        max_tokens: int,
        attempt: int = 0,
        scheme: GroupScheme = RING,
    ) -> None:
        ids = tuple(WorkerId(member) for member in members)
        addresses = tuple(f"{member}:1" for member in members) if len(members) > 1 else ()
        request = spec(name, tokens, max_tokens=max_tokens, attempt=attempt)
        self.members[request.request_id, attempt] = ids
        self.feed(FormGroup(spec=request, members=ids, addresses=addresses, scheme=scheme))

    def grow(self, name: str, attempt: int = 0) -> None:
        """By some of those who may come in, if the last try has been answered."""
        key = (RequestId(name), attempt)
        mine, number = self.members[key], self.growths[key]
        others = sorted(worker_id for worker_id in self.worlds if worker_id > mine[0] and worker_id not in mine)
        if not others or (number and (key, number) not in self.answered):
            return
        self.growths[key] += 1
        members = tuple(sorted((*mine, *self.random.sample(others, self.random.randint(1, len(others))))))
        addresses = tuple(f"{member}:1" for member in members)
        order = GrowGroup(request_id=key[0], attempt=attempt, growth=number + 1, members=members, addresses=addresses)
        self.feed(order)

    def pause(self, name: str, attempt: int = 0) -> None:
        self.feed(PauseGroup(request_id=RequestId(name), attempt=attempt))

    def resume(self, name: str, attempt: int = 0) -> None:
        self.feed(ResumeGroup(request_id=RequestId(name), attempt=attempt))

    def part(self, name: str, attempt: int = 0) -> None:
        self.feed(PartGroup(request_id=RequestId(name), attempt=attempt))

    def spill(self, name: str, attempt: int = 0) -> None:
        self.feed(SpillGroup(request_id=RequestId(name), attempt=attempt))

    def restore(self, name: str, attempt: int = 0) -> None:
        self.feed(RestoreGroup(request_id=RequestId(name), attempt=attempt))

    def dissolve(self, name: str, attempt: int = 0) -> None:
        self.feed(DissolveGroup(request_id=RequestId(name), attempt=attempt))

    def short(self, worker_id: WorkerId, name: str, tokens: int, *, here: bool, exclusive: bool) -> None:
        world = self.worlds[worker_id]
        order = RunPrefill(
            worker_id=worker_id,
            spec=spec(name, tokens, max_tokens=3),
            decode_worker_id=worker_id if here else WorkerId("d0"),
            decode_address="" if here else "host:1",
            exclusive=exclusive,
        )
        self.on(worker_id, lambda: world.tell(order))

    def wait(self) -> bool:
        """For the coordinator's next deadline. False: there is none."""
        deadline_s = self.coordinator.next_deadline_s()
        if deadline_s is None:
            return False
        self.now_s = max(self.now_s, deadline_s)
        self.feed(TimePassed())
        return True

    def act(self) -> bool:
        """Something of what can happen. False: nothing can."""
        acts = list(self.possible())
        if acts:
            self.random.choice(acts)()
        return bool(acts)

    def settle(self, steps_max: int = 20_000) -> None:
        """Until nothing is under way and nobody is waited for."""
        for _ in range(steps_max):
            if not self.act() and not self.wait():
                return
        raise AssertionError(f"it never comes to rest: {self.describe()}")

    # --- what must hold ---

    def jobs(self, key: Key, growth: int = 0) -> list[LongJob]:
        """Of this long, on those ranks of this group that hold it and compute with it."""
        members = [m for m in self.links[*key, growth].members if self.at.get((m, key), 0) == growth]
        held = [self.worlds[member].core.books.jobs.get(key[0]) for member in members]
        return [job for job in held if isinstance(job, LongJob) and job.attempt == key[1]]

    def ranks(self, key: Key, growth: int) -> list[LongJob]:
        """Those that compute with this group still. (Rank 0 may have parted from one that is in its last step.)"""
        held = [self.worlds[member].core.books.jobs.get(key[0]) for member in self.members[key]]
        jobs = [job for job in held if isinstance(job, LongJob) and job.attempt == key[1]]
        return [job for job in jobs if job.growth == growth]

    def require_paused(self, key: Key, step: int) -> None:
        growth = self.at.get((self.members[key][0], key), 0)
        link = self.links[*key, growth]
        if link.broken or link.left:
            return  # a rank is gone, which will be heard soon
        jobs = self.ranks(key, growth)
        assert all(job.state in (LongState.PAUSED, LongState.LOADED) for job in jobs), "a rank goes on"
        assert {job.steps_done for job in jobs} <= {step}, "paused at different steps"
        self.seen["paused"] += 1
        self.seen["paused in a chunk"] += step % LAYERS != 0

    def require_moved(self, key: Key, *, out: bool) -> None:
        """All ranks, or none."""
        growth = self.at.get((self.members[key][0], key), 0)
        link = self.links[*key, growth]
        if link.broken or link.left:
            return
        states = {job.state for job in self.ranks(key, growth)}
        assert states <= ({LongState.SPILLED} if out else {LongState.PAUSED, LongState.LOADED}), states
        self.seen["spilled" if out else "all stand again"] += 1

    def check(self) -> None:
        for key, link in self.links.items():
            jobs = self.jobs(key[:2], key[2])
            if link.broken or link.left or len(jobs) < len(link.members) or any(job.verdict for job in jobs):
                continue
            leader, *followers = jobs
            for job in followers:
                assert job.kv_tokens == -(-leader.spec.kv_tokens // job.kv_size)
                if job.growth == leader.growth and job.state is not LongState.GATHERED:
                    assert abs(job.prefilled - leader.prefilled) <= LAYERS * 512 * len(jobs)

    def require_empty(self) -> None:
        for world in self.worlds.values():
            world.require_empty()
            assert not world.computed or max(world.computed.values()) == 1, "computed twice"
        assert self.coordinator.driving() == ()

    def tokens_of(self, name: str) -> list[tuple[int, int]]:
        return [token for world in self.worlds.values() for token in world.tokens_of(name)]

    def of(self, *kinds: type[Message]) -> list[Message]:
        return [word for word in self.said if isinstance(word, kinds)]

    def describe(self) -> str:
        lines = [f"{name}: {w.core.books.running}, {list(w.core.books.jobs)}" for name, w in self.worlds.items()]
        for request_id, attempt in self.coordinator.driving():
            lines += [f"{request_id}/{attempt}: {self.coordinator.state_of(request_id, attempt)}"]
            lines += self.coordinator.story(request_id)[-20:]
        return "\n".join(lines)

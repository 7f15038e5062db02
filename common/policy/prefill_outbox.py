"""The commands of one handled event, gathered and put in order.

First what the engine can begin with at once, then the tokens that clients wait for, then all the rest in
the order in which it was decided.
"""

from __future__ import annotations

from common.messages.decode import DecodeFailed, DecodeFinished
from common.messages.locations import KvLocation, KvState, MovedTo
from common.messages.prefill import KvReleased, PrefillFailed, PrefillFinished
from common.messages.requests import FinishReason, TokenChunk, TokensGenerated
from common.messages.sp import (
    RanksMet,
    SegmentDropped,
    SegmentFailed,
    SegmentFinished,
    SegmentLoaded,
    SegmentNotSpilled,
    SegmentParted,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
    SegmentSpilled,
)
from common.policy.prefill_events import (
    AbortHandoff,
    BreakShare,
    CloseSequence,
    EnterGroup,
    FinishHandoff,
    ForgetKv,
    PlaceKv,
    PrefillCommand,
    ResumePass,
    RunPass,
    SampledToken,
    StopPass,
)
from common.policy.prefill_jobs import Asker, Job, LongJob, ShortJob, Verdict
from common.policy.words import About
from common.units import Attempt, RequestId, RouterId, WorkerId


class Outbox:
    def __init__(self, worker_id: WorkerId, layers: int) -> None:
        self._worker_id = worker_id
        self._layers = layers
        self.cause = ""
        self._passes: list[PrefillCommand] = []
        self._tokens: dict[RouterId, list[TokenChunk]] = {}
        self._rest: list[PrefillCommand] = []

    def take(self) -> list[PrefillCommand]:
        tokens = [
            TokensGenerated(worker_id=self._worker_id, router_id=router, chunks=tuple(chunks), cause=self.cause)
            for router, chunks in self._tokens.items()
        ]
        commands = [*self._passes, *tokens, *self._rest]
        self._passes, self._tokens, self._rest = [], {}, []
        return commands

    def do(self, command: PrefillCommand) -> None:
        if isinstance(command, RunPass | ResumePass | StopPass | BreakShare | EnterGroup):
            self._passes.append(command)
        else:
            self._rest.append(command)

    def token(self, job: Job, sampled: SampledToken, generated: int, reason: FinishReason | None) -> None:
        """The `generated`-th token of this attempt goes to its router."""
        chunk = TokenChunk(
            request_id=job.request_id,
            attempt=job.attempt,
            index=job.spec.generated_before + generated - 1,
            token_ids=(sampled.token_id,),
            logprobs=() if sampled.logprob is None else (sampled.logprob,),
            finish_reason=reason,
        )
        self._tokens.setdefault(job.spec.router_id, []).append(chunk)

    def _about(self, request_id: RequestId, attempt: Attempt) -> About:
        return About(worker_id=self._worker_id, request_id=request_id, attempt=attempt, cause=self.cause)

    # --- effects ---

    def close_sequence(self, job: Job) -> None:
        self.do(CloseSequence(request_id=job.request_id, attempt=job.attempt))
        self.do(ForgetKv(request_id=job.request_id))

    def place_kv(self, job: ShortJob | LongJob, state: KvState, moved_to: MovedTo | None = None) -> None:
        location = KvLocation(
            request_id=job.request_id,
            attempt=job.attempt,
            worker_id=self._worker_id,
            state=state,
            tokens=job.prefilled,
            layers=self._layers,
            reserved_tokens=job.kv_tokens if moved_to is None else 0,
            moved_to=moved_to,
        )
        self.do(PlaceKv(location=location))

    def finish_handoff(self, job: ShortJob, first: SampledToken) -> None:
        self.do(
            FinishHandoff(
                request_id=job.request_id,
                attempt=job.attempt,
                first_token=first.token_id,
                first_logprob=first.logprob,
            )
        )

    def abort_handoff(self, job: ShortJob) -> None:
        self.do(AbortHandoff(request_id=job.request_id, attempt=job.attempt))

    # --- to the scheduler ---

    def prefill_finished(
        self, job: ShortJob, last_layer_computed_s: float, in_worker_s: float, reason: FinishReason | None
    ) -> None:
        self.do(
            PrefillFinished(
                **self._about(job.request_id, job.attempt),
                compute_s=job.compute_s,
                last_layer_computed_s=last_layer_computed_s,
                waited_s=job.waited_s,
                in_worker_s=in_worker_s,
                finish_reason=reason,
            )
        )

    def prefill_failed(self, request_id: RequestId, attempt: Attempt, verdict: Verdict) -> None:
        self.do(
            PrefillFailed(
                **self._about(request_id, attempt),
                reason=verdict.reason,
                retryable=verdict.retryable,
                suspect_worker_id=verdict.suspect,
            )
        )

    def decode_finished(self, job: ShortJob, reason: FinishReason, freed: int) -> None:
        about = self._about(job.request_id, job.attempt)
        self.do(DecodeFinished(**about, finish_reason=reason, generated=job.generated, kv_tokens=freed))

    def decode_failed(self, job: ShortJob, verdict: Verdict) -> None:
        self.do(DecodeFailed(**self._about(job.request_id, job.attempt), reason=verdict.reason))

    def kv_released(self, request_id: RequestId, attempt: Attempt, kv_tokens: int = 0) -> None:
        self.do(KvReleased(**self._about(request_id, attempt), kv_tokens=kv_tokens))

    # --- to the coordinator ---

    def segment_loaded(self, job: LongJob) -> None:
        self.do(SegmentLoaded(**self._about(job.request_id, job.attempt)))

    def segment_running(self, job: LongJob) -> None:
        self.do(SegmentRunning(**self._about(job.request_id, job.attempt)))

    def segment_paused(self, job: LongJob) -> None:
        self.do(
            SegmentPaused(
                **self._about(job.request_id, job.attempt),
                step=job.steps_done,
                prefilled_tokens=job.prefilled,
                pause_latency_s=job.last_pause_latency_s,
            )
        )

    def segment_parted(self, job: LongJob) -> None:
        about = self._about(job.request_id, job.attempt)
        self.do(SegmentParted(**about, growth=job.growth, prefilled_tokens=job.prefilled))

    def ranks_met(self, request_id: RequestId, attempt: Attempt, growth: int, reason: str = "") -> None:
        self.do(RanksMet(**self._about(request_id, attempt), growth=growth, reason=reason))

    def segment_spilled(self, job: LongJob, kv_bytes: int) -> None:
        self.do(SegmentSpilled(**self._about(job.request_id, job.attempt), kv_bytes=kv_bytes))

    def segment_not_spilled(self, job: LongJob, reason: str) -> None:
        self.do(SegmentNotSpilled(**self._about(job.request_id, job.attempt), reason=reason))

    def segment_prefilled(self, job: LongJob, reason: FinishReason | None) -> None:
        self.do(
            SegmentPrefilled(
                **self._about(job.request_id, job.attempt),
                steps=job.steps_done,
                compute_s=job.compute_s,
                finish_reason=reason,
            )
        )

    def segment_finished(self, job: LongJob, reason: FinishReason) -> None:
        self.do(
            SegmentFinished(
                **self._about(job.request_id, job.attempt),
                finish_reason=reason,
                generated=job.generated,
            )
        )

    def segment_failed(self, request_id: RequestId, attempt: Attempt, verdict: Verdict) -> None:
        self.do(SegmentFailed(**self._about(request_id, attempt), reason=verdict.reason, retryable=verdict.retryable))

    def dropped(self, asker: Asker, request_id: RequestId, attempt: Attempt) -> None:
        """Nothing of this attempt is held (any more): the word that this asker waits for."""
        if asker == "scheduler":
            self.kv_released(request_id, attempt)
            return
        self.do(SegmentDropped(**self._about(request_id, attempt)))

"""A pass as an iterator of steps: one layer of one ragged batch at a time.

The first step also embeds, the last also computes the logits of the positions that sample. Between two
steps everything is at rest: hidden state, rotary tables and the KV of the layers done are kept in the
`PassRun`, and pausing is not asking for the next step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from services.engine.batch import HeldSequence, Packed, RaggedBatch, node_batch
from services.engine.collectives import GroupBroken, StepRecalled
from services.engine.interface import EngineError, LayerKv, Sampled
from services.engine.megatron import Placed, Rotary, compute_layer
from services.engine.model import LoadedModel
from services.engine.sampler import sample
from services.engine.sequence_parallel import GroupPass


class PassRun:
    """One pass, from its first step to its sampled tokens. Not thread-safe: one caller at a time."""

    def __init__(self, model: LoadedModel, batch: RaggedBatch, *, background: bool = False) -> None:
        self.batch = batch
        self.background = background
        """A chunk of a long prefill and nothing else: it yields the CPU to shorter work."""
        self.steps_done = 0
        self.logits: Tensor | None = None  # [segments that sample, vocab], after the last step
        self._model = model
        self._hidden: Tensor | None = None  # [1, tokens, hidden]
        self._rotary: Rotary | None = None
        self._node: Placed | None = None
        """Of a chunk whose linear work is split among ranks: all that those of this node compute."""
        for row in batch.rows:
            row.sequence.active_pass = self

    @property
    def group(self) -> GroupPass | None:
        """Set while a shared sequence is in the pass."""
        row = self.batch.shared
        return None if row is None else row.group

    @property
    def finished(self) -> bool:
        return self.steps_done == self._model.layers

    def step(self) -> bool:
        """Run the next layer. False: its group took that back, and the pass stands where it stood. Must be called in
        `torch.inference_mode`."""
        if self.finished:
            raise EngineError("the pass is finished")
        before = self._hidden
        try:
            self._run_layer(self.group)
        except StepRecalled:
            assert self.group is not None
            self._hidden = before
            self.group.recall()
            return False
        except GroupBroken:
            self._hidden = before  # whoever goes on without the group begins the step anew
            raise
        self.steps_done += 1
        for row in self.batch.rows:
            row.sequence.layer_tokens += row.tokens
        if self.steps_done == self._model.layers:
            self._conclude()
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return True

    def _run_layer(self, group: GroupPass | None) -> None:
        if group is not None:
            group.begin_step(self.steps_done)
        if self.batch.tokens or (group is not None and group.splits_weights):
            self._compute_layer()
        else:
            self._lend()
        if group is not None:
            assert self.batch.shared is not None
            group.end_step(self.batch.shared.sequence.kv)

    def _compute_layer(self) -> None:
        decoder, group = self._model.decoder, self.group
        if self._hidden is None:
            self._hidden = decoder.embed_tokens(self.batch.token_ids)
            self._rotary = rotary_tables(self._model, self._hidden, self.batch)
        layer = decoder.layers[self.steps_done]
        if group is not None and group.splits_weights:
            self._hidden = self._compute_split_layer(group, layer, self._hidden)
            return
        self._hidden = layer(
            self._hidden,
            attention_mask=None,
            position_ids=self.batch.positions,
            past_key_values=None,
            use_cache=False,
            position_embeddings=self._rotary,
            ctx=self.batch,
        )

    def _compute_split_layer(self, group: GroupPass, layer: Any, hidden: Tensor) -> Tensor:
        (row,) = self.batch.rows
        if self._node is None:
            batch = node_batch(row, self._model.device)
            self._node = Placed(batch, rotary_tables(self._model, hidden, batch))
        assert self._rotary is not None
        own = Placed(self.batch, self._rotary)
        return compute_layer(group, layer, group.weights(self.steps_done), hidden, own, self._node, self._lend)

    def _lend(self) -> None:
        """No token of the pass is computed here: only the KV kept here is asked for."""
        row = self.batch.shared
        assert row is not None
        assert row.group is not None
        model = self._model
        nothing = torch.empty(1, model.kv_heads, 0, model.head_dim, dtype=model.dtype, device=model.device)
        query = nothing.new_empty(1, model.query_heads, 0, model.head_dim)
        scaling: float = model.decoder.layers[self.steps_done].self_attn.scaling
        row.group.attend_nothing(row.sequence.kv, self.steps_done, query, nothing, nothing, scaling)

    def layer_kv(self, layer: int) -> list[tuple[HeldSequence, LayerKv]]:
        """The KV this pass added to a layer it has done, for the sequences that have a sink."""
        return [
            (row.sequence, LayerKv(layer, row.start, row.tokens, row.sequence.kv.buffers(layer, row.start, row.tokens)))
            for row in self.batch.rows
            if row.sequence.sink is not None
        ]

    def settle(self) -> tuple[Sampled, ...]:
        """Draw the next tokens, append them to their sequences and let go of these. Once, when finished."""
        drawn = self._draw()
        for row in self.batch.rows:
            row.sequence.computed = row.end
        for row, token in zip(self.batch.sampled, drawn, strict=True):
            row.sequence.token_ids.append(token.token_id)
        self.release()
        return drawn

    def drop(self, sequence: HeldSequence) -> None:
        """Take one sequence out of a stopped pass; the others continue as if it had never been there."""
        sequence.active_pass = None
        if len(self.batch.rows) == 1:
            return
        self.batch, kept = self.batch.without(sequence)
        if self._hidden is not None and self._rotary is not None:
            cos, sin = self._rotary
            self._hidden = self._hidden[:, kept]
            self._rotary = (cos[:, kept], sin[:, kept])

    def leave_group(self) -> bool:
        """The group of the shared sequence broke, maybe in the middle of a step: on without it. False: there is nothing
        else in the pass.

        The step is begun anew: what it read is kept until it is done, and KV is written where it was before."""
        shared = self.batch.shared
        assert shared is not None
        if len(self.batch.rows) == 1:
            return False
        others = [at for at, row in enumerate(self.batch.sampled) if row is not shared]
        self.drop(shared.sequence)
        if self.finished and self._hidden is not None:
            self._conclude()
        elif self.logits is not None:
            self.logits = self.logits[others] if others else None
        return True

    def park(self, device: torch.device) -> None:
        """Of a stopped pass: its hidden state to the host's memory, or back to where it is computed."""
        if self._hidden is not None and self._rotary is not None:
            cos, sin = self._rotary
            self._hidden, self._rotary = self._hidden.to(device), (cos.to(device), sin.to(device))
        self._node = None  # made anew by the next step

    def release(self) -> None:
        """Let go of the sequences: another pass may take them."""
        for row in self.batch.rows:
            row.sequence.active_pass = None

    def _conclude(self) -> None:
        shared = self.batch.shared
        brought = None if shared is None else self._bring_last(shared)
        last = [self._last_of(row) if brought is None or row is not shared else brought for row in self.batch.sampled]
        if last:
            self.logits = self._head()(self._model.decoder.norm(torch.stack(last)))
        self._hidden = self._rotary = self._node = None

    def _last_of(self, row: Packed) -> Tensor:
        """Hidden state [hidden] of the row's last token."""
        assert self._hidden is not None  # it has tokens
        return self._hidden[0, row.offset + row.tokens - 1]

    def _bring_last(self, row: Packed) -> Tensor | None:
        assert row.group is not None
        own = None if self._hidden is None else self._hidden[0, row.offset : row.offset + row.tokens]
        weight: Tensor = self._model.decoder.norm.weight
        return row.group.last_hidden(own, self._model.layers, weight)

    def _head(self) -> Any:
        return self._model.module.lm_head

    def _draw(self) -> tuple[Sampled, ...]:
        if self.logits is None:
            return ()
        rows = self.batch.sampled
        params = [row.sequence.spec.sampling for row in rows]
        drawn = sample(self.logits, params, [row.sequence.output_index for row in rows])
        return tuple(
            Sampled(row.sequence.spec.request_id, token_id, logprob)
            for row, (token_id, logprob) in zip(rows, drawn, strict=True)
        )


def rotary_tables(model: LoadedModel, hidden: Tensor, batch: RaggedBatch) -> Rotary:
    """Cosines and sines of the packed positions.

    `longrope` (Phi-3 with a 128k context) takes other frequencies for sequences beyond the original
    context: they depend on how long the *sequence* is, not the chunk, so each segment asks with its
    sequence's last position appended. That is what transformers does for the prompt in one piece.
    """
    rotary = model.decoder.rotary_emb
    if getattr(rotary, "rope_type", "default") != "longrope":
        cos, sin = rotary(hidden, batch.positions)
        return cos, sin
    tables = []
    for row in batch.rows:
        positions = batch.positions[:, row.offset : row.offset + row.tokens]
        last = max(row.sequence.prompt_tokens, row.start + row.tokens) - 1
        cos, sin = rotary(hidden, torch.cat([positions, positions.new_tensor([[last]])], dim=1))
        tables.append((cos[:, :-1], sin[:, :-1]))
    return torch.cat([cos for cos, _ in tables], dim=1), torch.cat([sin for _, sin in tables], dim=1)

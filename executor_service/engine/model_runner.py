"""Runs one scheduled batch through the model: encode, embed, forward, sample.

On a GPU everything is enqueued and nothing is waited for: what `execute` returns has the tokens still on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from executor_service.engine.decode_graphs import DecodeGraphs
from executor_service.engine.item_encoder import Failures, ItemEncoder
from executor_service.engine.limits import EngineLimits
from executor_service.engine.logprobs import PendingPromptLogprobs, prompt_logprobs
from executor_service.engine.request import EngineItem, Span
from executor_service.engine.sampler import PendingTokens, Sampler
from executor_service.engine.scheduler import ScheduledBatch, ScheduledRequest
from executor_service.engine.spans import checked_spans
from executor_service.engine.step_inputs import InputStage, StepInputs, lay_out, pad_decodes
from executor_service.kernels.embed_merge import embed_merge
from executor_service.layers.context import KVCache, forward_context
from executor_service.models.protocol import takes_requests


@dataclass(frozen=True)
class ModelOutput:
    """Tokens of the requests in `requests`, parallel, as soon as they are known; `failed` could not be encoded.

    Once `sampled` has its result, which may be of no request, the device is done with the step and all that it read.
    `prompt_logprobs` are what the step says of prompt tokens, for the requests that ask.
    """

    requests: list[ScheduledRequest]
    sampled: PendingTokens
    failed: Failures
    prompt_logprobs: PendingPromptLogprobs = field(default_factory=PendingPromptLogprobs)


class ModelRunner:
    """The model on its device, the KV cache it reads and writes, and the sampler.

    `tells_requests`: whether the model is told whose last tokens are asked about, if that spares it work.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        dtype: torch.dtype,
        limits: EngineLimits,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self.limits = limits
        self.encoder = ItemEncoder(model, device, dtype)
        self.kv_caches: Sequence[KVCache] = ()
        self.graphs: DecodeGraphs | None = None
        self.tells_requests = takes_requests(model)
        self._stage = InputStage(device, limits)
        self._sampled = torch.zeros(limits.max_num_seqs, dtype=torch.int64, device=device)
        vocab_size = int(self.model.compute_logits(self.zeros(1)).shape[-1])
        self.sampler = Sampler(device, limits.max_num_seqs, vocab_size, eos_token_ids)

    def zeros(self, num_rows: int) -> Tensor:
        """Hidden states of nothing: [num_rows, hidden]."""
        width = self.model.get_input_embeddings()(torch.zeros(1, dtype=torch.int64, device=self.device)).shape[-1]
        return torch.zeros((num_rows, width), dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> ModelOutput:
        """One step: tokens for every request whose last token is in the batch."""
        scheduled, failed = self.encoder.encode_batch(batch.requests)
        if not scheduled:
            return ModelOutput([], PendingTokens.none(self.device), failed)
        needs_token = [one.needs_token for one in scheduled]
        size = self._graph_size(scheduled) if all(needs_token) else None
        if size is None:
            logits, scores = self._forward(scheduled, needs_token)
        else:
            logits, scores = self._replay(scheduled, size), PendingPromptLogprobs()
        sampling = list(itertools.compress(scheduled, needs_token))
        return ModelOutput(sampling, self._sample(logits, sampling), failed, scores)

    def prompt_positions(
        self, prompt_token_ids: Sequence[int], items: Sequence[EngineItem]
    ) -> tuple[np.ndarray | None, int]:
        """The model's own positions of a prompt and the delta of what follows; (None, 0): counted from 0."""
        function = getattr(self.model, "positions", None)
        if function is None:
            return None, 0
        positions, delta = function(prompt_token_ids, items)
        return np.asarray(positions, dtype=np.int64), int(delta)

    def bidirectional_spans(self, items: Sequence[EngineItem]) -> tuple[Span, ...]:
        """Tokens of a prompt with these items that see each other."""
        function = getattr(self.model, "bidirectional_spans", None)
        found = function(items) if function is not None and items else ()
        return checked_spans(found, items, self.limits.max_num_batched_tokens)

    def _sample(self, logits: Tensor, sampling: list[ScheduledRequest]) -> PendingTokens:
        """The next token of every row; the step after this one finds them on the device."""
        tokens = self.sampler.sample(logits, [scheduled.request for scheduled in sampling])
        self._sampled[: len(sampling)].copy_(tokens.token_ids)
        for row, scheduled in enumerate(sampling):
            scheduled.request.sampled_row = row
        return tokens

    # --- any batch ----------------------------------------------------------------------------------

    def _forward(self, batch: list[ScheduledRequest], needs_token: list[bool]) -> tuple[Tensor, PendingPromptLogprobs]:
        """Logits of the rows that need a token, and what the chunks say of prompts that are scored."""
        host = lay_out(batch, self.limits.block_size)
        features, places = _features(batch, host.cu_seqlens)
        sampling = np.flatnonzero(needs_token)
        padded = self._padded(sampling, len(host.token_ids))
        inputs, (requests, feature_places) = self._stage.upload(host, padded, places)
        scores = PendingPromptLogprobs()
        if any(one.request.scores_prompt for one in batch):
            hidden = self._hidden(inputs, features, feature_places)
            ends = host.cu_seqlens[1:].astype(np.int64)
            scores = prompt_logprobs(batch, hidden, ends, self.model.compute_logits)
            hidden = hidden[inputs.metadata.last_rows(requests)]
        else:
            hidden = self._last_hidden(inputs, features, feature_places, requests)
        return self.model.compute_logits(hidden)[: len(sampling)], scores

    def _padded(self, requests: np.ndarray, num_tokens: int) -> np.ndarray:
        """As many as a graph is for, the last one repeated.

        Libraries have seen products of so many rows when it was captured. At the first of any other number they make
        everybody wait for the device.
        """
        size = self.graphs.size_for(len(requests)) if self.graphs is not None and len(requests) else None
        if size is None or size > num_tokens:
            return requests
        return np.pad(requests, (0, size - len(requests)), mode="edge")

    def _last_hidden(
        self, inputs: StepInputs, features: list[Tensor], feature_places: Tensor | None, requests: Tensor
    ) -> Tensor:
        """Hidden states [S, hidden] of the last tokens of `requests` [S], in the batch's order."""
        if self.tells_requests and len(requests) < len(inputs.token_ids):
            return self._hidden(inputs, features, feature_places, requests=requests)
        return self._hidden(inputs, features, feature_places)[inputs.metadata.last_rows(requests)]

    def _hidden(
        self, inputs: StepInputs, features: list[Tensor], feature_places: Tensor | None, **options: Tensor
    ) -> Tensor:
        """Hidden states of the flattened batch, [T, hidden] without options; `feature_places` as for `embed_merge`."""
        token_ids = inputs.known_token_ids(self._sampled)
        embeddings = self._embed(token_ids, features, feature_places)
        with forward_context(inputs.metadata, self.kv_caches):
            hidden: Tensor = self.model(token_ids, inputs.positions, embeddings, **options)
        return hidden

    def _embed(self, token_ids: Tensor, features: list[Tensor], feature_places: Tensor | None) -> Tensor:
        """[T, hidden]: token embeddings and features; an embedding that is more than its table is asked for its own."""
        embedding = self.model.get_input_embeddings()
        if not features:
            rows: Tensor = embedding(token_ids)
            return rows
        assert feature_places is not None
        if type(embedding) is nn.Embedding:
            return embed_merge(token_ids, embedding.weight, features, feature_places)
        numbers = torch.arange(len(token_ids), device=self.device)
        return embed_merge(numbers, embedding(token_ids), features, feature_places)

    # --- decodes by graph ---------------------------------------------------------------------------

    def capture_graphs(self, sizes: Sequence[int], report: Callable[[int, int], None]) -> DecodeGraphs:
        """Decode steps of these sizes on the present KV caches."""
        return DecodeGraphs(sizes, self._prepare_decode, report)

    @property
    def can_capture(self) -> bool:
        """Whether decode steps can be graphs: on a GPU, for a model whose positions are counted."""
        return self.device.type == "cuda" and not hasattr(self.model, "positions")

    def _prepare_decode(self, size: int) -> Callable[[], Tensor]:
        """Inputs of nothing in place for `size` rows, and the step on them."""
        inputs, _ = self._stage.upload(pad_decodes(None, size, self.limits.max_num_blocks_per_request))

        @torch.inference_mode()
        def decode() -> Tensor:
            logits: Tensor = self.model.compute_logits(self._hidden(inputs, [], None))
            return logits

        return decode

    def _graph_size(self, batch: list[ScheduledRequest]) -> int | None:
        """The graph for a step that only decodes text, a token of everybody's; None: there is none."""
        if self.graphs is None or not all(
            one.num_tokens == 1 and not one.request.scores_prompt and one.is_behind_items for one in batch
        ):
            return None
        return self.graphs.size_for(len(batch))

    def _replay(self, batch: list[ScheduledRequest], size: int) -> Tensor:
        host = lay_out(batch, self.limits.block_size)
        self._stage.upload(pad_decodes(host, size, self.limits.max_num_blocks_per_request))
        assert self.graphs is not None
        return self.graphs.replay(size)[: len(batch)]


def _features(batch: list[ScheduledRequest], cu_seqlens: np.ndarray) -> tuple[list[Tensor], np.ndarray]:
    """Features of the items that the chunks reach into, and for each token of the batch its item and row of them.

    Int32 [T, 2]; the item is -1 where a token is none.
    """
    places = np.full((cu_seqlens[-1], 2), -1, dtype=np.int32)
    features: list[Tensor] = []
    for scheduled, begin in zip(batch, cu_seqlens.tolist(), strict=False):
        if scheduled.is_behind_items:
            continue
        start = scheduled.request.num_computed_tokens
        chunk = places[begin : begin + scheduled.num_tokens]
        for item in scheduled.request.items_between(start, start + scheduled.num_tokens):
            if _place(item, start, len(features), chunk):
                assert item.features is not None
                features.append(item.features)
    return features, places


def _place(item: EngineItem, start: int, number: int, chunk: np.ndarray) -> bool:
    """Note in `chunk`, whose tokens begin at `start`, which are rows of item `number`; False if there are none."""
    offset = item.placeholder.offset
    begin, stop = max(offset, start), min(item.placeholder.end, start + len(chunk))
    mask = item.layout.feature_mask
    inside = np.flatnonzero(mask[begin - offset : stop - offset])
    first = int(mask[: begin - offset].sum())
    chunk[inside + begin - start] = np.stack([np.full(len(inside), number), np.arange(first, first + len(inside))], -1)
    return len(inside) > 0

"""The path of a request through this service: the table of contents.

admit -> plan (fetch, probe headers, render chat, tokenize, lay out and expand) -> Start to the executor ->
decode and map what it misses, streaming chunks -> detokenize what comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from diptych.service.errors import (
    DeadlineError,
    DiptychError,
    InvalidInputError,
    LimitExceededError,
    OverloadedError,
    UnavailableError,
)
from diptych.service.request_ids import check_request_id
from diptych.service.sampling import check_sampling
from diptych.service.telemetry import stage
from diptych.wire.framing import split_tensor, tensor_bytes
from preprocess_service.answer import Answer
from preprocess_service.bad_words import with_bad_words
from preprocess_service.executor_client import Completed, Executor, ExecutorPool, RemoteRequest, TokenOutput
from preprocess_service.executor_client.messages import make_start
from preprocess_service.executor_client.request import MissingItems, PromptScores
from preprocess_service.fan_out import fan_out, nth_call
from preprocess_service.limits import check_text_size, num_text_bytes
from preprocess_service.media.decode import MediaWorkers
from preprocess_service.planning import Checkpoint, Planner
from preprocess_service.requests import (
    Chat,
    Deadline,
    Delta,
    Ended,
    GenerateCall,
    MappedItem,
    Media,
    MediaHeader,
    Plan,
    PlannedItem,
    Prompt,
    TensorPiece,
)
from preprocess_service.sending import ItemSender

RETRY_AFTER: Final = 0.5
STOP_PATIENCE: Final = 1.0
"""Seconds for which an executor may be busy with a step before an answer that is complete ends without its word."""
INLINE_TEXT: Final = 16 * 1024
"""Texts up to so many characters are tokenized on the event loop; a thread would cost more than the work."""
INLINE_MEDIA_BYTES: Final = 128 * 1024
INLINE_PARTS: Final = 64
INLINE_IDS: Final = 4096


class Pipeline:
    """Serves requests for one checkpoint with the executors of one pool."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        planner: Planner,
        media: MediaWorkers,
        executors: ExecutorPool,
        max_pending_requests: int,
    ) -> None:
        self._checkpoint = checkpoint
        self._planner = planner
        self._media = media
        self._executors = executors
        self._max_pending = max_pending_requests
        self._num_pending = 0
        self.num_prompt_tokens = 0
        """Of the answers that were begun."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False

    @property
    def num_pending(self) -> int:
        """Requests that are worked on."""
        return self._num_pending

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Delta | Ended]:
        """The answer in pieces, and its end."""
        with self._admit(call.num_answers):
            check_call(call, self._checkpoint.family.ctx.vocab_size)
            call = with_bad_words(call, self._checkpoint)
            plan = await self._map_ahead(await self._plan(call.input, call.deadline, self._planner.prepare))
            executor = self._executors.choose()
            answers = fan_out(call.num_answers, lambda index: self._run(nth_call(call, index), plan, executor))
            async with aclosing(answers):
                async for piece in answers:
                    yield piece

    async def process(self, prompt: Prompt | Chat, deadline: Deadline) -> AsyncGenerator[Plan | TensorPiece]:
        """The plan, then every item's tensors in pieces, items as they are ready."""
        with self._admit():
            check_whole(prompt)
            plan = await self._map_ahead(await self._plan(prompt, deadline, self._planner.prepare))
            yield plan
            loads = [asyncio.create_task(self._load(item, index)) for index, item in enumerate(plan.items)]
            try:
                for next_loaded in asyncio.as_completed(loads):
                    index, mapped = await next_loaded
                    for piece in _tensor_pieces(index, plan.items[index], mapped):
                        deadline.check("transfer")
                        yield piece
            finally:
                for load in loads:
                    load.cancel()
                await asyncio.gather(*loads, return_exceptions=True)

    async def plan(self, prompt: Prompt | Chat, deadline: Deadline) -> Plan:
        """Only the planning."""
        with self._admit():
            return await self._plan(prompt, deadline, self._planner.plan)

    async def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        with self._admit():
            check_text_size("the text", num_text_bytes(text), self._planner.max_prompt_bytes)
            encode = self._checkpoint.tokenizer.encode
            if len(text) <= INLINE_TEXT:
                return encode(text, add_special_tokens)
            return await asyncio.to_thread(encode, text, add_special_tokens)

    async def detokenize(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """The text of token ids."""
        with self._admit():
            decode = self._checkpoint.tokenizer.decode
            if len(token_ids) <= INLINE_IDS:
                return decode(token_ids, skip_special_tokens)
            return await asyncio.to_thread(decode, token_ids, skip_special_tokens)

    async def drain(self, grace: float) -> None:
        """Refuse new requests; returns when the last one has ended, or after `grace` seconds."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace)

    # --- admit ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _admit(self, count: int = 1) -> Iterator[None]:
        if self._is_draining:
            raise UnavailableError("the service is stopping", stage="admit", retry_after=RETRY_AFTER)
        if count > self._max_pending:
            raise LimitExceededError(
                f"{count} answers are asked for; at most {self._max_pending} are worked on at a time "
                "(--max-pending-requests)",
                stage="admit",
                limit=self._max_pending,
                actual=count,
            )
        if self._num_pending + count > self._max_pending:
            raise OverloadedError(
                f"{self._num_pending} requests are being worked on and {count} more come; at most "
                f"{self._max_pending} are allowed",
                stage="admit",
                limit=self._max_pending,
                actual=self._num_pending + count,
                retry_after=RETRY_AFTER,
            )
        self._num_pending += count
        self._idle.clear()
        try:
            yield
        finally:
            self._num_pending -= count
            if not self._num_pending:
                self._idle.set()

    # --- plan -------------------------------------------------------------------------------------

    async def _plan(
        self, prompt: Prompt | Chat, deadline: Deadline, make_plan: Callable[[Prompt | Chat], Plan]
    ) -> Plan:
        deadline.check("plan")
        with stage("plan"):
            if _is_small(prompt):
                return make_plan(prompt)
            return await asyncio.to_thread(make_plan, prompt)

    async def _map_ahead(self, plan: Plan) -> Plan:
        """Map the items whose family has no layout: only then is known what tensors Start is to announce."""
        ahead = [index for index, item in enumerate(plan.items) if item.layout is None]
        if not ahead:
            return plan
        mapped = await asyncio.gather(*(self._media.load(plan.items[index], index) for index in ahead))
        items = list(plan.items)
        for index, tensors in zip(ahead, mapped, strict=True):
            items[index] = replace(items[index], mapped=tensors)
        return replace(plan, items=tuple(items))

    # --- decode, map, stream, detokenize ----------------------------------------------------------

    async def _run(self, call: GenerateCall, plan: Plan, executor: Executor) -> AsyncGenerator[Delta | Ended]:
        """One answer."""
        call.deadline.check("start")
        with stage("execute", is_remote=True):
            answer = Answer(self._checkpoint.tokenizer, call.stop, plan, call.sampling.min_tokens)
            sender = ItemSender(plan, self._media, executor, answer.add_times)
            with executor.request(make_start(call, plan, self._checkpoint.fingerprint.digest)) as remote:
                self.num_prompt_tokens += len(plan.prompt_token_ids)
                try:
                    # The stream's writer goes first: a worker would keep the interpreter from it.
                    await asyncio.sleep(0)
                    sender.begin()
                    async for piece in self._answer(call, answer, sender, remote):
                        yield piece
                finally:
                    sender.cancel()

    async def _answer(
        self, call: GenerateCall, answer: Answer, sender: ItemSender, remote: RemoteRequest
    ) -> AsyncIterator[Delta | Ended]:
        timer = remote.fail_after(call.deadline.time_left, lambda: _late(sender))
        try:
            while True:
                delta = Delta()
                ended: Ended | None = None
                for event in await remote.next_events():
                    if isinstance(event, MissingItems):
                        sender.send(event.indices, remote)
                    elif isinstance(event, PromptScores):
                        delta.prompt_logprobs += event.logprobs
                    elif isinstance(event, TokenOutput) and not answer.is_stopped:
                        answer.add(event.token_id, event.logprobs, delta)
                    elif isinstance(event, Completed):
                        ended = answer.complete(event.completion)
                is_stopped = answer.is_stopped and ended is None
                if is_stopped:
                    remote.stop()  # before anybody takes the text: generating ends now
                if delta.token_ids or delta.prompt_logprobs:
                    yield delta
                if is_stopped:
                    ended = answer.stopped(await remote.completion(_patience(call.deadline)))
                if ended is not None:
                    yield ended
                    return
        finally:
            if timer is not None:
                timer.cancel()

    async def _load(self, item: PlannedItem, index: int) -> tuple[int, MappedItem]:
        return index, item.mapped or await self._media.load(item, index)


def check_call(call: GenerateCall, vocab_size: int) -> None:
    """What can be refused without looking at the input."""
    check_sampling(call.sampling, vocab_size=vocab_size)
    check_request_id(call.request_id)
    check_whole(call.input)


def check_whole(prompt: Prompt | Chat) -> None:
    """InvalidInputError where only the beginning of a file was sent."""
    for index, media in enumerate(prompt.media):
        if isinstance(media.source, MediaHeader):
            raise InvalidInputError(
                f"item {index} is only a header: Plan takes those, Generate and Process need the whole file",
                stage="admit",
                item=index,
            )


def _tensor_pieces(index: int, item: PlannedItem, mapped: MappedItem) -> Iterator[TensorPiece]:
    for tensor_index, name in enumerate(item.tensors):
        for chunk in split_tensor(0, index, tensor_index, tensor_bytes(mapped.tensors[name])):
            yield TensorPiece(index, tensor_index, chunk.offset, chunk.data)


def _patience(deadline: Deadline) -> float:
    """Half of what is left at most: the client's own clock may be ahead of ours."""
    left = deadline.time_left
    return STOP_PATIENCE if left is None else min(STOP_PATIENCE, left / 2)


def _late(sender: ItemSender) -> DiptychError:
    where = "generate" if sender.is_done else "decode"
    return DeadlineError(f"the deadline passed in stage {where!r}", stage=where)


def _is_small(prompt: Prompt | Chat) -> bool:
    """Whether planning takes so little that nobody notices it on the event loop."""
    if isinstance(prompt, Prompt):
        num_parts, num_characters = 1, len(prompt.text)
    else:
        num_parts = sum(1 + len(message.parts) for message in prompt.messages)
        num_characters = sum(map(len, prompt.texts))
    num_media_bytes = sum(_media_size(media) for media in prompt.media)
    return num_parts <= INLINE_PARTS and num_characters <= INLINE_TEXT and num_media_bytes <= INLINE_MEDIA_BYTES


def _media_size(media: Media) -> int:
    return len(media.source.prefix) if isinstance(media.source, MediaHeader) else len(media.source)

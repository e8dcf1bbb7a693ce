"""What the engine process does once it is booted: messages in, a step, a report out, until told to stop."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np
import torch

from executor_service.engine.boot import BootedEngine
from executor_service.engine.messages import (
    Abort,
    Announce,
    Complete,
    FinishReason,
    ItemSlots,
    Shutdown,
    Submit,
    TensorSlot,
    ToEngine,
)
from executor_service.engine.pipe import send_report
from executor_service.engine.request import EngineItem, Request
from registry import PlaceholderRange, TensorSpec


class EngineLoop:
    """Owns the engine, the front's connection and a view of the shared arena."""

    def __init__(self, connection: Connection, arena: memoryview, booted: BootedEngine) -> None:
        self._connection = connection
        self._arena = arena
        self._engine = booted.engine
        self._family = booted.family
        self._max_model_len = booted.report.max_model_len
        self._announced: dict[int, Announce] = {}
        self._stopping = False
        if booted.engine.runner.device.type == "cuda":
            _page_lock(arena)

    def run(self) -> None:
        """Receive, step, send; waits for messages while there is no work."""
        while not self._stopping:
            self._receive()
            if self._engine.has_work:
                send_report(self._connection, self._engine.step())

    def _receive(self) -> None:
        """Take every message that is there; wait for one if there is nothing else to do."""
        while not self._stopping and (not self._engine.has_work or self._connection.poll()):
            self._handle(self._connection.recv())

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._add(message)
            case Announce():
                self._announced[message.submit.request_id] = message
            case Complete():
                self._add(self._announced.pop(message.request_id).completed(message))
            case Abort():
                for request_id in message.request_ids:
                    self._announced.pop(request_id, None)
                self._engine.abort(message.request_ids)
            case Shutdown():
                self._stopping = True

    def _add(self, submit: Submit) -> None:
        """Queue a request; a plugin's `positions` may raise, which is that request's end alone."""
        try:
            request = self._make_request(submit)
        except Exception as error:
            # Without a layout nobody has attested the tensors that it reads: then they are the sender's fault.
            is_attested = all(self._family.has_layout(item.info.modality) for item in submit.items)
            reason = FinishReason.FAILED if is_attested else FinishReason.MISMATCHED
            self._engine.refuse(submit.request_id, reason, f"positions: {type(error).__name__}: {error}")
            return
        self._engine.add(request)

    def _make_request(self, submit: Submit) -> Request:
        items = [self._make_item(item, submit.prompt_token_ids) for item in submit.items]
        positions, delta = self._engine.runner.prompt_positions(submit.prompt_token_ids, items)
        return Request(
            submit.request_id,
            submit.prompt_token_ids,
            items,
            submit.sampling,
            self._max_model_len,
            submit.priority,
            positions,
            delta,
            submit.output_token_ids,
        )

    def _make_item(self, item: ItemSlots, prompt_token_ids: Sequence[int]) -> EngineItem:
        modality, place = item.info.modality, PlaceholderRange(item.offset, item.length)
        tensors = {slot.name: self._view(slot) for slot in item.tensors}
        if self._family.has_layout(modality):
            layout = self._family.layout(item.info)
            return EngineItem(place, modality, layout, tensors, content_digest=item.content_digest)
        specs = {slot.name: TensorSpec(slot.dtype, slot.shape) for slot in item.tensors}
        layout = self._family.observed_layout(modality, prompt_token_ids[place.offset : place.end], specs)
        return EngineItem(place, modality, layout, tensors, is_attested=False, content_digest=item.content_digest)

    def _view(self, slot: TensorSlot) -> torch.Tensor:
        """The tensor's bytes where they are; valid until the front is told that the request has ended."""
        raw = np.frombuffer(self._arena, dtype=np.uint8, count=slot.num_bytes, offset=slot.arena_offset)
        dtype: torch.dtype = getattr(torch, slot.dtype)
        return torch.from_numpy(raw).view(dtype).view(slot.shape)


def _page_lock(arena: memoryview) -> None:
    """Keep the arena where it is in memory, so that the GPU can copy from it while everybody goes on."""
    address = np.frombuffer(arena, dtype=np.uint8).ctypes.data
    status = torch.cuda.cudart().cudaHostRegister(address, arena.nbytes, 0)
    if int(status):
        raise RuntimeError(f"the shared memory for tensors cannot be page-locked: CUDA error {int(status)}")

"""A preprocess service of a test's own, in front of stand-in executors."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from diptych.client import AsyncClient
from diptych.service.lifecycle import running
from preprocess_service.planning import Checkpoint
from preprocess_service.server import PreprocessServer
from preprocess_service.settings import PreprocessSettings
from tests.stand_in_executor import StandInExecutor


def words(checkpoint: Checkpoint, text: str) -> list[int]:
    """The token ids of a piece of text."""
    return checkpoint.tokenizer.encode(text, add_special_tokens=False)


@contextlib.asynccontextmanager
async def served(
    checkpoint_dir: Path, *executors: StandInExecutor, **settings: Any
) -> AsyncIterator[tuple[PreprocessServer, AsyncClient]]:
    """A service in front of these executors, and its client."""
    for executor in executors:
        await executor.start()
    addresses = ",".join(executor.address for executor in executors)
    values = PreprocessSettings(model=checkpoint_dir, port=0, executor=addresses, **settings)
    try:
        async with running(PreprocessServer(values)) as server, AsyncClient(server.address) as client:
            assert isinstance(server, PreprocessServer)
            yield server, client
    finally:
        for executor in executors:
            await executor.stop()

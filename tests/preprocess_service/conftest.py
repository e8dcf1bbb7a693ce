"""A preprocess service in front of a stand-in executor, booted once per module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from PIL import Image

from diptych.client import AsyncClient
from diptych.service.lifecycle import running
from preprocess_service.planning import Checkpoint
from preprocess_service.server import PreprocessServer
from preprocess_service.settings import PreprocessSettings
from tests.stand_in_executor import StandInExecutor
from tests.tiny_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA checkpoint without weights: 4 features per picture, 600 token ids."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-llava")


@pytest.fixture(scope="session")
def checkpoint(checkpoint_dir: Path) -> Checkpoint:
    """The same, read."""
    return Checkpoint(checkpoint_dir)


@pytest_asyncio.fixture(scope="module")
async def executor(checkpoint: Checkpoint) -> AsyncIterator[StandInExecutor]:
    """A stand-in that agrees with the checkpoint; every test finds it with its defaults."""
    one = StandInExecutor(checkpoint.fingerprint)
    await one.start()
    yield one
    await one.stop()


@pytest.fixture(scope="module")
def small_pixel_limit() -> Iterator[None]:
    """Mutated files may ask for gigapixels; let Pillow, as the reference, refuse those instead of allocating them."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 1 << 20
    yield
    Image.MAX_IMAGE_PIXELS = limit


@pytest.fixture(autouse=True)
def defaults(request: pytest.FixtureRequest) -> None:
    """The stand-in as it was made, whatever the last test did with it."""
    if "executor" in request.fixturenames:
        one: StandInExecutor = request.getfixturevalue("executor")
        fresh = StandInExecutor(one.fingerprint)
        names = ("script", "refusal", "finish_reason", "window", "delay", "minds_stops", "accepting", "num_running")
        for name in names:
            setattr(one, name, getattr(fresh, name))
        one.requests.clear()
        one.order.clear()


@pytest_asyncio.fixture(scope="module", params=["shared", "per-request"])
async def server(
    request: pytest.FixtureRequest, checkpoint_dir: Path, executor: StandInExecutor
) -> AsyncIterator[PreprocessServer]:
    """The service, with either kind of stream."""
    settings = PreprocessSettings(
        model=checkpoint_dir, port=0, executor=executor.address, executor_streams=request.param, max_pending_requests=8
    )
    async with running(PreprocessServer(settings)) as one:
        assert isinstance(one, PreprocessServer)
        yield one


@pytest_asyncio.fixture(scope="module")
async def client(server: PreprocessServer) -> AsyncIterator[AsyncClient]:
    """A client of the service."""
    async with AsyncClient(server.address) as one:
        yield one

"""Who a peer is: by its certificate, where a program has put the servicer on a server that asks for one.

`diptych executor` has no such server: there all peers are one. Real certificates, real TLS, a real executor.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from executor_service.servicer import ExecutorServicer, add_to_server
from registry import MediaInfo, MediaItem
from tests.executor_service.peer import Peer, Planned, Planner

CERTIFICATES = {
    "server": ("server", "subjectAltName=IP:127.0.0.1"),
    "alice": ("sender", "subjectAltName=URI:spiffe://mesh/alice,DNS:shared.example"),
    "bob": ("sender", "subjectAltName=URI:spiffe://mesh/bob,DNS:shared.example"),
    "carol": ("carol", "basicConstraints=CA:FALSE"),
}
"""Common name, and what else they say: Carol's has no other name, and the other senders differ in one of three."""


class Authority:
    """Issues certificates; needs the program openssl."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run("req -x509 -nodes -keyout ca.key -out ca.pem -subj /CN=authority -days 2", is_new=True)
        for name, (common_name, extension) in CERTIFICATES.items():
            (folder / f"{name}.ext").write_text(extension)
            self._run(f"req -nodes -keyout {name}.key -out {name}.csr -subj /CN={common_name}", is_new=True)
            self._run(
                f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out {name}.pem -days 2 "
                f"-extfile {name}.ext"
            )

    def pair(self, name: str) -> tuple[bytes, bytes]:
        """Private key and certificate."""
        return self._read(f"{name}.key"), self._read(f"{name}.pem")

    @property
    def root(self) -> bytes:
        return self._read("ca.pem")

    def _read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def _run(self, arguments: str, is_new: bool = False) -> None:
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"] if is_new else []
        command = ["openssl", *arguments.split(), *key]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if shutil.which("openssl") is None:
        reason = "openssl is not installed"
        if os.environ.get("STRICT") == "1" or os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return Authority(tmp_path_factory.mktemp("certificates"))


class Embedding:
    """Somebody else's server: the running executor's front behind ports with credentials."""

    def __init__(self, server: tuple, authority: Authority) -> None:
        self._front, self._loop = server[0].front, server[1]
        self._authority = authority
        self._server: Any = None
        self._ports: dict[bool, int] = {}

    async def start(self) -> None:
        self._server = grpc.aio.server()
        add_to_server(ExecutorServicer(self._front, "embedded"), self._server)
        for asks in (True, False):
            pair = self._authority.pair("server")
            credentials = grpc.ssl_server_credentials([pair], self._authority.root if asks else None, asks)
            self._ports[asks] = self._server.add_secure_port("127.0.0.1:0", credentials)
        await self._server.start()

    def wait(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def stop(self) -> None:
        await self._server.stop(0)

    def channel(self, name: str | None, asks: bool = True) -> grpc.Channel:
        """A connection of who has this certificate, to the port that asks for one or to the one that does not."""
        pair = self._authority.pair(name) if name is not None else ()
        credentials = grpc.ssl_channel_credentials(self._authority.root, *pair)
        return grpc.secure_channel(f"127.0.0.1:{self._ports[asks]}", credentials)


@pytest.fixture
def embedding(server, authority: Authority, channel) -> Iterator[Embedding]:
    """`channel` looks afterwards whether everything is free again."""
    one = Embedding(server, authority)
    one.wait(one.start())
    yield one
    one.wait(one.stop())


def cat(planner: Planner, case: str, seed: int) -> Planned:
    """A request with the picture of this seed; in one case all offer theirs under the same digest."""
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    planned = planner.plan_items("Look: <image> so?", [MediaItem(MediaInfo.image(60, 80), picture)])
    planned.start.items[0].media_digest = hashlib.sha256(case.encode()).digest()
    return planned


def ask(channel: grpc.Channel, planned: Planned) -> tuple[list[int], list[int]]:
    """What was missing, and the tokens; what is asked for is sent."""
    with Peer(channel) as peer:
        peer.start(1, planned)
        while (answer := peer.answers.get(1)) is None or answer.missing is None:
            peer.read()
        if answer.missing:
            peer.wait_credit(1)
            peer.send_tensors(1, planned)
        tokens = peer.finish(1).tokens
        assert answer.finals[0].HasField("completion"), answer.finals
        assert answer.missing is not None
        return answer.missing, tokens


@pytest.fixture
def expected(channel, planner) -> list[list[int]]:
    """The answers about the pictures of seeds 0 to 3, whoever asks."""
    answers = [ask(channel, cat(planner, f"expected {seed}", seed))[1] for seed in range(4)]
    assert len({tuple(tokens) for tokens in answers}) == 4
    return answers


def test_a_digest_of_another_peer_finds_nothing_and_changes_nothing(
    embedding: Embedding, channel, planner, expected
) -> None:
    """Four peers, one digest: those with certificates, two of which differ in one name alone, and the nameless."""
    channels = [embedding.channel("alice"), embedding.channel("bob"), embedding.channel("carol"), channel]
    for seed, one in enumerate(channels):
        assert ask(one, cat(planner, "one digest", seed)) == ([0], expected[seed]), "nothing of the others' is found"
    for seed, one in enumerate(channels):
        assert ask(one, cat(planner, "one digest", seed)) == ([], expected[seed]), "and everybody's own is unchanged"
    for one in channels[:3]:
        one.close()


def test_a_peer_is_known_again_on_another_connection(embedding: Embedding, planner, expected) -> None:
    for missing in ([0], []):
        with embedding.channel("carol") as one:
            assert ask(one, cat(planner, "known again", 1)) == (missing, expected[1])


def test_a_server_that_asks_for_no_certificate_knows_no_peers(embedding: Embedding, channel, planner, expected) -> None:
    """TLS alone proves nothing, nor does a certificate that nobody has asked for."""
    assert ask(channel, cat(planner, "nameless", 2)) == ([0], expected[2])
    for name in (None, "alice"):
        with embedding.channel(name, asks=False) as one:
            assert ask(one, cat(planner, "nameless", 3)) == ([], expected[2]), "what was sent under it before"

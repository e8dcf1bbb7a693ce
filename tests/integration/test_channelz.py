"""Channelz, gRPC's own account of its servers: with --debug on both services, and not without."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc

from tests.integration.conftest import prompt_request
from tests.integration.test_tokens import collect
from tests.services import Stack, stack


@pytest.fixture(scope="module")
def served(checkpoint) -> Iterator[Stack]:
    with stack(checkpoint, executor={"debug": True}, preprocess={"debug": True}) as services:
        yield services


@pytest.mark.parametrize("service", ["preprocess", "executor"])
def test_channelz_lists_the_server(served, service: str) -> None:
    collect(served.stub, prompt_request("words", []))
    address = getattr(served, f"{service}_address")
    with grpc.insecure_channel(address) as channel:
        stub = channelz_pb2_grpc.ChannelzStub(channel)
        servers = stub.GetServers(channelz_pb2.GetServersRequest()).server
    assert servers
    assert sum(server.data.calls_started for server in servers) > 0


@pytest.mark.parametrize("service", ["preprocess", "executor"])
def test_without_debug_there_is_none(checkpoint, service: str) -> None:
    with (
        stack(checkpoint) as services,
        grpc.insecure_channel(getattr(services, f"{service}_address")) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channelz_pb2_grpc.ChannelzStub(channel).GetServers(channelz_pb2.GetServersRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

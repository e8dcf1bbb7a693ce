"""JSON log lines of both services, as processes: those of one request have the trace id of its spans."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from diptych.v1 import preprocess_pb2, preprocess_pb2_grpc
from tests.cli.command import address_of, started
from tests.integration.conftest import prompt_request
from tests.otlp_receiver import Receiver, receiver

FLAGS = ("--port", "0", "--executor-port", "0", "--device", "cpu", "--max-model-len", "256", "--metrics-port", "0")
SERVICES = {"diptych.rpc": "diptych-preprocess", "diptych.executor": "diptych-executor"}
"""Who logs the end of a request, by logger; grpc's own debug lines have the ids as well."""


@dataclass
class Running:
    """Both services, and the file that their logs go to."""

    stub: preprocess_pb2_grpc.PreprocessServiceStub
    log: Path

    @property
    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text("utf-8").splitlines()]

    def wait_lines(self, trace_id: str, loggers: Set[str]) -> list[dict]:
        """These loggers' lines with that trace id; those of a call may be written after the client has its answer."""
        until = time.monotonic() + 10
        found: list[dict] = []
        while {line["logger"] for line in found} < loggers:
            assert time.monotonic() < until, f"only {found}"
            found = [line for line in self.lines if line.get("trace_id") == trace_id and line["logger"] in loggers]
        return found

    def of(self, request_id: str) -> set[str]:
        """Trace ids in the executor's lines about a request."""
        return {line["trace_id"] for line in self.lines if line.get("request_id") == request_id}


@pytest.fixture(scope="module")
def collector() -> Iterator[Receiver]:
    with receiver() as one:
        yield one


@pytest.fixture(scope="module", params=["traced", "not traced"])
def services(request, checkpoint, collector, tmp_path_factory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("logs") / "stderr"
    flags = [*FLAGS, "--log-format", "json", "--log-level", "debug"]
    if request.param == "traced":
        flags += ["--otlp-endpoint", collector.endpoint]
    environment = {**os.environ, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with (
        log.open("w") as stderr,
        started("serve", "--model", checkpoint, *flags, stderr=stderr, env=environment) as process,
        grpc.insecure_channel(address_of(process)) as channel,
    ):
        yield Running(preprocess_pb2_grpc.PreprocessServiceStub(channel), log)


def ask(services: Running, request_id: str, metadata: tuple[tuple[str, str], ...] = (), text: str = "words") -> None:
    request = prompt_request(text, [], max_tokens=3)
    request.request_id = request_id
    list(services.stub.Generate(request, metadata=metadata, timeout=60))


def test_lines_of_both_services_have_the_callers_trace_id(services, collector, request) -> None:
    trace_id = secrets.token_hex(16)
    ask(services, "with-a-caller", (("traceparent", f"00-{trace_id}-{'7' * 16}-01"),))
    found = services.wait_lines(trace_id, SERVICES.keys())
    assert all(len(line["span_id"]) == 16 for line in found)
    assert next(line for line in found if line["logger"] == "diptych.rpc")["code"] == "OK"
    if "not traced" in request.node.name:
        return
    logged = {line["span_id"] for line in found}
    tree = collector.wait_tree(trace_id, lambda span: logged <= {one.span_id for one in span.walk()})
    spans = {span.span_id: span.service for span in tree.walk()}
    for line in found:
        assert spans[line["span_id"]] == SERVICES[line["logger"]]


def test_a_request_without_a_caller_has_one_trace_id_on_both(services) -> None:
    for request_id in ("first", "second"):
        ask(services, request_id)
    (first,), (second,) = services.of("first"), services.of("second")
    assert first != second
    for trace_id in (first, second):
        services.wait_lines(trace_id, SERVICES.keys())


def test_lines_outside_requests_have_none(services) -> None:
    settings = [line for line in services.lines if line["message"] == "settings"]
    assert len(settings) == 2
    assert not any("trace_id" in line for line in settings)


def test_the_metrics_ports_are_in_the_log(services) -> None:
    found = [line["message"] for line in services.lines if line["logger"] == "diptych.telemetry"]
    assert len(found) == 2
    assert all(message.startswith("metrics on http://127.0.0.1:") for message in found)


def test_a_failure_of_a_call_is_logged_with_its_code(services) -> None:
    trace_id = secrets.token_hex(16)
    with pytest.raises(grpc.RpcError):
        services.stub.Plan(preprocess_pb2.PlanRequest(), metadata=(("traceparent", f"00-{trace_id}-{'7' * 16}-01"),))
    (line,) = services.wait_lines(trace_id, {"diptych.rpc"})
    assert (line["method"], line["code"]) == ("Plan", "INVALID_ARGUMENT")

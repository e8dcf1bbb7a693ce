"""One trace per request through both services and the engine, as a collector receives it."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from diptych.v1 import executor_pb2, preprocess_pb2
from executor_service.front.reports import SPAN_NAME as EXECUTE
from tests.integration.conftest import media, picture_bytes, prompt_request
from tests.integration.test_tokens import collect
from tests.otlp_receiver import Receiver, Span, receiver
from tests.services import Stack, stack

GENERATE = "diptych.v1.PreprocessService/Generate"
CLOCKS = 0.002
"""Seconds by which times of two processes may disagree."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Receiver]:
    with pytest.MonkeyPatch.context() as patch, receiver() as one:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        patch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "200")
        yield one


@pytest.fixture(scope="module")
def served(checkpoint, collector) -> Iterator[Stack]:
    options = {"otlp_endpoint": collector.endpoint}
    executor = {"max_num_batched_tokens": 96, "max_num_seqs": 16, **options}
    with stack(checkpoint, executor=executor, preprocess=options) as services:
        yield services


def new_trace() -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """(trace id, the caller's span id, the metadata that says so)."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return trace_id, span_id, (("traceparent", f"00-{trace_id}-{span_id}-01"), ("tracestate", "vendor=one"))


def is_whole(tree: Span) -> bool:
    """The request's own span is the last to end; those of the executor come on their own."""
    return tree.name == GENERATE and any(span.name == EXECUTE for span in tree.walk())


def assert_nested(span: Span) -> None:
    for child in span.children:
        assert child.trace_id == span.trace_id
        assert child.began >= span.began - CLOCKS, (span.name, child.name)
        assert child.ended <= span.ended + CLOCKS, (span.name, child.name)
        assert child.ended >= child.began
        assert_nested(child)


def names(span: Span) -> list[str]:
    return [child.name for child in span.children]


def traced(served: Stack, request: preprocess_pb2.GenerateRequest) -> tuple[str, str, list[int]]:
    """(trace id, caller's span id, tokens)."""
    trace_id, span_id, metadata = new_trace()
    responses = list(served.stub.Generate(request, metadata=metadata, timeout=60))
    return trace_id, span_id, [token for response in responses for token in response.token_ids]


def test_one_trace_of_one_request(served, collector) -> None:
    pictures = [picture_bytes(8001), picture_bytes(8002, 500, 700)]
    request = prompt_request("<image> and <image>", pictures, max_tokens=6, seed=2**64 - 1, temperature=0.5)
    request.request_id = "traced"
    trace_id, caller, tokens = traced(served, request)
    tree = collector.wait_tree(trace_id, is_whole)
    assert_nested(tree)
    assert (tree.parent_id, tree.kind, tree.service) == (caller, "SERVER", "diptych-preprocess")
    assert not any(span.failed for span in tree.walk())
    assert names(tree) == ["plan", "execute"]
    assert names(tree.child("plan")) == ["fetch", "probe", "tokenize", "expand"]
    execute = tree.child("execute")
    assert execute.kind == "CLIENT"
    assert sorted(names(execute)) == sorted([EXECUTE, "decode", "decode", "map", "map"])
    assert {child.attributes.get("diptych.item") for child in execute.children if child.name == "decode"} == {0, 1}
    remote = execute.child(EXECUTE)
    assert (remote.kind, remote.service) == ("SERVER", "diptych-executor")
    assert names(remote) == ["receive", "queue", "prefill", "generate"]
    assert names(remote.child("prefill")) == ["encode"]
    # Stages follow each other without a gap, and together are the request.
    stages = remote.children
    for before, after in itertools.pairwise(stages):
        assert abs(after.began - before.ended) < CLOCKS
    for span in execute.children:
        if span.name == "map":
            assert span.ended <= remote.child("receive").ended + CLOCKS
    assert all(span.trace_state == "vendor=one" for span in tree.walk())
    assert tree.attributes["diptych.request_id"] == remote.attributes["diptych.request_id"] == "traced"
    assert tree.attributes["gen_ai.request.max_tokens"] == 6
    assert tree.attributes["gen_ai.request.seed"] == str(2**64 - 1)
    assert tree.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert tree.attributes["gen_ai.usage.output_tokens"] == remote.attributes["gen_ai.usage.output_tokens"] == 6
    assert tree.attributes["rpc.grpc.status_code"] == 0
    assert len(tokens) == 6


def test_text_alone_and_what_the_caches_save(served, collector) -> None:
    trace_id, _, _ = traced(served, prompt_request("words alone", []))
    tree = collector.wait_tree(trace_id, is_whole)
    assert names(tree.child("plan")) == ["tokenize", "expand"]
    (remote,) = tree.child("execute").children
    assert names(remote) == ["queue", "prefill", "generate"]
    for _ in range(2):
        trace_id, _, _ = traced(served, prompt_request("<image> again", [picture_bytes(8003)]))
    tree = collector.wait_tree(trace_id, is_whole)
    assert names(tree.child("execute")) == [EXECUTE], "nothing is decoded that the executor holds"
    assert "encode" not in [span.name for span in tree.walk()]


def test_many_at_once_on_one_stream_do_not_mix(served, collector) -> None:
    requests = [prompt_request(f"<image> number {n}", [picture_bytes(8100 + n)], max_tokens=3 + n) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        traces = list(pool.map(lambda request: traced(served, request), requests))
    assert len({trace_id for trace_id, _, _ in traces}) == 8
    for n, (trace_id, caller, _) in enumerate(traces):
        tree = collector.wait_tree(trace_id, is_whole)
        assert_nested(tree)
        assert tree.parent_id == caller
        assert sorted(names(tree.child("execute"))) == sorted([EXECUTE, "decode", "map"])
        remote = tree.child("execute").child(EXECUTE)
        assert remote.attributes["gen_ai.usage.output_tokens"] == 3 + n
        assert names(remote) == ["receive", "queue", "prefill", "generate"]


def test_a_broken_picture_marks_its_stage(served, collector) -> None:
    data = picture_bytes(8200, 200, 200)
    trace_id, _, metadata = new_trace()
    with pytest.raises(grpc.RpcError):
        list(served.stub.Generate(prompt_request("<image>", [data[: len(data) // 2]]), metadata=metadata))
    tree = collector.wait_tree(trace_id, is_whole)
    decode = tree.child("execute").child("decode")
    for span in (tree, tree.child("execute"), decode):
        assert span.failed
        assert span.attributes["error.type"] == "INVALID_ARGUMENT"
        assert span.message.startswith("INVALID_ARGUMENT: item 0: the PNG image cannot be decoded")
        assert span.attributes["diptych.error.stage"] == "decode"
    assert tree.attributes["rpc.grpc.status_code"] == 3
    remote = tree.child("execute").child(EXECUTE)
    assert (names(remote), remote.attributes["diptych.status"]) == (["receive"], "CANCELLED")


def test_a_refused_request_has_a_trace(served, collector) -> None:
    trace_id, _, metadata = new_trace()
    with pytest.raises(grpc.RpcError):
        list(served.stub.Generate(prompt_request("<image>", [b"nothing of the kind"]), metadata=metadata))
    tree = collector.wait_tree(trace_id, lambda span: span.name == GENERATE)
    assert [span.name for span in tree.walk() if span.failed] == [GENERATE, "plan", "probe"]
    trace_id, _, metadata = new_trace()
    start = executor_pb2.Start(fingerprint=b"?" * 32, traceparent=metadata[0][1], request_id="refused")
    request = executor_pb2.ExecuteRequest(handle=1, start=start)
    (answer,) = list(served.executor_stub.Execute(iter([request])))
    assert answer.final.status.code == 9
    tree = collector.wait_tree(trace_id, lambda span: span.name == EXECUTE)
    assert (tree.failed, tree.attributes["error.type"]) == (True, "FAILED_PRECONDITION")


def test_a_cancelled_request_ends_its_spans(served, collector) -> None:
    trace_id, _, metadata = new_trace()
    call = served.stub.Generate(prompt_request("words", [], max_tokens=400), metadata=metadata)
    next(call)
    call.cancel()
    tree = collector.wait_tree(trace_id, is_whole)
    assert_nested(tree.child("plan"))
    remote = tree.child("execute").child(EXECUTE)
    for span in (tree, tree.child("execute"), remote):
        assert span.attributes["diptych.status"] == "CANCELLED"
        assert not span.failed
    assert tree.attributes["rpc.grpc.status_code"] == 1
    assert names(remote) == ["queue", "prefill", "generate"]
    assert remote.attributes["gen_ai.usage.output_tokens"] < 400


def test_several_answers_are_one_trace(served, collector) -> None:
    request = prompt_request("<image> in two ways", [picture_bytes(8300)], max_tokens=4)
    request.n = 2
    trace_id, _, tokens = traced(served, request)
    tree = collector.wait_tree(trace_id, is_whole)
    assert names(tree) == ["plan", "execute", "execute"]
    assert [len(execute.children) for execute in tree.children[1:]] == [3, 1], "the picture is sent once"
    assert tree.attributes["gen_ai.usage.output_tokens"] == len(tokens) == 8
    assert tree.attributes["gen_ai.response.finish_reasons"] == ["length", "length"]


def test_other_calls_have_a_span_of_their_own(served, collector) -> None:
    trace_id, caller, metadata = new_trace()
    served.stub.Plan(
        preprocess_pb2.PlanRequest(prompt=preprocess_pb2.Prompt(text="<image>", media=[media(picture_bytes(1))])),
        metadata=metadata,
    )
    tree = collector.wait_tree(trace_id, lambda span: bool(span.children))
    assert (tree.name, tree.parent_id) == ("diptych.v1.PreprocessService/Plan", caller)
    assert names(tree.child("plan")) == ["fetch", "probe", "tokenize", "expand"]
    trace_id, _, metadata = new_trace()
    served.executor_stub.GetModel(executor_pb2.GetModelRequest(), metadata=metadata)
    tree = collector.wait_tree(trace_id, lambda span: True)
    assert (tree.name, tree.service) == ("diptych.v1.ExecutorService/GetModel", "diptych-executor")


@pytest.mark.parametrize("traceparent", ["nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", ""])
def test_a_malformed_context_begins_a_new_trace(served, collector, traceparent: str) -> None:
    request = prompt_request("words", [], max_tokens=2)
    request.request_id = secrets.token_hex(8)
    list(served.stub.Generate(request, metadata=(("traceparent", traceparent),)))
    tree = collector.wait_tree(_trace_of(collector, request.request_id), is_whole)
    assert tree.parent_id == ""
    assert names(tree) == ["plan", "execute"]


def test_a_caller_who_does_not_record_is_followed(served, collector) -> None:
    trace_id, span_id, _ = new_trace()
    collect_with = (("traceparent", f"00-{trace_id}-{span_id}-00"),)
    list(served.stub.Generate(prompt_request("words", [], max_tokens=2), metadata=collect_with))
    recorded, _, _ = traced(served, prompt_request("words", [], max_tokens=2))
    collector.wait_tree(recorded, is_whole)
    assert not collector.trees(trace_id)


def test_metrics_are_sent_too(served, collector) -> None:
    collect(served.stub, prompt_request("words", []))
    wanted = {"diptych-preprocess": "gen_ai.server.time_to_first_token", "diptych-executor": "diptych.kv_cache.blocks"}
    traced(served, prompt_request("words", []))
    for service, metric in wanted.items():
        _eventually(lambda service=service, metric=metric: metric in collector.metric_names.get(service, ()))


def test_a_collector_that_is_away_delays_nobody(checkpoint) -> None:
    options = {"otlp_endpoint": "http://127.0.0.1:9"}
    with stack(checkpoint, executor=options, preprocess=options) as services:
        assert len(traced(services, prompt_request("words", [], max_tokens=4))[2]) == 4


def _trace_of(collector: Receiver, request_id: str) -> str:
    def find() -> list[str]:
        return [span.trace_id for span in collector.spans if span.attributes.get("diptych.request_id") == request_id]

    _eventually(lambda: bool(find()))
    return find()[0]


def _eventually(condition, seconds: float = 15.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.05)

"""500 mixed requests at once, some of them hostile: every honest answer is the one it gets when alone (float64)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from diptych.v1 import preprocess_pb2
from tests.integration.conftest import picture_bytes, prompt_request
from tests.integration.test_caches import counts
from tests.integration.test_tokens import collect
from tests.services import stack

NUM_REQUESTS, NUM_CASES, CONCURRENCY = 500, 40, 32


def make_case(number: int) -> preprocess_pb2.GenerateRequest:
    """Zero to three pictures out of seven, short and long prompts, greedy, seeded, penalised."""
    rng = np.random.default_rng(number)
    pictures = [picture_bytes(8000 + int(rng.integers(7)), 60, 80) for _ in range(number % 4)]
    text = "Say something. " * int(rng.integers(0, 9)) + "and <image> " * len(pictures) + "?"
    options: dict[str, object] = {"max_tokens": int(rng.integers(1, 24))}
    if number % 3 == 1:
        options |= {"temperature": 0.9, "top_p": 0.95, "seed": number}
    elif number % 3 == 2:
        options |= {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "temperature": 1.1, "min_p": 0.01, "seed": 7}
    request = prompt_request(text, pictures, **options)
    request.priority = number % 2
    return request


@pytest.fixture(scope="module")
def scarce(checkpoint):
    """Little of everything, so that requests are preempted, and features and pictures forgotten."""
    limits = {
        "max_num_seqs": 12, "max_num_batched_tokens": 64, "max_model_len": 512, "kv_cache_memory": "640KiB",
        "encoder_cache_memory": "40KiB", "media_memory": "256KiB",
    }  # fmt: skip
    with stack(checkpoint, executor=limits) as services:
        yield services


def disturb(stub, number: int, ended: threading.Event) -> None:
    """Cancel in the middle, let deadlines pass, send rubbish."""
    rng = np.random.default_rng(10_000 + number)
    while not ended.is_set():
        request = make_case(int(rng.integers(NUM_CASES)))
        request.sampling.max_tokens = 200
        try:
            if (kind := rng.integers(3)) == 0:
                call = stub.Generate(request, timeout=30)
                for _ in zip(range(rng.integers(1, 6)), call, strict=False):
                    pass
                call.cancel()
            elif kind == 1:
                list(stub.Generate(request, timeout=float(rng.uniform(0.005, 0.3))))
            else:
                list(stub.Generate(prompt_request("<image>", [picture_bytes(1)[: rng.integers(10, 3000)]]), timeout=30))
        except grpc.RpcError as error:
            assert error.code() in (  # noqa: PT017 - any other end is a fault
                grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.CANCELLED,
            )  # fmt: skip


def test_soak(scarce) -> None:
    expected = [collect(scarce.stub, make_case(number))[0] for number in range(NUM_CASES)]
    order = np.random.default_rng(1).integers(0, NUM_CASES, NUM_REQUESTS)
    ended = threading.Event()
    with ThreadPoolExecutor(CONCURRENCY) as pool, ThreadPoolExecutor(3) as others:
        disturbers = [others.submit(disturb, scarce.stub, number, ended) for number in range(3)]
        try:
            answers = list(pool.map(lambda number: collect(scarce.stub, make_case(int(number)))[0], order))
        finally:
            ended.set()
        for disturber in disturbers:
            disturber.result()
    assert all(tokens == expected[number] for number, tokens in zip(order, answers, strict=True))
    scarce.check_idle()
    seen = counts(scarce)
    assert seen["num_preemptions"] > 0
    assert seen["num_cached_tokens"] > 0
    assert seen["num_encoder_cache_hits"] > 0

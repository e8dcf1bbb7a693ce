"""What Prometheus sees: every metric that the page promises, and nothing else, with numbers that are true."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.executor_service.peer import Peer, Planner
from tests.integration.conftest import picture_bytes, prompt_request
from tests.integration.test_tokens import collect
from tests.services import Stack, stack

PAGE = (Path(__file__).parents[2] / "docs" / "observability.md").read_text("utf-8")
ROW = re.compile(
    r"\| `(\w+)` \| (counter|gauge|histogram) \| (\w*) \| ([^|]*) \| (both|preprocess|executor) \| (.+) \|"
)
PIXELS = 3 * 56 * 56
"""Bytes of one mapped picture of the checkpoint."""
TOKENS = 7


@pytest.fixture(scope="module")
def served(checkpoint) -> Iterator[Stack]:
    options = {"metrics_port": 0}
    with stack(checkpoint, executor={"max_num_batched_tokens": 96, **options}, preprocess=options) as services:
        yield services


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        return response.read().decode()


class Scraped:
    """One scrape: types, labels, meanings and values by name as in the text."""

    def __init__(self, text: str) -> None:
        self.rows: dict[str, tuple[str, str]] = {}
        self.labels: dict[str, set[str]] = {}
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(text):
            name = family.name + ("_total" if family.type == "counter" else "")
            self.rows[name] = (family.type, family.documentation)
            labels = self.labels.setdefault(name, set())
            for sample in family.samples:
                labels |= sample.labels.keys() - {"le"}
                self.values[sample.name, frozenset(sample.labels.items())] = sample.value

    def __call__(self, name: str, **labels: str) -> float:
        return sum(
            value
            for (found, given), value in self.values.items()
            if found == name and labels.items() <= dict(given).items()
        )


@pytest.fixture(scope="module")
def busy(served) -> dict[str, Scraped]:
    """Both services' metrics after two requests about a picture, one of text and one with a broken picture."""
    picture = picture_bytes(9001)
    for text, pictures in [("<image> what is it", [picture]), ("<image> what is it", [picture]), ("words", [])]:
        collect(served.stub, prompt_request(text, pictures, max_tokens=TOKENS))
    with pytest.raises(grpc.RpcError):
        list(served.stub.Generate(prompt_request("<image>", [picture_bytes(9002, 200, 200)[:5000]])))
    served.check_idle()
    return {
        "preprocess": Scraped(scrape(served.preprocess.metrics_address)),
        "executor": Scraped(scrape(served.executor.metrics_address)),
    }


def test_the_page_says_what_is_served(busy) -> None:
    rows = {match[1]: match.groups()[1:] for line in PAGE.splitlines() if (match := ROW.match(line))}
    assert len(rows) > 20
    for service, scraped in busy.items():
        promised = {name for name, row in rows.items() if row[3] in ("both", service)}
        # What nobody has seen happen is not there: the executor's part of nothing has failed.
        unseen = {"diptych_stage_failures_total"} if service == "executor" else set()
        assert scraped.rows.keys() - {"target_info"} == promised - unseen
        for name in promised - unseen:
            kind, unit, labels, _, meaning = rows[name]
            assert scraped.rows[name] == (kind, meaning)
            assert scraped.labels[name] == set(re.findall(r"`(\w+)`", labels)), name
            assert name.removesuffix("_total").endswith(unit)


def check_with_promtool(what: str, *files: str, text: str = "") -> str:
    """What it says of something that it must accept."""
    if shutil.which("promtool") is None:
        reason = "promtool, from Prometheus, is not installed"
        if os.environ.get("STRICT") == "1" or os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    command = ["promtool", "check", what, *files]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("service", ["preprocess", "executor"])
def test_promtool_finds_nothing_to_say(served, busy, service: str) -> None:
    text = scrape(getattr(served, service).metrics_address)
    assert check_with_promtool("metrics", text=text) == ""


def test_the_preprocess_service_counts(busy) -> None:
    seen = busy["preprocess"]
    assert seen("diptych_requests_total", method="Generate", code="OK") == 3
    assert seen("diptych_requests_total", method="Generate", code="INVALID_ARGUMENT") == 1
    assert seen("diptych_output_tokens_total") == 3 * TOKENS
    assert seen("gen_ai_server_time_to_first_token_seconds_count") == 3
    assert seen("diptych_inter_token_latency_seconds_count") <= 3 * (TOKENS - 1)
    assert seen("gen_ai_server_request_duration_seconds_count", error_type="INVALID_ARGUMENT") == 1
    assert seen("gen_ai_server_request_duration_seconds_count") == 4
    assert 0 < seen("gen_ai_server_time_to_first_token_seconds_sum") < 60
    assert seen("diptych_payload_bytes_total", kind="media") == 2 * len(picture_bytes(9001)) + 5000
    assert seen("diptych_payload_bytes_total", kind="tensors_sent") == PIXELS
    assert seen("diptych_stage_failures_total", stage="decode", code="INVALID_ARGUMENT") == 1
    assert seen("diptych_stage_duration_seconds_count", stage="plan") == 4
    assert seen("diptych_stage_duration_seconds_count", stage="decode") == 2
    assert seen("diptych_stage_duration_seconds_count", stage="map") == 1
    assert (seen("diptych_executors_ready"), seen("diptych_requests_pending")) == (1, 0)


def test_the_executor_counts(busy) -> None:
    seen = busy["executor"]
    assert seen("diptych_requests_total", method="Execute", code="OK") == 3
    assert seen("diptych_requests_total", method="Execute", code="CANCELLED") == 1
    assert seen("diptych_payload_bytes_total", kind="tensors_received") == PIXELS
    assert seen("diptych_payload_bytes_total", kind="tensors_held") == PIXELS
    assert (seen("diptych_items_total", source="received"), seen("diptych_items_total", source="held")) == (1, 1)
    assert seen("diptych_encoder_items_total") == 1
    assert seen("diptych_prefix_cache_hit_tokens_total") == 16
    assert seen("diptych_output_tokens_total") == 3 * TOKENS
    assert seen("diptych_engine_step_duration_seconds_count") >= 3 * TOKENS
    # All prompt tokens but those that were cached, and all output tokens but the three last ones, went through it.
    computed = seen("diptych_prompt_tokens_total") - 16 + 3 * (TOKENS - 1)
    assert seen("diptych_engine_batch_tokens_sum") == computed
    for stage, count in {"receive": 3, "queue": 3, "prefill": 3, "encode": 1, "generate": 3}.items():
        assert seen("diptych_stage_duration_seconds_count", stage=stage) == count, stage
    assert seen("diptych_kv_cache_blocks") > 0
    idle = ("diptych_kv_cache_used_blocks", "diptych_engine_requests", "diptych_media_memory_used_bytes")
    assert [seen(name) for name in idle] == [0, 0, 0]


def test_what_runs_is_seen_while_it_runs(served) -> None:
    """A step's tokens go out before the counts of its end: the gauges may follow the first token."""
    call = served.stub.Generate(prompt_request("words", [], max_tokens=1900))
    next(call)
    assert eventually_seen(served.executor.metrics_address, "diptych_engine_requests", {"running": 1}) == {"running": 1}
    assert Scraped(scrape(served.executor.metrics_address))("diptych_kv_cache_used_blocks") > 0
    assert Scraped(scrape(served.preprocess.metrics_address))("diptych_requests_pending") == 1
    call.cancel()


def test_both_services_count_the_prompts_of_all_answers(served) -> None:
    """Of one that the client leaves, too."""
    addresses = [served.preprocess.metrics_address, served.executor.metrics_address]
    before = [Scraped(scrape(address))("diptych_prompt_tokens_total") for address in addresses]
    request = prompt_request("words", [], max_tokens=1900)
    call = served.stub.Generate(request)
    next(call)
    call.cancel()
    three = prompt_request("words", [], max_tokens=2)
    three.n = 3
    usages = [response.final.usage for response in served.stub.Generate(three) if response.HasField("final")]
    served.check_idle()
    after = [Scraped(scrape(address))("diptych_prompt_tokens_total") for address in addresses]
    assert [now - then for now, then in zip(after, before, strict=True)] == [4 * usages[0].prompt_tokens] * 2


def test_who_waits_and_who_is_still_received_is_seen(checkpoint) -> None:
    """One request runs, one waits for its place in the batch, and one has not sent its picture."""
    with stack(checkpoint, executor={"metrics_port": 0, "max_num_seqs": 1}) as services:
        planner = Planner(services.executor.front.family, services.executor.front.booted.fingerprint.digest)
        with Peer(services.executor_channel) as peer:
            for handle in (1, 2):
                peer.start(handle, planner.plan("words", sizes=(), max_tokens=1900))
            peer.start(3, planner.plan())
            peer.wait_credit(3)
            expected = {"running": 1, "waiting": 1, "receiving": 1}
            assert eventually_seen(services.executor.metrics_address, "diptych_engine_requests", expected) == expected
            for handle in (1, 2, 3):
                peer.cancel(handle)
        services.check_idle()
        nobody = dict.fromkeys(expected, 0)
        assert eventually_seen(services.executor.metrics_address, "diptych_engine_requests", nobody) == nobody


def eventually_seen(address: str, name: str, expected: dict[str, int], seconds: float = 5) -> dict[str, float]:
    """A gauge's values by state: those expected, or the last ones seen in so many seconds."""
    until = time.monotonic() + seconds
    while True:
        scraped = Scraped(scrape(address))
        values = {state: scraped(name, state=state) for state in expected}
        if values == expected or time.monotonic() > until:
            return values
        time.sleep(0.01)


def test_promtool_reads_the_scrape_configuration() -> None:
    check_with_promtool("config", str(Path(__file__).parents[2] / "deploy" / "prometheus.yaml"))

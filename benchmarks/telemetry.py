"""What telemetry costs a request and a token, in microseconds on this machine: off, with metrics, with traces too.

Spans and measurements as both services make them for one request with one image, without anything around them.
The exporter sends to a port where nobody listens, so what it would send it keeps.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from benchmarks.results import make_parser, write_result
from diptych.service.telemetry import RequestSpan, Telemetry, TelemetryOptions, stage
from diptych.service.telemetry import metrics as catalogue
from diptych.service.telemetry.interceptor import _Call
from diptych.service.telemetry.propagation import to_headers
from preprocess_service.reports import PreprocessReports
from preprocess_service.requests import Delta, GenerateCall, Prompt

ROUNDS = 2000
SETTINGS = {
    "off": None,
    "metrics": TelemetryOptions("benchmark", metrics_port=0),
    "traces and metrics": TelemetryOptions("benchmark", otlp_endpoint="http://127.0.0.1:9", metrics_port=0),
    "traces at ratio 0, and metrics": TelemetryOptions("benchmark", "http://127.0.0.1:9", 0.0, metrics_port=0),
}


class NoContext:
    """What the interceptor asks of a call."""

    def invocation_metadata(self) -> tuple[()]:
        """Nobody called."""
        return ()


def preprocess_request(telemetry: Telemetry) -> dict[str, str]:
    """The spans of the preprocess service."""
    with _Call(telemetry, "/diptych.v1.PreprocessService/Generate", NoContext()):
        with stage("plan"):
            for name in ("fetch", "probe", "tokenize", "expand"):
                with stage(name):
                    pass
        with stage("execute", is_remote=True):
            headers = to_headers()
            for name in ("decode", "map"):
                with stage(name, item=0):
                    pass
    return headers


def executor_request(telemetry: Telemetry, headers: dict[str, str]) -> None:
    """The spans of the executor."""
    span = RequestSpan(telemetry, "execute", headers.get("traceparent", ""))
    now = time.monotonic()
    if telemetry.is_on:
        for name in ("receive", "queue", "generate"):
            span.add_stage(name, now, now)
        span.add_stage("encode", now, now, within=span.add_stage("prefill", now, now))
    with span.active():
        pass
    span.end(None)
    telemetry.count_request("Execute", "OK")


def microseconds(function: Callable[[], object], rounds: int) -> float:
    """The best of five runs: what others do on the machine is not our cost."""
    runs = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(rounds):
            function()
        runs.append((time.perf_counter() - began) / rounds * 1e6)
    return round(min(runs), 2)


def measure(options: TelemetryOptions | None, rounds: int) -> dict[str, float]:
    """One setting."""
    telemetry = Telemetry(options)
    nothing = SimpleNamespace(num_pending=0, ready=(), num_sent_bytes=0)
    report = PreprocessReports(telemetry, "model", nothing, nothing).answer(GenerateCall(Prompt("x"), "id"))  # type: ignore[arg-type]
    step = telemetry.histogram(catalogue.STEP_DURATION)
    piece = Delta(token_ids=[1])
    try:
        headers = preprocess_request(telemetry)
        return {
            "request, preprocess service": microseconds(lambda: preprocess_request(telemetry), rounds),
            "request, executor": microseconds(lambda: executor_request(telemetry, headers), rounds),
            "token, preprocess service": microseconds(lambda: report.note(piece), 20 * rounds),
            "engine step, executor (three of these)": microseconds(lambda: step.record(0.01), rounds),
        }
    finally:
        telemetry.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = make_parser("telemetry", __doc__).parse_args(argv)
    load_before, rounds = os.getloadavg()[0], 10 if options.quick else ROUNDS
    figures = {name: measure(setting, rounds) for name, setting in SETTINGS.items()}
    for name, rows in figures.items():
        print(name)
        for what, cost in rows.items():
            print(f"  {what:<40} {cost:>8} µs")
    write_result("telemetry", figures, options, load_before)
    return 0


if __name__ == "__main__":
    sys.exit(main())

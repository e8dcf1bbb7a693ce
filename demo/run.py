"""`make demo`: serve the demo model, show it pictures it has never seen, print what it answers.

Starts `diptych serve` (both services as processes of their own, on free loopback ports), talks to it through
the generated gRPC stub, and stops it again, also on Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from diptych.v1 import preprocess_pb2, preprocess_pb2_grpc, tensor_pb2

DEMO = Path(__file__).resolve().parent
QUESTION = "What digit is this?"


def main(argv: list[str] | None = None) -> int:
    """0 if every question was answered; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__)
    parser.add_argument("--pictures", type=int, default=20, help="how many held-out pictures to show (default 20)")
    parser.add_argument("--model", type=Path, default=DEMO / "model", help="checkpoint directory to serve")
    options = parser.parse_args(argv)
    # Ended by a terminal or a supervisor, the services must not outlive the demo either.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with serve(options.model) as address, grpc.insecure_channel(address) as channel:
            show(preprocess_pb2_grpc.PreprocessServiceStub(channel), options.pictures)
    except KeyboardInterrupt:
        print("\nstopped")
        return 130
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def serve(model: Path) -> Iterator[str]:
    """Both services; yields the public HOST:PORT and ends them afterwards."""
    print(f"starting both services with {model.name} …", flush=True)
    command = [sys.executable, "-m", "diptych.cli.main", "serve", "--model", str(model)]
    flags = ["--port", "0", "--executor-port", "0", "--limit-mm-per-prompt", "image=4", "--log-level", "warning"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise SystemExit(f"the services did not start (exit code {process.wait()})")
        yield line.removeprefix("listening on ").strip()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        print("both services have stopped")


def show(stub: preprocess_pb2_grpc.PreprocessServiceStub, count: int) -> None:
    """Ask about single pictures, then about two at once in one chat."""
    index = json.loads((DEMO / "held_out" / "index.json").read_text("utf-8"))["pictures"][:count]
    print(f"\n{QUESTION}\n{'picture':<24} {'answer':<10} truth")
    right, start = 0, time.monotonic()
    for entry in index:
        print(f"{entry['file']:<24} ", end="", flush=True)
        answer = stream_answer(stub, [entry["file"]], QUESTION)
        right += answer.strip().rstrip(".") == str(entry["digit"])
        print(f"{'':<{max(1, 10 - len(answer))}} {entry['digit']}")
    seconds = time.monotonic() - start
    print(f"{right} of {len(index)} right, {1000 * seconds / max(len(index), 1):.0f} ms per picture")
    if len(index) >= 2:
        first, second = index[0], index[1]
        print(f"\nWhich digits are these? ({first['file']}, {second['file']})\n", end="")
        stream_answer(stub, [first["file"], second["file"]], "Which digits are these?")
        print(f"   truth: {first['digit']} and {second['digit']}\n")


def stream_answer(stub: preprocess_pb2_grpc.PreprocessServiceStub, files: list[str], question: str) -> str:
    """Print the answer as it comes; returns it whole."""
    parts = [preprocess_pb2.ChatPart(media=picture(DEMO / "held_out" / file)) for file in files]
    parts.append(preprocess_pb2.ChatPart(text=question))
    request = preprocess_pb2.GenerateRequest(
        chat=preprocess_pb2.Chat(messages=[preprocess_pb2.ChatMessage(role="user", parts=parts)]),
        sampling=tensor_pb2.SamplingParams(temperature=0, max_tokens=16),
    )
    answer = ""
    for response in stub.Generate(request, timeout=60):
        print(response.text, end="", flush=True)
        answer += response.text
    return answer


def picture(path: Path) -> preprocess_pb2.Media:
    """A picture file as a media item."""
    return preprocess_pb2.Media(modality=tensor_pb2.MODALITY_IMAGE, data=path.read_bytes())


if __name__ == "__main__":
    sys.exit(main())

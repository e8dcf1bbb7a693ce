"""The served model against transformers' `generate` on the same pictures, prompts and lengths.

Served: real files through both services and the generated stub, at several concurrencies. Reference: one
request after the other, decoding and mapping the same files. Arms alternate; figures are medians.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.image_utils import load_image

from benchmarks.results import write_result
from demo.run import DEMO
from demo.show.services import serve
from diptych.v1 import preprocess_pb2, preprocess_pb2_grpc, tensor_pb2
from registry import MediaInfo
from registry.families import open_family

PROMPT = "USER: <image>\nWhat do you see? ASSISTANT:"
CONCURRENCIES = (1, 4, 16)


def main(argv: list[str] | None = None) -> int:
    """Print and write tokens per second and time to first token."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.served", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO / "model", help="checkpoint directory")
    parser.add_argument("--requests", type=int, default=32, help="requests per measurement (default 32)")
    parser.add_argument("--max-tokens", type=int, default=32, help="output tokens of each request (default 32)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats (default 3)")
    options = parser.parse_args(argv)
    files = [path.read_bytes() for path in sorted((DEMO / "held_out").glob("*.[pj][np]*g"))][: options.requests]
    reference = Reference(options.model)
    arms: dict[str, list[dict[str, float]]] = {}
    with serve(options.model) as address, grpc.insecure_channel(address) as channel:
        stub = preprocess_pb2_grpc.PreprocessServiceStub(channel)
        ask_all(stub, files[:4], options.max_tokens, 4)
        for _ in tqdm(range(options.repeats), desc="repeats", file=sys.stderr):
            arms.setdefault("transformers", []).append(reference.run(files, options.max_tokens))
            for concurrency in CONCURRENCIES:
                figures = ask_all(stub, files, options.max_tokens, concurrency)
                arms.setdefault(f"served, {concurrency} at once", []).append(figures)
    report(arms, options)
    return 0


def report(arms: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    """A table with ratios to the reference, and the JSON file."""
    medians = {
        arm: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for arm, runs in arms.items()
    }
    base = medians["transformers"]["tokens_per_second"]
    for arm, figures in medians.items():
        figures["ratio"] = figures["tokens_per_second"] / base
        print(f"{arm:<22} {figures['tokens_per_second']:8.1f} tokens/s  {figures['ratio']:5.2f}x", end="")
        print(f"  first token {1000 * figures['ttft']:7.1f} ms" if "ttft" in figures else "")
    path = write_result("served", {"workload": {k: str(v) for k, v in vars(options).items()}, "medians": medians})
    print(f"written to {path}")


def ask_all(
    stub: preprocess_pb2_grpc.PreprocessServiceStub, files: list[bytes], max_tokens: int, concurrency: int
) -> dict[str, float]:
    """Tokens per second over all requests, and the median time to the first token in seconds."""
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        first = list(pool.map(lambda file: ask(stub, file, max_tokens), files))
    seconds = time.perf_counter() - start
    return {"tokens_per_second": len(files) * max_tokens / seconds, "ttft": statistics.median(first)}


def ask(stub: preprocess_pb2_grpc.PreprocessServiceStub, file: bytes, max_tokens: int) -> float:
    """One request; its time to the first token in seconds."""
    media = preprocess_pb2.Media(modality=tensor_pb2.MODALITY_IMAGE, data=file)
    request = preprocess_pb2.GenerateRequest(
        prompt=preprocess_pb2.Prompt(text=PROMPT, media=[media]),
        sampling=tensor_pb2.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
    )
    start, first, count = time.perf_counter(), None, 0
    for response in stub.Generate(request, timeout=300):
        if response.token_ids and first is None:
            first = time.perf_counter() - start
        count += len(response.token_ids)
    assert count == max_tokens
    assert first is not None
    return first


class Reference:
    """transformers, one request at a time."""

    def __init__(self, model_dir: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
        self.processor = AutoImageProcessor.from_pretrained(model_dir, backend="pil")
        self.family = open_family(model_dir)

    def run(self, files: list[bytes], max_tokens: int) -> dict[str, float]:
        """Tokens per second."""
        start = time.perf_counter()
        for file in files:
            image = load_image(Image.open(io.BytesIO(file)))
            # As many placeholders as the picture has features: a matter of its size.
            count = self.family.layout(MediaInfo.image(image.height, image.width)).length
            ids = torch.tensor([self.tokenizer(PROMPT.replace("<image>", "<image>" * count))["input_ids"]])
            inputs = self.processor(images=[image], return_tensors="pt")
            with torch.inference_mode():
                self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **inputs,
                    max_new_tokens=max_tokens, min_new_tokens=max_tokens, do_sample=False,
                    pad_token_id=0, eos_token_id=None,
                )  # fmt: skip
        return {"tokens_per_second": len(files) * max_tokens / (time.perf_counter() - start)}


if __name__ == "__main__":
    sys.exit(main())

"""Paged prefill attention beside FlashAttention 3 and what torch itself brings, in TFLOP/s.

Counted are the products that attention needs, 4 x head size for every pair of a query and a key that it sees. In the
last cases the tokens of a picture see each other, which the libraries' causal kernels cannot do: SDPA gets a mask.
All arms of a case take turns, a bf16 product of 8192^3 random elements among them. FlashAttention 3 (vLLM's) reads the
same blocks as ours; torch's arms read keys and values that somebody has gathered before, and that is not counted.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.gpu.options import parse_for_gpu
from benchmarks.results import make_parser, spread, write_result
from executor_service.kernels import paged_prefill_attention as op

HEAD_DIM, BLOCK_SIZE, DTYPE = 128, 16, torch.bfloat16
SCALE = HEAD_DIM**-0.5
PASSES, PASS_SECONDS = 7, 0.01
HOST_CALLS = 200
SIDE = 8192


@dataclass(frozen=True)
class Case:
    """A batch of chunks that are all alike: `new` tokens, the first `span` of them a picture, behind `cached` ones."""

    name: str
    num_requests: int
    new: int
    cached: int
    heads: tuple[int, int]
    span: int = 0

    @property
    def length(self) -> int:
        """Tokens of one request."""
        return self.new + self.cached

    @property
    def operations(self) -> float:
        """Of both products."""
        pairs = self.new * self.cached + self.new * (self.new + 1) / 2 + self.span * (self.span - 1) / 2
        return 4.0 * HEAD_DIM * self.heads[0] * self.num_requests * pairs


CASES = (
    Case("3 prompts of 640", 3, 640, 0, (32, 32)),
    Case("12 prompts of 640", 12, 640, 0, (32, 32)),
    Case("2048 tokens", 1, 2048, 0, (32, 32)),
    Case("2048 tokens after 2048", 1, 2048, 2048, (32, 32)),
    Case("2048 tokens after 6144", 1, 2048, 6144, (32, 32)),
    Case("1 prompt of 2944, 32/8 heads", 1, 2944, 0, (32, 8)),
    Case("3 prompts of 2944, 32/8 heads", 3, 2944, 0, (32, 8)),
    Case("3 prompts of 640, pictures of 576", 3, 640, 0, (32, 32), span=576),
    Case("12 prompts of 640, pictures of 576", 12, 640, 0, (32, 32), span=576),
    Case("8 prompts of 320 after 640, pictures of 256", 8, 320, 640, (32, 8), span=256),
)


@dataclass(frozen=True)
class Inputs:
    """One set: the paged form, and keys and values gathered, [R, length, Hkv, D]."""

    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    tables: Tensor
    starts: Tensor
    lengths: Tensor
    ends: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor


def make_inputs(case: Case) -> Inputs:
    """Random elements, blocks in random order."""
    num_heads, num_kv_heads = case.heads
    each = -(-case.length // BLOCK_SIZE)
    tables = torch.randperm(each * case.num_requests, device="cuda").int().view(case.num_requests, each)
    k_cache, v_cache = (normal(tables.numel(), BLOCK_SIZE, num_kv_heads, HEAD_DIM) for _ in "kv")
    keys, values = (cache[tables.long()].flatten(1, 2)[:, : case.length].contiguous() for cache in (k_cache, v_cache))
    query = normal(case.num_requests * case.new, num_heads, HEAD_DIM)
    starts = torch.arange(case.num_requests + 1, device="cuda").int() * case.new
    lengths = torch.full((case.num_requests,), case.length, device="cuda").int()
    ends = visible_ends(case).repeat(case.num_requests)
    return Inputs(query, k_cache, v_cache, tables, starts, lengths, ends, keys, values, torch.empty_like(query))


def visible_ends(case: Case) -> Tensor:
    """How many tokens of its request each query of a chunk sees: int32 [new]."""
    ends = torch.arange(case.cached + 1, case.length + 1, device="cuda").int()
    ends[: case.span] = case.cached + case.span
    return ends


def normal(*shape: int) -> Tensor:
    """Random elements."""
    return torch.randn(shape, device="cuda", dtype=DTYPE)


Arm = Callable[[Inputs], Tensor]


def ours(case: Case, has_spans: bool, launch: Any = None) -> Arm:
    """The op; or one kernel of it. With spans also where there are none, to see what that costs."""
    cuda = op.PAGED_PREFILL_ATTENTION.direct("cuda")

    def call(x: Inputs) -> Tensor:
        tensors = (x.query, x.k_cache, x.v_cache, x.tables, x.starts, x.lengths)
        if launch is None:
            cuda(*tensors, case.new, SCALE, 0, 0.0, x.out, x.ends if has_spans else None)
        else:
            launch((*tensors, x.out), (case.num_requests, case.new), (SCALE, 0, 0.0, x.ends if has_spans else 0))
        return x.out

    return call


def flash_attention_3(case: Case) -> Arm:
    """VLLM's build, over the same blocks; its schedule is made beforehand, as vLLM does once for all layers."""
    from vllm.vllm_flash_attn.flash_attn_interface import (  # type: ignore[import-not-found]
        flash_attn_varlen_func,
        get_scheduler_metadata,
    )

    starts = torch.arange(case.num_requests + 1, device="cuda").int() * case.new
    lengths = torch.full((case.num_requests,), case.length, device="cuda").int()
    plan = get_scheduler_metadata(
        batch_size=case.num_requests, max_seqlen_q=case.new, max_seqlen_k=case.length, num_heads_q=case.heads[0],
        num_heads_kv=case.heads[1], headdim=HEAD_DIM, cache_seqlens=lengths, qkv_dtype=DTYPE, cu_seqlens_q=starts,
        page_size=BLOCK_SIZE, causal=True, num_splits=0,
    )  # fmt: skip
    return lambda x: flash_attn_varlen_func(
        x.query, x.k_cache, x.v_cache, max_seqlen_q=case.new, cu_seqlens_q=x.starts, max_seqlen_k=case.length,
        seqused_k=x.lengths, block_table=x.tables, softmax_scale=SCALE, causal=True, scheduler_metadata=plan,
        fa_version=3, out=x.out,
    )  # fmt: skip


def sdpa(case: Case, backend: SDPBackend) -> Arm:
    """Torch's scaled_dot_product_attention on gathered keys and values."""
    gqa = case.heads[0] != case.heads[1]
    mask: Any = causal_lower_right(case.new, case.length) if case.cached else None
    if case.span:
        mask = torch.arange(case.length, device="cuda") < visible_ends(case)[:, None]

    def call(x: Inputs) -> Tensor:
        query = x.query.view(case.num_requests, case.new, *x.query.shape[1:]).transpose(1, 2)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                query, x.keys.transpose(1, 2), x.values.transpose(1, 2), mask, is_causal=mask is None, scale=SCALE,
                enable_gqa=gqa,
            )  # fmt: skip
        return out.transpose(1, 2).flatten(0, 1)

    return call


def varlen(case: Case) -> Arm:
    """torch.nn.attention.varlen, with whichever way this version has to say "causal"."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": SCALE} if "scale" in known else {}
    options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if case.heads[0] != case.heads[1] and "enable_gqa" in known:
        options["enable_gqa"] = True
    ends = torch.arange(case.num_requests + 1, device="cuda").int() * case.length

    def call(x: Inputs) -> Tensor:
        keys, values = x.keys.flatten(0, 1), x.values.flatten(0, 1)
        result: Any = varlen_attn(x.query, keys, values, x.starts, ends, case.new, case.length, **options)
        return result

    return call


def arms(case: Case, only_ours: bool) -> dict[str, Callable[[], Arm]]:
    """Everything that may compute a case."""
    has_spans = case.span > 0
    table: dict[str, Callable[[], Arm]] = {
        "ours": lambda: ours(case, has_spans),
        "ours, mma.sync": lambda: ours(case, has_spans, op._mma(DTYPE, HEAD_DIM, has_spans)),
    }
    if not has_spans:
        table["ours, spans of one"] = lambda: ours(case, True)
    return table if only_ours else table | (masked_peers(case) if has_spans else causal_peers(case))


def masked_peers(case: Case) -> dict[str, Callable[[], Arm]]:
    """What takes a mask."""
    return {
        "torch SDPA efficient": lambda: sdpa(case, SDPBackend.EFFICIENT_ATTENTION),
        "torch SDPA cuDNN": lambda: sdpa(case, SDPBackend.CUDNN_ATTENTION),
    }


def causal_peers(case: Case) -> dict[str, Callable[[], Arm]]:
    """What is causal."""
    table: dict[str, Callable[[], Arm]] = {
        "torch SDPA flash": lambda: sdpa(case, SDPBackend.FLASH_ATTENTION),
        "torch SDPA cuDNN": lambda: sdpa(case, SDPBackend.CUDNN_ATTENTION),
        "torch varlen_attn": lambda: varlen(case),
    }
    if importlib.util.find_spec("vllm") is not None:
        table["FlashAttention 3"] = lambda: flash_attention_3(case)
    return table


def reference(case: Case, x: Inputs) -> Tensor:
    """The first request's first heads in float64, [new, 2, D]."""
    group = case.heads[0] // case.heads[1]
    query = x.query[: case.new, :2].transpose(0, 1).double()
    keys, values = (tensor[0, :, [0, 1 // group]].transpose(0, 1).double() for tensor in (x.keys, x.values))
    scores = query @ keys.transpose(1, 2) * SCALE
    scores.masked_fill_(torch.arange(case.length, device="cuda") >= visible_ends(case)[:, None], float("-inf"))
    return (scores.softmax(-1) @ values).transpose(0, 1)


Captured = tuple[torch.cuda.CUDAGraph, Sequence[Callable[[], object]]]
"""A graph and the calls in it, which keep alive what it reads."""


def captured(calls: Sequence[Callable[[], object]]) -> Captured:
    """A graph of all calls, each of which has run once before."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph, calls


def replay_seconds(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Of one replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def in_turns(graphs: dict[str, Captured]) -> dict[str, list[float]]:
    """Seconds of one call of each graph's calls, pass by pass."""
    repeats = {
        name: max(1, round(PASS_SECONDS / min(replay_seconds(graph, 1) for _ in range(2))))
        for name, (graph, _) in graphs.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(PASSES):
        for name, (graph, calls) in graphs.items():
            seconds[name].append(replay_seconds(graph, repeats[name]) / len(calls))
    return seconds


def num_sets(case: Case) -> int:
    """As many as fill the L2 cache four times over, at least two."""
    rows = 2 * case.num_requests * (case.new * case.heads[0] + case.length * case.heads[1])
    return max(2, -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // (rows * HEAD_DIM * DTYPE.itemsize)))


def host_seconds(arm: Arm, x: Inputs) -> float:
    """What one call takes of the host's time, as few of them as the queue of launches holds."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(HOST_CALLS):
        arm(x)
    taken = time.perf_counter() - began
    torch.cuda.synchronize()
    return taken / HOST_CALLS


def measure(case: Case, only_ours: bool) -> dict[str, Any]:
    """All arms of one case, their errors first."""
    a, b = normal(SIDE, SIDE), normal(SIDE, SIDE)
    inputs = [make_inputs(case) for _ in range(num_sets(case))]
    expected = reference(case, inputs[0])
    graphs = {"product": captured([lambda: a @ b] * 4)}
    figures: dict[str, Any] = {}
    for name, make in arms(case, only_ours).items():
        try:
            arm = make()
            out = arm(inputs[0])[: case.new, :2].double()
            graphs[name] = captured([partial(arm, one) for one in inputs])
        except (RuntimeError, TypeError, ImportError, AttributeError) as error:
            figures[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
            torch.cuda.synchronize()
            continue
        figures[name] = {
            "error": ((out - expected).norm() / expected.norm()).item(),
            "host_microseconds": 1e6 * host_seconds(arm, inputs[0]),
        }
    seconds = in_turns(graphs)
    product = 2 * SIDE**3 / statistics.median(seconds.pop("product"))
    figures["product_tflops"] = product / 1e12
    for name, values in seconds.items():
        rate = case.operations / statistics.median(values)
        figures[name] |= {
            "microseconds": spread([1e6 * value for value in values]), "tflops": rate / 1e12,
            "share_of_product": rate / product,
        }  # fmt: skip
    return figures


def show(case: Case, figures: dict[str, Any]) -> None:
    """A line per arm, and who is best."""
    print(f"{case.name} ({case.operations / 1e9:.1f} GFLOP), product {figures['product_tflops']:.0f} TFLOP/s")
    measured = {name: value for name, value in figures.items() if isinstance(value, dict) and "tflops" in value}
    for name, value in figures.items():
        if name in measured:
            print(
                f"  {name:<20} {value['microseconds']['median']:8.1f} µs  {value['tflops']:6.0f} TFLOP/s"
                f"  {value['share_of_product']:6.1%}  error {value['error']:.1e}"
                f"  host {value['host_microseconds']:5.1f} µs"
            )
        elif isinstance(value, dict):
            print(f"  {name:<20} failed: {value['failed']}")
    best = max(measured, key=lambda name: measured[name]["tflops"])
    others = [name for name in measured if not name.startswith("ours")]
    peer = max(others, key=lambda name: measured[name]["tflops"]) if others else None
    if peer and "ours" in measured:
        ratio = measured["ours"]["tflops"] / measured[peer]["tflops"]
        print(f"  best: {best}; ours is {ratio:.2f} x {peer}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Print and write microseconds, TFLOP/s, shares and errors."""
    parser = make_parser("gpu.prefill_attention", __doc__)
    parser.add_argument("--only-ours", action="store_true", help="our kernels alone, without their peers")
    options = parse_for_gpu(parser, argv)
    load_before = os.getloadavg()[0]
    torch.manual_seed(0)
    if importlib.util.find_spec("vllm") is None:
        print("FlashAttention 3 is missing: vLLM cannot be imported here, so its arm is left out")
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    print(figures["device"])
    for case in CASES[:2] if options.quick else CASES:
        figures[case.name] = measure(case, options.only_ours)
        show(case, figures[case.name])
        torch.cuda.empty_cache()
    write_result("gpu_prefill_attention", figures, options, load_before)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Decode attention over paged KV beside its peers: microseconds, GB/s of KV, and shares of the read rate.

All arms of a point read the same numbers and take turns. Paged peers are FlashInfer, with and without tensor cores,
and the FlashAttention 3 that vLLM brings, where they can be imported; cuDNN through torch reads contiguous KV. bf16,
heads of 128, blocks of 16 in random order; the calls of a graph read different copies: the L2 cache does not help.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from itertools import product
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.options import parse_for_gpu
from benchmarks.gpu.timing import measure_ceilings
from benchmarks.results import make_parser, write_result
from executor_service.kernels import paged_decode_attention as ours

BLOCK_SIZE, HEAD_DIM = 16, 128
CONTEXTS, BATCHES, HEADS = (700, 2048, 8192), (1, 16, 64, 256), ((32, 32), (32, 8))
ROTATED_BYTES = 512 << 20
MAX_COPIES = 64
REPEATS = 7
SECONDS_EACH = 0.006
PAGED_PEERS = ("flashinfer", "flashinfer tensor cores", "flash attention 3")
VARIANTS = {
    f"{v.num_warps} warps, {v.num_stages} stages, {v.blocks_each} blocks": v
    for v in (ours.Variant(4, 3, 2), ours.Variant(4, 2, 2))
}

Call: TypeAlias = Callable[[int], Tensor]


@dataclass
class Point:
    """Inputs of one size; `copies` of both caches."""

    num_heads: int
    num_kv_heads: int
    context: int
    batch: int
    query: Tensor = field(init=False)
    out: Tensor = field(init=False)
    k_cache: Tensor = field(init=False)
    v_cache: Tensor = field(init=False)
    block_tables: Tensor = field(init=False)
    seq_lens: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.copies = max(1, min(MAX_COPIES, -(-ROTATED_BYTES // self.kv_bytes)))
        self.blocks_each = -(-self.context // BLOCK_SIZE)
        num_blocks = self.blocks_each * self.batch
        shape = (self.copies, num_blocks, BLOCK_SIZE, self.num_kv_heads, HEAD_DIM)
        self.k_cache, self.v_cache = (torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_() for _ in "kv")
        self.query = torch.randn(self.batch, self.num_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.query)
        order = torch.randperm(num_blocks, device="cuda").to(torch.int32)
        self.block_tables = order.view(self.batch, self.blocks_each).contiguous()
        self.seq_lens = torch.full((self.batch,), self.context, dtype=torch.int32, device="cuda")

    @property
    def name(self) -> str:
        """As results call it."""
        return f"{self.num_heads}/{self.num_kv_heads} heads, {self.context} tokens, batch {self.batch}"

    @property
    def kv_bytes(self) -> int:
        """What one call reads of one copy."""
        return 2 * self.batch * self.context * self.num_kv_heads * HEAD_DIM * 2

    def contiguous(self, cache: Tensor, copy: int) -> Tensor:
        """The same storage as [B, Hkv, T, D]."""
        shape = (self.batch, self.num_kv_heads, self.blocks_each * BLOCK_SIZE, HEAD_DIM)
        return cache[copy].view(shape)[:, :, : self.context]

    @cached_property
    def rows(self) -> list[int]:
        """Requests whose results are checked."""
        return sorted({0, self.batch // 2, self.batch - 1})

    def expected(self, is_paged: bool) -> Tensor:
        """Of `rows` and the first copy, in float64."""
        return torch.stack([self._expected_row(row, is_paged) for row in self.rows])

    def _expected_row(self, row: int, is_paged: bool) -> Tensor:
        def read(cache: Tensor) -> Tensor:
            if not is_paged:
                return self.contiguous(cache, 0)[row]
            return cache[0][self.block_tables[row].long()].flatten(0, 1)[: self.context].transpose(0, 1)

        repeats = self.num_heads // self.num_kv_heads
        keys, values = (read(cache).double().repeat_interleave(repeats, 0) for cache in (self.k_cache, self.v_cache))
        scores = torch.einsum("hd,htd->ht", self.query[row].double(), keys) * HEAD_DIM**-0.5
        return torch.einsum("ht,htd->hd", scores.softmax(-1), values)


def main(argv: list[str] | None = None) -> int:
    """Print and write every point."""
    parser = make_parser("gpu.decode_attention", __doc__)
    parser.add_argument("--variants", action="store_true", help="also other builds of our kernel")
    options = parse_for_gpu(parser, argv)
    load_before = os.getloadavg()[0]
    read_rate = measure_ceilings().read
    print(f"{torch.cuda.get_device_name()}: read {read_rate / 1e9:.0f} GB/s; us, GB/s, relative error")
    points: dict[str, dict[str, dict[str, float]]] = {}
    for (num_heads, num_kv_heads), context in product(HEADS, CONTEXTS[:2] if options.quick else CONTEXTS):
        for batch in BATCHES[:2] if options.quick else BATCHES:
            point = Point(num_heads, num_kv_heads, context, batch)
            points[point.name] = figures = measure(point, options)
            cells = (f"{arm} {f['us']:.1f} {f['gb_s']:.0f} {f['error']:.0e}" for arm, f in figures.items())
            print(f"{point.name}: " + "; ".join(cells), flush=True)
            del point
            torch.cuda.empty_cache()
        summary = summarise(points, read_rate)
        figures_of_all = {
            "device": torch.cuda.get_device_name(), "read_bytes_per_second": read_rate, "points": points,
            "summary": summary,
        }  # fmt: skip
        write_result("gpu_decode_attention", figures_of_all, options, load_before)  # what there is, if it is cut short
    for line, value in summary.items():
        print(f"{line}: {value}")
    return 0


def measure(point: Point, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Every arm that can run, in turns."""
    arms: dict[str, tuple[Call, bool]] = {"ours": (our_call(point), True)}
    if options.variants:
        arms |= {name: (our_call(point, variant), True) for name, variant in VARIANTS.items()}
    for name, build, is_paged in (
        ("flashinfer", lambda p: flashinfer_call(p, False), True),
        ("flashinfer tensor cores", lambda p: flashinfer_call(p, True), True),
        ("flash attention 3", flash_attention_3_call, True),
        ("cudnn, contiguous", cudnn_call, False),
    ):
        try:
            call = build(point)
            call(0)
        except Exception as problem:  # a peer that does not run is named, and the rest goes on
            print(f"{point.name}: {name} does not run: {type(problem).__name__}: {problem}"[:300], flush=True)
        else:
            arms[name] = (call, is_paged)
    expected = {is_paged: point.expected(is_paged) for is_paged in (True, False)}
    graphs, figures = {}, {}
    for name, (call, is_paged) in arms.items():
        got = call(0)
        error = (got[point.rows].double() - expected[is_paged]).norm() / expected[is_paged].norm()
        figures[name] = {"error": error.item()}
        graphs[name] = captured(call, point.copies)
    for name, seconds in take_turns(graphs).items():
        each = seconds / point.copies
        figures[name] |= {"us": each * 1e6, "gb_s": point.kv_bytes / each / 1e9}
    return figures


def captured(call: Call, copies: int) -> torch.cuda.CUDAGraph:
    """A graph of one call per copy."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            call(copy)
    return graph


def take_turns(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Median seconds of a replay: `REPEATS` rounds over all graphs."""
    counts = {name: max(1, round(SECONDS_EACH / max(replay(graph, 1), 1e-6))) for name, graph in graphs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(REPEATS):
        for name, graph in graphs.items():
            seconds[name].append(replay(graph, counts[name]) / counts[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


def replay(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """Seconds of `count` replays."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def our_call(point: Point, variant: ours.Variant | None = None) -> Call:
    """Our op, or another build of its kernel."""

    def call(copy: int) -> Tensor:
        ours.launch(
            point.query, point.k_cache[copy], point.v_cache[copy], point.block_tables, point.seq_lens,
            HEAD_DIM**-0.5, 0, 0.0, point.out, variant,
        )  # fmt: skip
        return point.out

    return call


def flashinfer_call(point: Point, uses_tensor_cores: bool) -> Call:
    """FlashInfer's decode wrapper, planned outside the graph."""
    flashinfer = import_module("flashinfer")

    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=uses_tensor_cores)
    starts = torch.arange(point.batch + 1, dtype=torch.int32, device="cuda") * point.blocks_each
    in_last_block = torch.full_like(point.seq_lens, (point.context - 1) % BLOCK_SIZE + 1)
    wrapper.plan(
        starts, point.block_tables.flatten(), in_last_block, point.num_heads, point.num_kv_heads, HEAD_DIM, BLOCK_SIZE,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    run: Callable[..., Tensor] = wrapper.run
    return lambda copy: run(point.query, (point.k_cache[copy], point.v_cache[copy]))


def flash_attention_3_call(point: Point) -> Call:
    """As vLLM calls it for a batch of decodes, its schedule made outside the graph."""
    fa = import_module("vllm.vllm_flash_attn.flash_attn_interface")

    starts = torch.arange(point.batch + 1, dtype=torch.int32, device="cuda")
    schedule = fa.get_scheduler_metadata(
        batch_size=point.batch, max_seqlen_q=1, max_seqlen_k=point.context, num_heads_q=point.num_heads,
        num_heads_kv=point.num_kv_heads, headdim=HEAD_DIM, cache_seqlens=point.seq_lens, qkv_dtype=torch.bfloat16,
        cu_seqlens_q=starts, page_size=BLOCK_SIZE, causal=True, num_splits=0,
    )  # fmt: skip
    attend: Callable[..., Tensor] = fa.flash_attn_varlen_func
    return lambda copy: attend(
        point.query, point.k_cache[copy], point.v_cache[copy], max_seqlen_q=1, cu_seqlens_q=starts,
        max_seqlen_k=point.context, seqused_k=point.seq_lens, block_table=point.block_tables, causal=True,
        scheduler_metadata=schedule, num_splits=0, fa_version=3,
    )  # fmt: skip


def cudnn_call(point: Point) -> Call:
    """Torch's scaled dot product attention, cuDNN alone allowed."""
    query = point.query.unsqueeze(2)
    pairs = [(point.contiguous(point.k_cache, i), point.contiguous(point.v_cache, i)) for i in range(point.copies)]

    def call(copy: int) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            is_grouped = point.num_heads != point.num_kv_heads
            return F.scaled_dot_product_attention(query, *pairs[copy], enable_gqa=is_grouped).squeeze(2)

    return call


def summarise(points: dict[str, dict[str, dict[str, float]]], read_rate: float) -> dict[str, float | str]:
    """Ours against the best paged peer, cuDNN and the read rate: worst, and geometric mean."""
    summary: dict[str, float | str] = {}
    for title, peers in (("paged peers", PAGED_PEERS), ("cudnn", ("cudnn, contiguous",))):
        ratios = {
            name: min(arms[peer]["us"] for peer in peers if peer in arms) / arms["ours"]["us"]
            for name, arms in points.items()
            if any(peer in arms for peer in peers)
        }
        if ratios:
            worst = min(ratios, key=lambda name: ratios[name])
            summary[f"{title}: geometric mean of speed-ups"] = math.exp(
                statistics.fmean(map(math.log, ratios.values()))
            )
            summary[f"{title}: worst speed-up"] = ratios[worst]
            summary[f"{title}: worst at"] = worst
    long = {name: arms["ours"]["gb_s"] * 1e9 / read_rate for name, arms in points.items()
            if arms["ours"]["gb_s"] * arms["ours"]["us"] * 1e3 >= 2e9}  # fmt: skip
    if long:
        worst = min(long, key=lambda name: long[name])
        summary["share of the read rate from 2 GB on: worst"] = long[worst]
        summary["share of the read rate from 2 GB on: worst at"] = worst
    return summary


if __name__ == "__main__":
    sys.exit(main())

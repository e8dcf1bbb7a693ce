"""Every op launched on a few small, odd shapes, as compute-sanitizer watches it: `python -m THIS [OP ...]`.

Says `op NAME` before each. Inputs are made on the CPU and copied, so that hardly any kernels run but ours, and every
tensor is to have an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that an access beyond it is seen.
What results are worth is for the tests of each kernel; here they only have to be there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Final

import numpy as np
import torch
from torch import Tensor

from executor_service.engine.sampling_slots import SamplingSlots
from executor_service.kernels.embed_merge import embed_merge
from executor_service.kernels.image_patches import image_patches
from executor_service.kernels.layer_norm import add_layer_norm, layer_norm
from executor_service.kernels.normalize import normalize
from executor_service.kernels.paged_decode_attention import paged_decode_attention
from executor_service.kernels.paged_prefill_attention import paged_prefill_attention
from executor_service.kernels.quick_gelu import quick_gelu
from executor_service.kernels.rms_norm import add_rms_norm, rms_norm
from executor_service.kernels.rotary_write_kv import rotary_write_kv
from executor_service.kernels.sample import sample
from executor_service.kernels.silu_mul import silu_mul
from executor_service.kernels.small_linear import small_linear, small_linear_silu_mul
from executor_service.kernels.write_kv import write_kv
from tests.executor_service.gpu.sampling import random_request

DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
HALVES: Final = (torch.float16, torch.bfloat16)
RANDOM: Final = torch.Generator().manual_seed(0)
DEVICE: Final = torch.device("cuda")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random elements on the GPU."""
    return torch.randn(shape, generator=RANDOM).to(dtype).to(DEVICE)


def integers(least: int, end: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Random integers on the GPU."""
    return torch.randint(least, end, shape, generator=RANDOM).to(dtype).to(DEVICE)


def shuffled_slots(count: int, num_slots: int) -> Tensor:
    """Each at most once; the last token has none."""
    slots = torch.randperm(num_slots, generator=RANDOM)[:count]
    slots[-1] = -1
    return slots.to(DEVICE)


def tables(num_channels: int) -> Iterator[Tensor]:
    """One that is a straight line, and one that is none."""
    yield torch.linspace(-2, 2, 256).repeat(num_channels, 1).to(DEVICE)
    yield normal(num_channels, 256)


def launch_image_patches() -> Iterator[object]:
    """16-byte accesses, and any shape."""
    for dtype, (channels, height, width, patch, columns) in product(
        DTYPES, [(3, 28, 48, 14, 640), (3, 30, 45, 15, 675), (1, 5, 5, 5, 25)]
    ):
        for table in tables(channels):
            tiles = integers(0, 256, 3, channels, height, width, dtype=torch.uint8)
            yield image_patches(tiles, table, patch, columns, dtype)


def launch_embed_merge() -> Iterator[object]:
    """Every width of access, and more items than one launch takes."""
    for dtype, width, num_items in product(DTYPES, [64, 1002, 7], [3, 65]):
        places = torch.stack([torch.arange(70) % (num_items + 1) - 1, torch.arange(70) % 5], dim=1)
        features = [normal(5, width, dtype=dtype) for _ in range(num_items)]
        yield embed_merge(integers(0, 50, 70), normal(50, width, dtype=dtype), features, places.int().to(DEVICE))


def launch_norms() -> Iterator[object]:
    """One after the other of rms_norm, layer_norm and those behind a residual addition."""
    for dtype, width in product(DTYPES, [7, 264, 4096, 8192]):
        x, weight, bias = normal(3, width, dtype=dtype), normal(width, dtype=dtype), normal(width, dtype=dtype)
        yield rms_norm(x, weight, 1e-5)
        yield add_rms_norm(x, normal(3, width, dtype=dtype), weight, 1e-5)
        yield layer_norm(x, weight, bias, 1e-5)
        yield add_layer_norm(x, normal(3, width, dtype=dtype), weight, bias, 1e-5)


def launch_rotary_write_kv() -> Iterator[object]:
    """Heads that are whole accesses, and others."""
    for dtype, (heads, kv_heads, dim), tokens in product(DTYPES, [(4, 2, 128), (3, 1, 10)], [1, 37]):
        caches = [normal(5, 16, kv_heads, dim, dtype=dtype) for _ in "kv"]
        qkv, cos_sin = normal(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype), normal(50, dim, dtype=dtype)
        yield rotary_write_kv(qkv, integers(0, 50, tokens), cos_sin, *caches, shuffled_slots(tokens, 80))


def launch_write_kv() -> Iterator[object]:
    """From heads before tokens into a cache of another dtype too."""
    for dtype, cache_dtype, dim in product(DTYPES, HALVES, [5, 64]):
        key, value = (normal(3, 19, dim, dtype=dtype).transpose(0, 1) for _ in "kv")
        caches = [normal(8, 4, 3, dim, dtype=cache_dtype) for _ in "kv"]
        yield write_kv(key, value, *caches, shuffled_slots(19, 32))


def launch_activations() -> Iterator[object]:
    """silu_mul and quick_gelu."""
    for dtype, width in product(DTYPES, [5, 1000, 11008]):
        yield silu_mul(normal(3, 2 * width, dtype=dtype))
        yield quick_gelu(normal(3, width, dtype=dtype))
        yield quick_gelu(normal(3 * width + 1, dtype=dtype)[1:].view(3, width))


def launch_normalize() -> Iterator[object]:
    """Channels on every axis."""
    for dtype, axis in product(DTYPES, range(3)):
        shape = (3, 16, 29)
        for table in tables(shape[axis]):
            yield normalize(integers(0, 256, *shape, dtype=torch.uint8), table, axis, dtype)


def launch_small_linear() -> Iterator[object]:
    """The streaming kernel at every number of groups of rows, and the plain one; all epilogues."""
    for dtype, rows, (features, width) in product(
        DTYPES, [1, 9, 16, 19, 70], [(100, 384), (272, 136), (34, 2080), (6, 7)]
    ):
        x, weight = normal(rows, width, dtype=dtype), normal(features, width, dtype=dtype)
        torch.cuda.synchronize()  # a weight is not written by the kernel just before
        yield small_linear(x, weight)
        yield small_linear(x, weight, normal(features, dtype=dtype), normal(rows, features, dtype=dtype))
        yield small_linear_silu_mul(x, weight)


def paged(lengths: Sequence[int], kv_heads: int, dim: int, block_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Caches of shuffled blocks with NaN wherever no token is, block tables, and the lengths."""
    widths = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(widths) + 1, generator=RANDOM).to(torch.int32)
    block_tables = order[-1].repeat(len(lengths), max(widths) + 1)
    caches = [torch.full((len(order), block_size, kv_heads, dim), float("nan"), dtype=dtype) for _ in "kv"]
    for row, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        blocks = block_tables[row, :width] = order[sum(widths[:row]) :][:width]
        for cache in caches:
            rows = torch.full((width * block_size, kv_heads, dim), float("nan"), dtype=dtype)
            rows[:length] = torch.randn((length, kv_heads, dim), generator=RANDOM).to(dtype)
            cache[blocks.long()] = rows.view(width, block_size, kv_heads, dim)
    return (
        *(cache.to(DEVICE) for cache in caches),
        block_tables.to(DEVICE),
        torch.tensor(lengths, dtype=torch.int32).to(DEVICE),
    )


def launch_paged_decode_attention() -> Iterator[object]:
    """The streaming kernel, split contexts, windows and softcap; and the general one."""
    cases = [(4, 4, 128, 16), (6, 2, 64, 32), (32, 2, 128, 16), (4, 2, 80, 3)]
    for dtype, (heads, kv_heads, dim, block_size), (window, softcap) in product(DTYPES, cases, [(0, 0.0), (40, 3.0)]):
        lengths = [70, 0, 1, 200] if dtype == torch.float32 or dim == 80 else [700, 0, 1, 64, 2300]
        arguments = paged(lengths, kv_heads, dim, block_size, dtype)
        query = normal(len(lengths), heads, dim, dtype=dtype)
        out = torch.full(query.shape, float("nan"), dtype=dtype).to(DEVICE)
        yield paged_decode_attention(query, *arguments, 0.1, window, softcap, out), out


def launch_paged_prefill_attention() -> Iterator[object]:
    """Tensor cores on Hopper and before, and the general kernel; windows, softcap and bidirectional spans."""
    chunks = [(130, 0), (0, 29), (1, 63), (70, 129)]
    cases = [(4, 2, 128, 16), (2, 2, 64, 24), (3, 1, 40, 5)]
    for dtype, (heads, kv_heads, dim, block_size), (window, softcap), spans in product(
        DTYPES, cases, [(0, 0.0), (40, 3.0)], [False, True]
    ):
        *caches, seq_lens = paged([new + cached for new, cached in chunks], kv_heads, dim, block_size, dtype)
        starts = torch.tensor([0, *(new for new, _ in chunks)]).cumsum(0)
        query = normal(int(starts[-1]), heads, dim, dtype=dtype)
        ends = [torch.arange(cached + 1, cached + new + 1).clamp(20, max(cached + new, 20)) for new, cached in chunks]
        out = torch.full(query.shape, float("nan"), dtype=dtype).to(DEVICE)
        visible = torch.cat(ends).int().to(DEVICE) if spans else None
        arguments = (query, *caches, starts.int().to(DEVICE), seq_lens, 130, 0.1, window, softcap, out, visible)
        yield paged_prefill_attention(*arguments), out


def launch_sample() -> Iterator[object]:
    """Any mixture of parameters: rows in shared memory and in lent memory, equal logits, in any order."""
    rng = np.random.default_rng(0)
    for dtype, (num_rows, vocabulary), spread in [
        *product(DTYPES, [(7, 1003), (5, 4096)], [3.0, 0.0]),
        *product(HALVES, [(3, 60_001), (2, 270_001), (150, 50)], [3.0]),
    ]:  # fmt: skip
        requests = [random_request(number, vocabulary, rng) for number in range(num_rows)]
        slots = SamplingSlots(DEVICE, num_rows, vocabulary, frozenset({2}))
        chosen = torch.tensor(slots.prepare(requests))
        chosen[1] = -1
        numbers = torch.tensor([request.num_tokens for request in requests])
        logits = (torch.randn((num_rows, vocabulary), generator=RANDOM) * spread).to(dtype).to(DEVICE)
        for order in (None, torch.randperm(num_rows, generator=RANDOM).to(DEVICE)):
            yield sample(logits, chosen.to(DEVICE), numbers.to(DEVICE), slots.tables, order).token_ids


LAUNCHES: Final[dict[tuple[str, ...], Callable[[], Iterator[object]]]] = {
    ("image_patches",): launch_image_patches,
    ("embed_merge",): launch_embed_merge,
    ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"): launch_norms,
    ("rotary_write_kv",): launch_rotary_write_kv,
    ("write_kv",): launch_write_kv,
    ("silu_mul", "quick_gelu"): launch_activations,
    ("normalize",): launch_normalize,
    ("small_linear", "small_linear_silu_mul"): launch_small_linear,
    ("paged_decode_attention",): launch_paged_decode_attention,
    ("paged_prefill_attention",): launch_paged_prefill_attention,
    ("sample",): launch_sample,
}
"""By the ops that are launched."""


def tensors_of(result: object) -> Iterator[Tensor]:
    """Those in a result, whatever it is."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for part in result:
            yield from tensors_of(part)


def main(chosen: Sequence[str]) -> int:
    """Launch the chosen ops, or all; results are fetched, so that every one of their elements has been written.

    An op that fails does not keep the next ones from their turn.
    """
    code = 0
    for names, launches in LAUNCHES.items():
        if chosen and not set(chosen) & set(names):
            continue
        print(f"op {', '.join(names)}", flush=True)
        try:
            for result in launches():
                for tensor in tensors_of(result):
                    tensor.cpu()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"FAILED {type(error).__name__}: {error}", flush=True)
            code = 1
    print("op -", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

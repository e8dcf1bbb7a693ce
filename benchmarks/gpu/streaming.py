"""Streaming kernels against the floor: bytes read over the best read rate plus bytes written over the best write rate.

Both rates are measured in the same run with our own read and write kernels. Beside each kernel stands the same work
in torch's own operations. Inputs and outputs rotate so that none is found in the L2 cache, but for a single token,
whose sets of inputs are too many: as in a decode step, they are found there. The last part is a vision tower's first
product: how many columns the library likes, beside the convolution that it replaces.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from benchmarks.gpu.options import parse_for_gpu
from benchmarks.gpu.timing import Ceilings, measure_ceilings, rotating_copies, seconds_each
from benchmarks.results import make_parser, spread, write_result
from executor_service.kernels.embed_merge import EMBED_MERGE
from executor_service.kernels.image_patches import IMAGE_PATCHES
from executor_service.kernels.normalize import NORMALIZE
from executor_service.kernels.rms_norm import ADD_RMS_NORM
from executor_service.kernels.rotary_write_kv import ROTARY_WRITE_KV
from executor_service.kernels.silu_mul import SILU_MUL

WIDTH, INNER, HEADS, HEAD_DIM, BLOCK_SIZE = 4096, 11008, 32, 128, 16
VOCABULARY, POSITIONS, IMAGE_TOKENS = 32064, 4096, 576
SIDE, PATCH, TOWER_WIDTH = 336, 14, 1024
COLUMNS = 640
TOKENS, TILES = (1, 16, 256, 4096, 16384), (1, 8, 32, 128, 320)
PRODUCT_TILES, PRODUCT_COLUMNS = (1, 5, 32, 128), (588, 592, 608, 640)
DTYPE = torch.bfloat16
MAX_TORCH_SETS = 500
"""Torch needs several kernels for a call: fewer sets, to its advantage, keep its graphs small."""


MIN_CALLS = 48
"""Of a graph: with a few calls, what lies between two replays counts."""


@dataclass(frozen=True)
class Case:
    """One kernel at one size: its inputs, both ways to compute it, and the bytes that must move."""

    name: str
    size: str
    make: Callable[[], Sequence[Tensor]]
    ours: Callable[..., object]
    torchs: Callable[..., object]
    bytes_read: int
    bytes_written: int


def main(argv: list[str] | None = None) -> int:
    """Print and write microseconds, floors and ratios."""
    parser = make_parser("gpu.streaming", __doc__)
    parser.add_argument("--only", nargs="+", metavar="KERNEL", help="these kernels alone, and no product")
    options = parse_for_gpu(parser, argv)
    load_before = os.getloadavg()[0]
    ceilings = measure_ceilings()
    print(f"read {ceilings.read / 1e9:.0f} GB/s, write {ceilings.write / 1e9:.0f} GB/s")
    figures: dict[str, object] = {
        "device": torch.cuda.get_device_name(), "read_bytes_per_second": ceilings.read,
        "write_bytes_per_second": ceilings.write,
    }  # fmt: skip
    tokens, tiles = (TOKENS[:2], TILES[:1]) if options.quick else (TOKENS, TILES)
    for case in [
        *(case for count in tokens for case in token_cases(count)),
        *(c for n in tiles for c in tile_cases(n)),
    ]:
        if not options.only or case.name in options.only:
            figures[f"{case.name}, {case.size}"] = measure(case, ceilings)
    for count in () if options.only else PRODUCT_TILES[:1] if options.quick else PRODUCT_TILES:
        figures[f"first product, {count} tiles"] = measure_product(count)
    write_result("gpu_streaming", figures, options, load_before)
    return 0


def measure(case: Case, ceilings: Ceilings) -> dict[str, object]:
    """Both arms on the same inputs."""
    inputs = rotating_copies(case.make, case.bytes_read + case.bytes_written)
    ours = seconds_each(enough([partial(case.ours, *arguments) for arguments in inputs]))
    torchs = seconds_each(enough([partial(case.torchs, *arguments) for arguments in inputs[:MAX_TORCH_SETS]]))
    floor = ceilings.floor(case.bytes_read, case.bytes_written)
    median = statistics.median(ours)
    print(
        f"{case.name:<16} {case.size:>12}  {1e6 * median:8.2f} µs  {floor / median:6.1%} of the floor,"
        f" torch {1e6 * statistics.median(torchs):8.2f} µs",
        flush=True,
    )
    return {
        "microseconds": spread([1e6 * value for value in ours]),
        "torch_microseconds": spread([1e6 * value for value in torchs]),
        "floor_microseconds": 1e6 * floor,
        "floor_over_measured": floor / median,
    }


def token_cases(tokens: int) -> list[Case]:
    """LLaVA-1.5-7B's language model."""
    row, gate, head = 2 * tokens * WIDTH, 2 * tokens * INNER, 2 * tokens * HEADS * HEAD_DIM
    size = f"{tokens} tokens"
    return [
        Case("add_rms_norm", size, lambda: (normal(tokens, WIDTH), normal(tokens, WIDTH), normal(WIDTH)),
             lambda x, r, w: ADD_RMS_NORM.direct("cuda")(x, r, w, 1e-5), torch_add_rms_norm, 2 * row + 2 * WIDTH,
             2 * row),
        Case("silu_mul", size, lambda: (normal(tokens, 2 * INNER),), SILU_MUL.direct("cuda"), torch_silu_mul, 2 * gate,
             gate),
        Case("rotary_write_kv", size, lambda: rotary_inputs(tokens), ROTARY_WRITE_KV.direct("cuda"),
             torch_rotary_write_kv, 3 * head + 2 * min(tokens, POSITIONS) * HEAD_DIM + 16 * tokens, 3 * head),
        Case("embed_merge", size, lambda: embed_inputs(tokens),
             lambda i, t, p, _, *f: EMBED_MERGE.direct("cuda")(i, t, f, p), torch_embed_merge, row + 16 * tokens, row),
    ]  # fmt: skip


def enough(calls: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    """The calls, in turn, at least `MIN_CALLS`."""
    return list(islice(cycle(calls), max(len(calls), MIN_CALLS)))


def tile_cases(tiles: int) -> list[Case]:
    """CLIP-L/336."""
    pixels = tiles * 3 * SIDE * SIDE
    return [
        Case("image_patches", f"{tiles} tiles", lambda: tile_inputs(tiles),
             lambda x, t: IMAGE_PATCHES.direct("cuda")(x, t, PATCH, COLUMNS, DTYPE), torch_image_patches, pixels,
             2 * tiles * IMAGE_TOKENS * COLUMNS),
        Case("normalize", f"{tiles} tiles", lambda: tile_inputs(tiles),
             lambda x, t: NORMALIZE.direct("cuda")(x, t, 1, DTYPE), torch_normalize, pixels, 2 * pixels),
    ]  # fmt: skip


def measure_product(tiles: int) -> dict[str, object]:
    """Microseconds of a patch product with rows of so many columns, and of the convolution on normalised tiles."""
    pixels, weight = normal(tiles, 3, SIDE, SIDE), normal(TOWER_WIDTH, 3, PATCH, PATCH)
    arms: dict[str, Callable[[], object]] = {"convolution": lambda: F.conv2d(pixels, weight, stride=PATCH)}
    for columns in PRODUCT_COLUMNS:
        rows, matrix = normal(tiles * IMAGE_TOKENS, columns), normal(TOWER_WIDTH, columns)
        arms[f"{columns} columns"] = partial(F.linear, rows, matrix)
    figures = {name: 1e6 * statistics.median(seconds_each([call])) for name, call in arms.items()}
    print(f"first product {tiles:8d} tiles  " + ", ".join(f"{name} {value:.1f} µs" for name, value in figures.items()))
    return dict(figures)


def normal(*shape: int) -> Tensor:
    """Random elements."""
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def rotary_inputs(tokens: int) -> tuple[Tensor, ...]:
    """qkv, positions, cos and sin, both caches with room for all tokens, and shuffled slots."""
    caches = [normal(-(-tokens // BLOCK_SIZE), BLOCK_SIZE, HEADS, HEAD_DIM) for _ in "kv"]
    slots = torch.randperm(caches[0].shape[0] * BLOCK_SIZE, device="cuda")[:tokens]
    positions = torch.arange(tokens, device="cuda") % POSITIONS
    return normal(tokens, 3 * HEADS * HEAD_DIM), positions, tables("cos_sin", POSITIONS, HEAD_DIM), *caches, slots


def embed_inputs(tokens: int) -> tuple[Tensor, ...]:
    """Ids, table, places (nine in ten are features, if there are enough tokens), rows for torch's way, features."""
    table = tables("embedding", VOCABULARY, WIDTH)
    ids = torch.randint(VOCABULARY, (tokens,), device="cuda")
    places = torch.full((tokens, 2), -1, dtype=torch.int32)
    features = [normal(IMAGE_TOKENS, WIDTH) for _ in range(tokens // (IMAGE_TOKENS + 64))]
    for item in range(len(features)):
        begin = item * (IMAGE_TOKENS + 64) + 32
        places[begin : begin + IMAGE_TOKENS, 0] = item
        places[begin : begin + IMAGE_TOKENS, 1] = torch.arange(IMAGE_TOKENS)
    return ids, table, places.cuda(), (places[:, 0] >= 0).nonzero()[:, 0].cuda(), *features


def tile_inputs(tiles: int) -> tuple[Tensor, Tensor]:
    """Levels of random pixels, and a table."""
    levels = torch.randint(256, (tiles, 3, SIDE, SIDE), dtype=torch.uint8, device="cuda")
    return levels, torch.linspace(-2, 2, 256, device="cuda").repeat(3, 1)


_TABLES: dict[str, Tensor] = {}


def tables(name: str, *shape: int) -> Tensor:
    """One for all sets of inputs."""
    if name not in _TABLES:
        _TABLES[name] = normal(*shape)
    return _TABLES[name]


def torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """The same in torch's operations."""
    return F.rms_norm(residual.add_(x), (WIDTH,), weight, 1e-5)


def torch_silu_mul(gate_up: Tensor) -> Tensor:
    """The same in torch's operations."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def torch_rotary_write_kv(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> Tensor:
    """The same in torch's operations."""
    query, key, value = qkv.view(len(qkv), 3, HEADS, HEAD_DIM).unbind(1)
    cos, sin = (half.repeat(1, 2)[:, None] for half in cos_sin[positions].chunk(2, dim=-1))

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    k_cache.view(-1, HEADS, HEAD_DIM).index_copy_(0, slots, turned(key))
    v_cache.view(-1, HEADS, HEAD_DIM).index_copy_(0, slots, value)
    return turned(query)


def torch_embed_merge(ids: Tensor, table: Tensor, places: Tensor, rows: Tensor, *features: Tensor) -> Tensor:
    """The same in torch's operations."""
    out = F.embedding(ids, table)
    return out.index_copy_(0, rows, torch.cat(features)) if features else out


def torch_normalize(tiles: Tensor, table: Tensor) -> Tensor:
    """The same in torch's operations, with a factor and a summand per channel instead of the table."""
    return torch.addcmul(table[:, 0, None, None], tiles, table[:, 1, None, None]).to(DTYPE)


def torch_image_patches(tiles: Tensor, table: Tensor) -> Tensor:
    """The same in torch's operations: normalised, then unfolded by one copy."""
    side = SIDE // PATCH
    pixels = torch_normalize(tiles, table).view(-1, 3, side, PATCH, side, PATCH)
    return pixels.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * PATCH * PATCH)


if __name__ == "__main__":
    sys.exit(main())

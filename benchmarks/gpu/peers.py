"""Ours and vLLM's figures of one run on one machine, side by side, with the ratios that count.

Needs the peer bundle in `.peer` (see its install.sh). One after the other, never two on the GPU at a time: our engine
(unless `--ours` names the result of its benchmark in the same session), then vLLM, then the attention benchmarks with
FlashInfer and FlashAttention 3 on their path. `--geometries`, `--parts` pick some of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.load import BATCHES
from benchmarks.gpu.options import parse_for_gpu
from benchmarks.gpu.served import make_checkpoint
from benchmarks.gpu.session import ROOT, exit_when_told, run, sheets
from benchmarks.results import make_parser, write_result

GEOMETRIES: Final = ("llava-1.5-7b",)
PARTS: Final = ("ours", "vllm", "attention")
SITE, SITE_FLASHINFER, FALLBACK = Path("/tmp/site"), Path("/tmp/site_fi"), Path("/tmp/fallback")
OWN_VERSIONS: Final = ("pydantic", "pydantic_core", "annotated_types", "typing_inspection")
"""Packages that vLLM gets as the bundle has them, whatever else is installed."""
ATTENTION: Final = ("decode_attention", "prefill_attention")
RATIOS: Final = {"decode": 1.1, "tokens": 1.1, "prefill": 1.0, "first_token": 1.0, "blocks": 1.0}
"""What ours is to be of vLLM's, the larger the better."""


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for and write it all into one result, after every part."""
    options = parse(argv)
    exit_when_told()
    load_before = os.getloadavg()[0]
    figures: dict[str, Any] = {geometry: {} for geometry in options.geometries}
    if "ours" in options.parts:
        options.ours = run_ours(options)
    with sheets(options.output) as folder:
        figures["install"] = install() if set(options.parts) & {"vllm", "attention"} else {}
        for geometry in options.geometries:
            figures[geometry]["ours"] = read_ours(options.ours, geometry)
            if "vllm" in options.parts:
                figures[geometry]["vllm"] = run_vllm(geometry, folder, options)
            figures[geometry]["compared"] = compare(figures[geometry])
            write_result("gpu_peers", figures, options, load_before)
    for name in ATTENTION if "attention" in options.parts else ():
        figures[name] = run_attention(name, options)
        write_result("gpu_peers", figures, options, load_before)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags."""
    parser = make_parser("gpu.peers", __doc__)
    parser.add_argument("--geometries", type=lambda text: tuple(text.split(",")), default=GEOMETRIES)
    parser.add_argument("--parts", type=lambda text: tuple(text.split(",")), default=PARTS)
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--ours", type=Path, help="gpu_engine.json of this very session")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement of throughput (default 3)")
    parser.add_argument("--vllm-parts", help="of vLLM's figures, e.g. decode; all if not given")
    parser.add_argument("--vllm-weights", default="checkpoint", help="checkpoint, as ours, or dummy: see vllm_arm")
    parser.add_argument("--vllm-seconds", type=float, default=280, help="at most, per geometry (default 280)")
    parser.add_argument("--engine-seconds", type=float, default=240, help="at most, per geometry (default 240)")
    parser.add_argument("--attention-seconds", type=float, default=60, help="at most, each (default 60)")
    return parse_for_gpu(parser, argv)


def run_ours(options: argparse.Namespace) -> Path:
    """The engine's benchmark; where its result is."""
    command = [
        sys.executable, "-m", "benchmarks.gpu.engine", "--geometries", ",".join(options.geometries), "--batches",
        options.batches, "--parts", "first_token,decode,prefill,mixed", "--repeats", str(options.repeats),
        "--output", str(options.output),
    ]  # fmt: skip
    run(command, len(options.geometries) * (options.engine_seconds + 60))
    return Path(options.output) / "gpu_engine.json"


def read_ours(path: Path | None, geometry: str) -> dict[str, Any]:
    """The engine's figures of a geometry; empty if there are none."""
    if path is None or not path.is_file():
        return {}
    return dict(json.loads(path.read_text("utf-8"))["figures"].get(geometry, {}).get("main", {}))


def install() -> dict[str, Any]:
    """Unpack the bundle where it is not unpacked yet, with its own versions of what other packages bring too."""
    FALLBACK.mkdir(exist_ok=True)  # a bundle may have none, where its packages are installed already
    ended = {} if SITE.is_dir() else run(["bash", str(ROOT / ".peer" / "install.sh")], 120)
    for name in OWN_VERSIONS:
        for source in FALLBACK.glob(f"{name}*"):
            target = SITE / source.name
            if source.is_dir() and not target.exists():
                shutil.copytree(source, target)
    return ended


def run_vllm(geometry: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of benchmarks.gpu.vllm_arm, and the end of what it said if it failed."""
    make_checkpoint(geometry)
    sheet, log = folder / f"vllm-{geometry}.json", folder / f"vllm-{geometry}.log"
    command = [sys.executable, "-m", "benchmarks.gpu.vllm_arm", "--geometry", geometry, "--batches", options.batches,
               "--repeats", str(options.repeats), "--weights", options.vllm_weights, "--sheet", str(sheet)]  # fmt: skip
    if options.vllm_parts:
        command += ["--parts", options.vllm_parts]
    print(f"\n=== vLLM, {geometry}", flush=True)
    ended = run(command, options.vllm_seconds, _path(SITE) | _quiet(), log)
    lines = log.read_text("utf-8", errors="replace").splitlines()
    print("\n".join(line for line in lines if line.startswith(("vllm ", "["))), flush=True)
    figures = json.loads(sheet.read_text("utf-8")) if sheet.is_file() else {}
    if ended or any(isinstance(value, dict) and "error" in value for value in figures.values()):
        ended["log"] = [line[:300] for line in lines if "INFO" not in line][-60:]
        print("\n".join(ended["log"]), flush=True)
    return {**figures, **ended}


def run_attention(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Our attention benchmark with the peers' packages on its path; its own result file holds the table."""
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}", "--output", str(options.output)]
    print(f"\n=== {name}", flush=True)
    environment = {"PYTHONPATH": os.pathsep.join(map(str, (SITE, SITE_FLASHINFER)))}
    return {"result": f"gpu_{name}.json", **run(command, options.attention_seconds, environment)}


def _path(*folders: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), str(ROOT)])}


def _quiet() -> dict[str, str]:
    """Nothing is asked of any network, and vLLM samples as its own benchmark does."""
    return {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }  # fmt: skip


def compare(figures: dict[str, Any]) -> dict[str, Any]:
    """Measure by measure: ours, theirs, the ratio, and whether it is what it is to be."""
    ours, theirs = figures.get("ours", {}), figures.get("vllm", {})
    measures: list[tuple[str, str, tuple[str, ...]]] = [
        ("first token, ms", "first_token", ("first_token", "median_ms")),
        ("prefill, images/s", "prefill", ("prefill", "images_per_second")),
        ("KV blocks", "blocks", ("boot", "num_blocks")),
        ("mixed load, ms between tokens, p99", "first_token", ("mixed", "token_interval_ms", "p99")),
    ]
    for name in ours:
        if name.startswith("decode_"):
            measures.append((f"{name}, step ms", "decode", (name, "step_ms", "median")))
            measures.append((f"{name}, tokens/s", "tokens", (name, "tokens_per_second")))
    rows = {name: _row(kind, _at(ours, *path), _at(theirs, *path)) for name, kind, path in measures}
    for name, row in rows.items():
        if "ratio" in row:
            print(f"{name:<36} ours {row['ours']:10.2f}  vLLM {row['vllm']:10.2f}  {row['ratio']:5.2f}x", flush=True)
    return rows


def _row(kind: str, ours: float | None, theirs: float | None) -> dict[str, Any]:
    """Times: theirs / ours; rates: ours / theirs."""
    if not ours or not theirs:
        return {"ours": ours, "vllm": theirs}
    ratio = theirs / ours if kind in ("decode", "first_token") else ours / theirs
    return {"ours": ours, "vllm": theirs, "ratio": ratio, "target": RATIOS[kind], "met": ratio >= RATIOS[kind]}


def _at(figures: Any, *path: str) -> float | None:
    """A figure, or None where something on the way is missing."""
    for name in path:
        figures = figures.get(name) if isinstance(figures, dict) else None
    return float(figures) if isinstance(figures, int | float) else None


if __name__ == "__main__":
    sys.exit(main())

"""Says which GPU is there, or everything that is missing for one, and how to get it; exit 1 then."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def missing() -> list[str]:
    """What keeps this interpreter from using a GPU, with the remedy."""
    found = []
    if not Path("/dev/nvidiactl").exists():
        found.append("no NVIDIA driver on this machine (/dev/nvidiactl): install one, or pass the GPU to the container")
    import torch

    if torch.version.cuda is None:
        found.append(f"torch {torch.__version__} is a build without CUDA: TORCH_INDEX=URL of a CUDA build, make setup")
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        found.append("no cuda-bindings, which torch's CUDA build brings: pip install cuda-bindings")
    if not found and not torch.cuda.is_available():
        found.append(
            "torch sees no CUDA device: nvidia-smi says whether the driver does; is CUDA_VISIBLE_DEVICES empty?"
        )
    return found


def main() -> None:
    """Run the command line."""
    if found := missing():
        raise SystemExit("these tests need a GPU, and this is missing:\n- " + "\n- ".join(found))
    import torch

    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    print(f"{torch.cuda.get_device_name()}, compute capability {capability}, torch {torch.__version__}")


if __name__ == "__main__":
    main()

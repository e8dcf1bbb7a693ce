"""Which frames of a video count: decided from its header facts and the checkpoint's processor alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from registry.context import InputContext
from registry.errors import CheckpointError

DEFAULT_NUM_FRAMES: Final = 8
"""Frames of a video where the checkpoint's processor says nothing."""


@dataclass(frozen=True)
class FrameSampling:
    """`num_frames` frames, or `fps` frames per second, whichever is set; never more than the video has."""

    num_frames: int | None = None
    fps: float | None = None

    @classmethod
    def of(cls, ctx: InputContext) -> FrameSampling:
        """From `video_processor` of the processor's configuration, made once."""
        return ctx.remember(cls._read)

    @classmethod
    def _read(cls, ctx: InputContext) -> FrameSampling:
        config: Any = ctx.processor_config.get("video_processor")
        config = config if isinstance(config, Mapping) else {}
        num_frames, fps = config.get("num_frames"), config.get("fps")
        if num_frames is None and fps is None:
            return cls(num_frames=DEFAULT_NUM_FRAMES)
        for name, value in (("num_frames", num_frames), ("fps", fps)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
                raise CheckpointError(f"the video processor's {name} of {ctx.model_dir} is {value!r}; it must be > 0")
        return cls(int(num_frames)) if num_frames is not None else cls(fps=float(fps))

    def count(self, total_frames: int, seconds: float) -> int:
        """Frames to take of a video of `total_frames` frames that lasts `seconds`; at least 1."""
        wanted = self.num_frames if self.num_frames is not None else int(seconds * (self.fps or 0.0))
        return min(max(wanted, 1), total_frames)

    def indices(self, total_frames: int, seconds: float) -> tuple[int, ...]:
        """Which frames those are: spread evenly, the first one always among them."""
        count = self.count(total_frames, seconds)
        return tuple(index * total_frames // count for index in range(count))

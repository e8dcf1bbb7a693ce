"""Video bytes to the sampled frames: animated GIF and WebP through Pillow, MP4 through PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Final

from PIL import Image, ImageOps

from diptych.service.errors import InvalidInputError
from preprocess_service.media.decode_errors import check_picture_size, mismatch, undecodable
from preprocess_service.requests import FrameChoice, PlannedItem

_TURNS: Final = {
    90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_90,
}
"""Degrees clockwise -> Pillow's, which are counted the other way."""


def decode_video(item: PlannedItem, index: int) -> list[Image.Image]:
    """The frames that count, in mode RGB, each of the size the header promised."""
    assert item.data is not None
    assert item.frames is not None
    height, width = item.info.size
    read = _read_mp4 if item.file_format == "MP4" else _read_animation
    try:
        frames = list(read(item.data, item.file_format, item.frames, [width, height], index))
    except InvalidInputError:
        raise
    except Exception as error:  # decoders raise whatever their parser meets
        raise undecodable(index, f"{item.file_format} video", error) from error
    if len(frames) != len(item.frames.indices):
        last = item.frames.indices[-1]
        raise mismatch(index, f"the video ends before frame {last}, which its header promises")
    return frames


def _read_animation(
    data: bytes, file_format: str, chosen: FrameChoice, size: list[int], index: int
) -> Iterator[Image.Image]:
    with Image.open(BytesIO(data), formats=(file_format,)) as file:
        check_picture_size(sorted(file.size), sorted(size), index, "the video")
        for number in chosen.indices:
            file.seek(number)
            # As for a still picture: rotated, then RGB; a frame's transparent parts show what lies under them.
            frame = ImageOps.exif_transpose(file).convert("RGB")
            check_picture_size(list(frame.size), size, index, f"frame {number}")
            yield frame


def _read_mp4(data: bytes, _: str, chosen: FrameChoice, size: list[int], index: int) -> Iterator[Image.Image]:
    import av

    wanted = set(chosen.indices)
    with av.open(BytesIO(data), format="mp4", metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # items are decoded side by side already
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                picture = frame.to_image()
                turned = picture.transpose(_TURNS[chosen.rotation]) if chosen.rotation else picture
                check_picture_size(list(turned.size), size, index, f"frame {number}")
                yield turned
            if number >= chosen.indices[-1]:
                return

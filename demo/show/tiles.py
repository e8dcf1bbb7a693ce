"""What the model sees of a picture: the tiles that the served family's own input mapper makes of it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.image_utils import load_image

from registry import MediaInfo, MediaItem
from registry.family import ModelFamily
from registry.models.llava_next import AnyRes


@dataclass(frozen=True)
class Seen:
    """A picture file, the tiles made of it (as data URLs), and how its placeholder tokens come about.

    `whole` is the picture squeezed into one tile; `tiles` are those of its canvas, row by row, `columns` to a row.
    After the encoder the whole is worth `whole_tokens`, the canvas `feature_rows` rows of `feature_columns` and a
    newline.
    """

    name: str
    url: str
    width: int
    height: int
    whole: str
    tiles: list[str]
    columns: int
    whole_tokens: int
    feature_rows: int
    feature_columns: int

    @property
    def num_tokens(self) -> int:
        """The length of the picture's placeholder range."""
        return self.whole_tokens + self.feature_rows * (self.feature_columns + 1)


def look(family: ModelFamily, path: Path) -> Seen:
    """Map one picture file as the preprocess service does."""
    anyres = family.ctx.remember(AnyRes.read)
    picture = load_image(str(path))
    size = (picture.height, picture.width)
    pixels = family.map_item(MediaItem(MediaInfo.image(*size), picture))["pixel_values"]
    whole, *tiles = [_png(tile) for tile in pixels]
    feature_rows, feature_columns = anyres.unpadded(size)
    return Seen(
        name=path.name,
        url=_data_url(path.read_bytes(), _media_type(path)),
        width=picture.width,
        height=picture.height,
        whole=whole,
        tiles=tiles,
        columns=anyres.grid(size)[1],
        whole_tokens=anyres.patches**2,
        feature_rows=feature_rows,
        feature_columns=feature_columns,
    )


def _media_type(path: Path) -> str:
    with Image.open(path) as file:
        return file.get_format_mimetype() or "image/png"


def _png(tile: np.ndarray) -> str:
    """A uint8 tile [3, H, W] as a data URL."""
    file = io.BytesIO()
    Image.fromarray(tile.transpose(1, 2, 0)).save(file, "PNG", optimize=True)
    return _data_url(file.getvalue(), "image/png")


def _data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

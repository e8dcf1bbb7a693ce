"""BMP: size from the information header. BMP has no orientation."""

import struct

from preprocess_service.media.header_bytes import FilePrefix, HeaderError

_HEADER_SIZE = struct.Struct("<L")
_CORE = struct.Struct("<HHHH")
_INFO = struct.Struct("<LLHHL")
_CORE_SIZE = 12
_INFO_SIZES = (40, 52, 56, 64, 108, 124)
_BIT_DEPTHS = (1, 4, 8, 16, 24, 32)
_COMPRESSIONS = range(4)  # none, RLE8, RLE4, bit fields; not embedded JPEG and PNG
_BIT_FIELDS = 3


def probe_bmp(file: FilePrefix) -> tuple[int, int]:
    """Size in pixels."""
    (header_size,) = file.unpack(_HEADER_SIZE, 14)
    if header_size == _CORE_SIZE:
        width, height, _, depth = file.unpack(_CORE, 18)
        compression = 0
    elif header_size in _INFO_SIZES:
        width, height, _, depth, compression = file.unpack(_INFO, 18)
        # Rows from top to bottom are a negative height, which Pillow recognises by its top byte.
        height = (1 << 32) - height if height >> 24 == 0xFF else height
    else:
        raise HeaderError(f"unsupported BMP: header of {header_size} bytes")
    _check(depth, compression, width, height)
    file.require_in_file(14 + header_size + (12 if compression == _BIT_FIELDS and header_size == 40 else 0))
    return width, height


def _check(depth: int, compression: int, width: int, height: int) -> None:
    if depth not in _BIT_DEPTHS or compression not in _COMPRESSIONS:
        raise HeaderError(f"unsupported BMP: {depth} bits, compression {compression}")
    if max(width, height) >= 1 << 31:
        raise HeaderError("broken BMP: negative size")

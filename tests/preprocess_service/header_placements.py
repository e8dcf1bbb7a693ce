"""Every way in which an orientation gets into a file."""

from __future__ import annotations

from collections.abc import Callable

from tests.preprocess_service.header_files import (
    ACTL,
    COMMENT,
    ELEMENT_XMP,
    EXIF_WITHOUT,
    FCTL,
    NEXT_FCTL,
    PACKED_XMP,
    RAW_KEY,
    VP8L,
    XMP_KEY,
    actl,
    animation,
    app1_exif,
    app1_xmp,
    chunk,
    compressed_tiff,
    exif,
    extended_webp,
    international_chunk,
    jpeg,
    packed_text_chunk,
    picture,
    png,
    raw_profile,
    riff_chunk,
    saved,
    text_chunk,
)

# Every way in which an orientation gets into a file.
PLACEMENTS: dict[str, Callable[[int], bytes]] = {
    "jpeg": lambda o: jpeg(app1_exif(exif(o))),
    "jpeg big-endian": lambda o: jpeg(app1_exif(exif(o, ">"))),
    "jpeg after the frame header": lambda o: jpeg(before_scan=app1_exif(exif(o))),
    "jpeg exif in two segments": lambda o: jpeg(app1_exif(exif(o)[:20]) + app1_exif(exif(o)[20:])),
    "jpeg exif header twice": lambda o: jpeg(app1_exif(b"Exif\0\0" + exif(o))),
    "jpeg xmp": lambda o: jpeg(app1_xmp(PACKED_XMP % o)),
    "jpeg xmp element": lambda o: jpeg(app1_xmp(ELEMENT_XMP % o)),
    "jpeg last xmp wins": lambda o: jpeg(app1_xmp(PACKED_XMP % 6) + app1_xmp(PACKED_XMP % o)),
    "jpeg xmp beside exif without orientation": lambda o: jpeg(app1_exif(EXIF_WITHOUT) + app1_xmp(PACKED_XMP % o)),
    "jpeg exif before xmp": lambda o: jpeg(app1_xmp(PACKED_XMP % 6) + app1_exif(exif(o))),
    "jpeg fill and junk bytes": lambda o: jpeg(COMMENT + b"junk\xff\0\xff" + app1_exif(exif(o)) + b"\xff\xd0"),
    "jpeg unreadable exif hides xmp": lambda o: jpeg(app1_exif(b"nonsense") + app1_xmp(PACKED_XMP % o)),
    "jpeg empty exif": lambda o: jpeg(app1_exif(b"") + app1_xmp(PACKED_XMP % o)),
    "jpeg progressive": lambda o: saved(picture(), "JPEG", progressive=True, exif=b"Exif\0\0" + exif(o)),
    "jpeg cmyk": lambda o: saved(picture("CMYK"), "JPEG", exif=b"Exif\0\0" + exif(o)),
    "mpo": lambda o: animation("MPO", exif=b"Exif\0\0" + exif(o)),
    "png before": lambda o: png(before=chunk(b"eXIf", exif(o))),
    "png after": lambda o: png(after=chunk(b"eXIf", exif(o))),
    "png last exif wins": lambda o: png(before=chunk(b"eXIf", exif(o)) + chunk(b"eXIf", exif(9 - o))),
    "png with exif header": lambda o: png(before=chunk(b"eXIf", b"Exif\0\0" + exif(o))),
    "png raw profile": lambda o: png(before=text_chunk(RAW_KEY, raw_profile(exif(o)))),
    "png packed raw profile": lambda o: png(before=packed_text_chunk(RAW_KEY, raw_profile(exif(o)))),
    "png packed raw profile after": lambda o: png(after=packed_text_chunk(RAW_KEY, raw_profile(exif(o)))),
    "png international raw profile": lambda o: png(before=international_chunk(RAW_KEY, raw_profile(exif(o)))),
    "png exif before raw profile": lambda o: png(text_chunk(RAW_KEY, raw_profile(exif(6))), chunk(b"eXIf", exif(o))),
    "png exif as text": lambda o: png(before=text_chunk(b"exif", exif(o))),
    "png xmp": lambda o: png(before=international_chunk(XMP_KEY, PACKED_XMP % o)),
    "png xmp after": lambda o: png(after=international_chunk(XMP_KEY, ELEMENT_XMP % o)),
    "png packed xmp": lambda o: png(before=international_chunk(XMP_KEY, PACKED_XMP % o, packed=True)),
    "png xmp in plain text": lambda o: png(before=text_chunk(XMP_KEY, PACKED_XMP % o)),
    "png xmp not utf-8": lambda o: png(before=international_chunk(XMP_KEY, b"\xff" + PACKED_XMP % o)),
    "png xmp with bad language": lambda o: png(before=international_chunk(XMP_KEY, PACKED_XMP % o, language=b"\xff")),
    "png utf-8 xmp wins": lambda o: png(
        international_chunk(XMP_KEY, PACKED_XMP % o), international_chunk(XMP_KEY, b"\xff" + PACKED_XMP % 6)
    ),
    "png xmp beside exif without orientation": lambda o: png(
        chunk(b"eXIf", EXIF_WITHOUT), international_chunk(XMP_KEY, PACKED_XMP % o)
    ),
    "png damaged packed text": lambda o: png(chunk(b"zTXt", RAW_KEY + b"\0\0junk") + chunk(b"eXIf", exif(o))),
    "png behind a broken chunk": lambda o: png(after=chunk(b"a b ", b"") + chunk(b"eXIf", exif(o))),
    "png behind its end": lambda o: png() + chunk(b"eXIf", exif(o)),
    "apng": lambda o: animation("PNG", exif=b"Exif\0\0" + exif(o)),
    "apng exif behind the first frame": lambda o: png(ACTL + FCTL, NEXT_FCTL + chunk(b"eXIf", exif(o))),
    "apng exif behind the default image": lambda o: png(ACTL, FCTL + chunk(b"eXIf", exif(o))),
    "apng of one frame": lambda o: png(actl(1) + FCTL, NEXT_FCTL + chunk(b"eXIf", exif(o))),
    "apng of one frame, with a text that Pillow takes for its flag": lambda o: png(
        actl(1) + text_chunk(b"default_image", b"yes") + FCTL, NEXT_FCTL + chunk(b"eXIf", exif(o))
    ),
    "apng of no frames": lambda o: png(actl(0), FCTL + chunk(b"eXIf", exif(o))),
    "apng that says twice that it is one": lambda o: png(ACTL * 2, FCTL + chunk(b"eXIf", exif(o))),
    "png empty exif hides raw profile": lambda o: png(
        text_chunk(b"exif", b"") + text_chunk(RAW_KEY, raw_profile(exif(6))) + text_chunk(XMP_KEY, PACKED_XMP % o)
    ),
    "png raw profile in odd lines": lambda o: png(
        text_chunk(RAW_KEY, b"\nexif\n 38\n" + b"\n".join(bytes([c]) for c in exif(o).hex().encode()))
    ),
    "png exif behind a stray fcTL": lambda o: png(after=FCTL + chunk(b"eXIf", exif(o))),
    "webp": lambda o: saved(picture(), "WEBP", exif=exif(o)),
    "webp lossless": lambda o: saved(picture(), "WEBP", lossless=True, exif=exif(o)),
    "webp with exif header": lambda o: extended_webp(0x08, VP8L, riff_chunk(b"EXIF", b"Exif\0\0" + exif(o))),
    "webp xmp": lambda o: saved(picture(), "WEBP", xmp=PACKED_XMP % o),
    "webp exif and xmp": lambda o: saved(picture(), "WEBP", exif=exif(o), xmp=PACKED_XMP % 6),
    "webp xmp beside exif without": lambda o: saved(picture(), "WEBP", exif=EXIF_WITHOUT, xmp=PACKED_XMP % o),
    "webp exif not announced": lambda o: extended_webp(0, VP8L, riff_chunk(b"EXIF", exif(o))),
    "webp exif announced but absent": lambda o: extended_webp(0x0C, VP8L, riff_chunk(b"XMP ", PACKED_XMP % o)),
    "webp first exif wins": lambda o: extended_webp(
        0x08, VP8L, riff_chunk(b"EXIF", exif(o)), riff_chunk(b"EXIF", exif(9 - o))
    ),
    "webp exif before the pixels": lambda o: extended_webp(0x08, riff_chunk(b"EXIF", exif(o)), VP8L),
    "webp exif behind the container": lambda o: extended_webp(0x08, VP8L) + riff_chunk(b"EXIF", exif(o)),
    "webp animated": lambda o: animation("WEBP", exif=exif(o)),
    "gif xmp": lambda o: saved(picture("P"), "GIF").replace(
        b"\0,", b"\0!\xff\x0bXMP DataXMP" + PACKED_XMP % o + bytes(range(255, 0, -1)) + b"\0\0,", 1
    ),
    "tiff": lambda o: saved(picture(), "TIFF", tiffinfo={274: o}),
    "tiff compressed": compressed_tiff,
    "tiff xmp": lambda o: saved(picture(), "TIFF", tiffinfo={700: PACKED_XMP % o}),
    "tiff orientation hides xmp": lambda o: saved(picture(), "TIFF", tiffinfo={274: o, 700: PACKED_XMP % 6}),
    "tiff multi-page": lambda o: animation("TIFF", tiffinfo={274: o}),
    "bigtiff": lambda o: saved(picture(), "TIFF", tiffinfo={274: o}, big_tiff=True),
}

"""Headers of audio and video: what they say is what the decoders find, and nothing is decoded for it."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageSequence

from diptych.service.errors import InvalidInputError, LimitExceededError
from preprocess_service.media import decode_audio as audio_decoder
from preprocess_service.media import probe
from preprocess_service.media.decode_audio import decode_audio
from preprocess_service.media.decode_video import decode_video
from preprocess_service.media.header_audio import AudioHeader, probe_audio
from preprocess_service.media.header_bytes import HeaderError, TruncatedHeader
from preprocess_service.media.header_video import probe_video
from preprocess_service.requests import FrameChoice, PlannedItem
from registry import MediaInfo, PlaceholderRange


def sound(num_samples: int, rate: int, channels: int, **options: Any) -> bytes:
    samples = np.random.default_rng(num_samples).normal(0, 0.1, (num_samples, channels))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **options)
    return file.getvalue()


def frames(count: int, size: tuple[int, int] = (20, 30)) -> list[Image.Image]:
    noise = np.random.default_rng(count).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in noise]


def animation(count: int, file_format: str, **options: Any) -> bytes:
    first, *others = frames(count)
    file = io.BytesIO()
    first.save(file, file_format, save_all=True, append_images=others, **options)
    return file.getvalue()


def item(info: MediaInfo, file_format: str, data: bytes, choice: FrameChoice | None = None) -> PlannedItem:
    return PlannedItem(info, None, PlaceholderRange(0, 1), file_format, None, data, choice)


# --- audio ----------------------------------------------------------------------------------------

SUBTYPES = {
    "WAV": ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"],
    "WAVEX": ["PCM_16", "FLOAT"],
    "FLAC": ["PCM_S8", "PCM_16", "PCM_24"],
    "OGG": ["VORBIS", "OPUS"],
}
KINDS = [(file_format, subtype) for file_format, subtypes in SUBTYPES.items() for subtype in subtypes]


@pytest.mark.parametrize(("file_format", "subtype"), KINDS)
@pytest.mark.parametrize(("num_samples", "channels"), [(1, 1), (999, 1), (4321, 2), (700, 3)])
def test_audio_headers_equal_libsndfiles(file_format: str, subtype: str, num_samples: int, channels: int) -> None:
    data = sound(num_samples, 48000, channels, format=file_format, subtype=subtype)
    header, expected = probe_audio(data), soundfile.info(io.BytesIO(data))
    assert header.format == {"WAVEX": "WAV"}.get(file_format, file_format)
    assert (header.num_samples, header.sample_rate, header.num_channels) == (
        expected.frames, expected.samplerate, expected.channels,
    )  # fmt: skip
    num_resampled = header.num_samples_at(16000)
    decoded = decode_audio(item(MediaInfo.audio(num_resampled, 16000), header.format, data), 0)
    assert (decoded.dtype, decoded.shape) == (np.float32, (num_resampled,))


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("num_samples", [1, 7, 1000, 12345])
def test_length_after_resampling(rate: int, num_samples: int) -> None:
    data = sound(num_samples, rate, 1, format="WAV", subtype="FLOAT")
    expected = -(-num_samples * 16000 // rate)
    assert probe_audio(data).num_samples_at(16000) == expected
    decoded = decode_audio(item(MediaInfo.audio(expected, 16000), "WAV", data), 0)
    assert len(decoded) == expected
    if rate == 16000:
        np.testing.assert_array_equal(decoded, soundfile.read(io.BytesIO(data), dtype="float32")[0])


def test_channels_are_averaged_block_by_block(monkeypatch) -> None:
    monkeypatch.setattr(audio_decoder, "BLOCK_SAMPLES", 100)
    data = sound(1234, 16000, 2, format="WAV", subtype="FLOAT")
    decoded = decode_audio(item(MediaInfo.audio(1234, 16000), "WAV", data), 0)
    np.testing.assert_array_equal(decoded, soundfile.read(io.BytesIO(data), dtype="float32")[0].mean(axis=1))


def test_chunks_before_the_samples() -> None:
    data = sound(100, 16000, 1, format="WAV")
    odd = data[:12] + b"LIST\x05\0\0\0abcde\0" + data[12:]
    assert probe_audio(odd).num_samples == 100
    with pytest.raises(TruncatedHeader) as caught:
        probe_audio(odd[:40], len(odd))
    assert 40 < caught.value.bytes_needed <= len(odd)


@pytest.mark.parametrize("file_format", ["WAV", "FLAC"])
def test_every_prefix_settles_it_or_says_what_is_needed(file_format: str) -> None:
    data = sound(3000, 16000, 2, format=file_format)
    expected, num_settled = probe_audio(data), 0
    for num_bytes in range(1, 120):
        needed = num_bytes
        while needed < len(data):
            try:
                assert probe_audio(data[:needed], len(data)) == expected
                break
            except TruncatedHeader as error:
                more = error.bytes_needed
            assert needed < more <= len(data)
            needed = more
        num_settled += needed == num_bytes
    assert num_settled > 60


WAV = sound(100, 16000, 1, format="WAV")
FLAC = sound(100, 16000, 1, format="FLAC")


def changed(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


BROKEN_AUDIO = {
    "kind of samples": (changed(WAV, 20, b"\x11\0"), "samples of kind 17; supported: PCM, float, A-law, mu-law"),
    "no channels": (changed(WAV, 22, b"\0\0"), "0 channels in 2 bytes"),
    "many channels": (changed(WAV, 22, b"\x09\0"), "9 channels; at most 8 are supported"),
    "no rate": (changed(WAV, 24, bytes(4)), "no samples (100 at 0 Hz)"),
    "high rate": (changed(WAV, 24, struct.pack("<L", 192_001)), "192001 Hz; at most 192000 are supported"),
    "samples before the format": (WAV[:12] + WAV[36:], "samples without a format before them"),
    "no samples": (changed(WAV, 40, bytes(4)), "no samples (0 at 16000 Hz)"),
    "more samples than bytes": (changed(WAV, 40, b"\xff\xff\0\0"), "truncated"),
    "no samples in FLAC": (changed(FLAC, 21, b"\xf0\0\0\0\0"), "no samples"),
    "no STREAMINFO": (changed(FLAC, 4, b"\x04"), "no STREAMINFO block"),
    "OGG of nothing": (b"OggS" + bytes(100), "corrupt or truncated"),
    "an AVI": (b"RIFF\x10\0\0\0AVI LIST", "not supported audio: found a file starting with b'RIFF"),
    "a PDF": (b"%PDF-1.7 and so on", "found PDF"),
}


@pytest.mark.parametrize("kind", BROKEN_AUDIO)
def test_broken_audio(kind: str) -> None:
    data, message = BROKEN_AUDIO[kind]
    with pytest.raises(HeaderError) as caught:
        probe_audio(data)
    assert message in str(caught.value)


@pytest.mark.parametrize(("num_samples", "text"), [(99, "its header differs"), (101, "its header differs")])
def test_audio_that_decodes_to_another_length(num_samples: int, text: str) -> None:
    with pytest.raises(InvalidInputError, match=f"item 4: the audio has 100 samples at 16000 Hz, {text}") as caught:
        decode_audio(item(MediaInfo.audio(num_samples, 16000), "WAV", WAV), 4)
    assert (caught.value.stage, caught.value.item) == ("decode", 4)


def test_resampling_rounds_up() -> None:
    assert AudioHeader("WAV", 44101, 44100, 1).num_samples_at(16000) == 16001


# --- video ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 40])
@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("GIF", {}), ("GIF", {"optimize": True, "comment": b"x" * 700}), ("GIF", {"disposal": 2}),
        ("WEBP", {"lossless": True}), ("WEBP", {"quality": 30}),
    ],
    ids=str,
)  # fmt: skip
def test_animations_equal_pillows(file_format: str, options: dict[str, Any], count: int) -> None:
    durations = [20 + 10 * number for number in range(count)]
    data = animation(count, file_format, duration=durations if count > 1 else durations[0], **options)
    header = probe_video(data)
    with Image.open(io.BytesIO(data)) as file:
        expected = [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
    assert (header.format, header.height, header.width, header.num_frames) == (file_format, 20, 30, len(expected))
    if count > 1:
        assert header.seconds == pytest.approx(sum(durations) / 1000)
    choice = FrameChoice(tuple(range(0, count, 3)))
    info = MediaInfo.video(20, 30, len(choice.indices))
    found = decode_video(item(info, file_format, data, choice), 0)
    assert [frame.tobytes() for frame in found] == [expected[index].tobytes() for index in choice.indices]


def test_frames_without_a_delay_count_as_in_browsers() -> None:
    assert probe_video(animation(4, "GIF")).seconds == pytest.approx(0.4)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP"])
def test_an_animation_is_needed_whole(file_format: str) -> None:
    data = animation(3, file_format, duration=50)
    for num_bytes in (1, 20, len(data) - 1):
        with pytest.raises(TruncatedHeader) as caught:
            probe_video(data[:num_bytes], len(data))
        assert caught.value.bytes_needed > num_bytes


def box(name: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">L4s", 8 + len(body), name) + body


def mp4(
    *, handler: bytes = b"vide", count: int = 12, rate: int = 600, length: int = 1200, version: int = 0,
    matrix: tuple[int, ...] = (1, 0, 0, 1), size: tuple[int, int] = (48, 64), boxes: tuple[bytes, ...] = (),
) -> bytes:  # fmt: skip
    """The boxes that matter, and no frames."""
    a, b, c, d = (value << 16 for value in matrix)
    times = struct.pack(">QQ" if version else ">LL", 0, 0)
    head = box(
        b"tkhd", bytes([version, 0, 0, 3]), times, bytes(8), bytes(8 if version else 4), bytes(16),
        struct.pack(">9l", a, b, 0, c, d, 0, 0, 0, 1 << 30), struct.pack(">LL", 64 << 16, 48 << 16),
    )  # fmt: skip
    media_head = box(b"mdhd", bytes([version, 0, 0, 0]), times, struct.pack(">LQ" if version else ">LL", rate, length))
    entry = box(b"avc1", bytes(24), struct.pack(">HH", size[1], size[0]), bytes(50))
    table = box(
        b"stbl",
        box(b"stsd", bytes(4), struct.pack(">L", 1), entry),
        box(b"stsz", bytes(4), struct.pack(">LL", 0, count)),
    )
    media = box(b"mdia", media_head, box(b"hdlr", bytes(8), handler, bytes(12)), box(b"minf", table))
    sound_track = box(b"trak", box(b"mdia", box(b"hdlr", bytes(8), b"soun", bytes(12))))
    return box(b"ftyp", b"isom", bytes(4)) + b"".join(boxes) + box(b"moov", sound_track, box(b"trak", head, media))


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize(
    ("matrix", "rotation", "size"),
    [
        ((1, 0, 0, 1), 0, (48, 64)),
        ((0, 1, -1, 0), 90, (64, 48)),
        ((-1, 0, 0, -1), 180, (48, 64)),
        ((0, -1, 1, 0), 270, (64, 48)),
    ],
)
def test_mp4(version: int, matrix: tuple[int, ...], rotation: int, size: tuple[int, int]) -> None:
    header = probe_video(mp4(version=version, matrix=matrix))
    assert (header.height, header.width, header.rotation) == (*size, rotation)
    assert (header.num_frames, header.seconds) == (12, 2.0)


def test_mp4_with_large_boxes_before_the_movie() -> None:
    large = struct.pack(">L4sQ", 1, b"mdat", 16 + 300_000) + bytes(300_000)
    data = mp4(boxes=(box(b"free"), large))
    assert probe_video(data).num_frames == 12
    with pytest.raises(TruncatedHeader) as caught:
        probe_video(data[:1000], len(data))
    assert probe_video(data[: caught.value.bytes_needed], len(data)).num_frames == 12


BROKEN_VIDEO = {
    "no video track": (mp4(handler=b"soun"), "no video track"),
    "fragments": (mp4(count=0), "fragmented files are not supported"),
    "no duration": (mp4(length=0), "no frames in the sample table"),
    "no clock": (mp4(rate=0), "no frames in the sample table"),
    "mirrored": (mp4(matrix=(-1, 0, 0, 1)), "no rotation by quarter turns"),
    "no pixels": (mp4(size=(0, 64)), "no pixels (64x0)"),
    "no movie": (box(b"ftyp", b"isom", bytes(4)), "no 'moov' box"),
    "a box beyond the end": (mp4()[:-20], "truncated or corrupt"),
    "an AVIF": (box(b"ftyp", b"avif", bytes(4)), "found AVIF"),
    "no frames": (b"GIF89a" + bytes(7) + b";", "GIF without an image"),
    "a JPEG": (b"\xff\xd8\xff" + bytes(20), "not a supported video"),
}


@pytest.mark.parametrize("kind", BROKEN_VIDEO)
def test_broken_video(kind: str) -> None:
    data, message = BROKEN_VIDEO[kind]
    with pytest.raises(HeaderError) as caught:
        probe_video(data)
    assert message in str(caught.value)


def test_hostile_gifs_are_given_up() -> None:
    start = b"GIF89a" + struct.pack("<HHBBB", 5, 5, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 5, 5, 0) + b"\2"
    with pytest.raises(HeaderError, match="more than 524288 GIF blocks"):
        probe_video(start + b"\1a" * (1 << 20))


def test_frames_that_are_not_there() -> None:
    data = animation(3, "GIF", duration=50)
    for indices in ((0, 7), (5,)):
        with pytest.raises(InvalidInputError, match=r"item 2: the (GIF video cannot be decoded|video ends)"):
            decode_video(item(MediaInfo.video(20, 30, len(indices)), "GIF", data, FrameChoice(indices)), 2)


def test_frames_of_another_size() -> None:
    data = animation(3, "GIF", duration=50)
    with pytest.raises(InvalidInputError, match="item 2: the video decodes to 20x30 pixels, its header says 20x31"):
        decode_video(item(MediaInfo.video(20, 31, 1), "GIF", data, FrameChoice((0,))), 2)


def test_too_much_to_decode(ctx_of_nothing) -> None:
    data = mp4(count=1_000_000, size=(200, 200))
    with pytest.raises(LimitExceededError, match="all 1000000 frames of the video have 40000000000 pixels; at most"):
        probe.Prober(ctx_of_nothing).probe("video", data, 0)


@pytest.fixture
def ctx_of_nothing(tmp_path) -> Any:
    from registry import InputContext

    return InputContext(tmp_path, None, {}, None)

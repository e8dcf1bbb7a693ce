"""A family of pictures and videos from a plugin, through both services, against transformers."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from transformers import AutoImageProcessor, AutoTokenizer, VideoLlavaForConditionalGeneration

from diptych.client import Chat, Client, Media, RequestError
from diptych.v1 import preprocess_pb2, tensor_pb2
from registry import MediaInfo, MediaItem
from registry.fingerprint import fingerprint
from tests.executor_service.peer import Peer, Planner
from tests.integration.conftest import picture_bytes, prompt_request
from tests.integration.test_bad_input import failure
from tests.plugins.checkpoints import make_video_llava
from tests.services import Stack, stack

SETTINGS = {
    "plugin": "tests.plugins.video_llava", "limit_mm_per_prompt": {"image": 2, "video": 2}, "max_video_seconds": 30,
    "max_image_side": 512,
}  # fmt: skip
PATCHES, NUM_FRAMES = 16, 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_video_llava(tmp_path_factory.mktemp("video-llava"), NUM_FRAMES)


@pytest.fixture(scope="module")
def seen(checkpoint) -> Iterator[Stack]:
    with stack(checkpoint, executor={**SETTINGS, "max_num_batched_tokens": 64}, preprocess=SETTINGS) as services:
        yield services
        services.check_idle()


def pictures(seed: int, count: int, height: int, width: int) -> list[Image.Image]:
    """Smooth noise that moves: codecs keep it, and no two frames are alike."""
    rng = np.random.default_rng(seed)
    base = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), 3)
    pixels = np.asarray(base)
    return [Image.fromarray(np.roll(pixels, 7 * number, axis=1) // (1 + number % 3)) for number in range(count)]


def animation(
    seed: int, count: int = 7, size: tuple[int, int] = (40, 52), file_format: str = "GIF", **options
) -> bytes:
    frames, file = pictures(seed, count, *size), io.BytesIO()
    frames[0].save(file, file_format, save_all=True, append_images=frames[1:], duration=120, loop=0, **options)
    return file.getvalue()


def mp4(seed: int, count: int = 12, size: tuple[int, int] = (48, 64), rate: int = 6) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for picture in pictures(seed, count, *size):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode(None))
    return file.getvalue()


def turned(data: bytes) -> bytes:
    """The same MP4, to be shown a quarter turn clockwise, as phones write it."""
    start = data.index(b"tkhd") + 4 + 40
    return data[:start] + struct.pack(">9l", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30) + data[start + 36 :]


def frames_of(data: bytes, clockwise: int = 0) -> list[Image.Image]:
    """The sampled frames, decoded without our code."""
    if data[4:8] == b"ftyp":
        with av.open(io.BytesIO(data)) as container:
            arrays = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        found = [Image.fromarray(np.rot90(array, -clockwise // 90)) for array in arrays]
    else:
        with Image.open(io.BytesIO(data)) as file:
            found = [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
    count = min(NUM_FRAMES, len(found))
    return [found[index * len(found) // count] for index in range(count)]


class Reference:
    """transformers end to end, frame by frame through the image processor."""

    def __init__(self, checkpoint) -> None:
        self.model = VideoLlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float64).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        self.known: dict[str, list[int]] = {}

    def answer(self, case: str) -> list[int]:
        if case not in self.known:
            text, images, videos = CASES[case]
            self.known[case] = self.generate(text, images, [frames_of(data) for data in videos])
        return self.known[case]

    def pixels(self, images: list[Image.Image]) -> torch.Tensor:
        found = self.processor(images=images, return_tensors="np")["pixel_values"]
        return torch.from_numpy(np.stack(found)).double()

    def generate(self, text: str, images: list[bytes], videos: list[list[Image.Image]], max_tokens=10) -> list[int]:
        text = text.replace("<image>", "<image>" * PATCHES)
        for frames in videos:
            text = text.replace("<video>", "<video >" * (len(frames) * (PATCHES + 1)), 1)
        ids = torch.tensor([self.tokenizer(text.replace("<video >", "<video>"))["input_ids"]])
        kwargs = {}
        if images:
            kwargs["pixel_values"] = self.pixels([Image.open(io.BytesIO(data)).convert("RGB") for data in images])
        if videos:
            kwargs["pixel_values_videos"] = torch.stack([self.pixels(frames) for frames in videos])
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
                eos_token_id=None, pad_token_id=0, **kwargs,
            )  # fmt: skip
        return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def reference(checkpoint) -> Reference:
    return Reference(checkpoint)


def media(data: bytes, modality: int = tensor_pb2.MODALITY_VIDEO) -> preprocess_pb2.Media:
    return preprocess_pb2.Media(modality=modality, data=data)


def video_request(text: str, images: list[bytes], videos: list[bytes], **sampling) -> preprocess_pb2.GenerateRequest:
    """Items in the order of their placeholders."""
    request = prompt_request(text, [], **sampling)
    queues = {"<image>": iter(images), "<video>": iter(videos)}
    kinds = {"<image>": tensor_pb2.MODALITY_IMAGE, "<video>": tensor_pb2.MODALITY_VIDEO}
    names = [word for word in text.replace("<", " <").replace(">", "> ").split() if word in queues]
    request.prompt.media.extend(media(next(queues[name]), kinds[name]) for name in names)
    return request


def collect(services: Stack, request) -> list[int]:
    return [token for response in services.stub.Generate(request, timeout=120) for token in response.token_ids]


CASES = {
    "gif": ("What moves in <video> here?", [], [animation(1)]),
    "webp": ("<video>", [], [animation(2, file_format="WEBP", lossless=True)]),
    "mp4": ("see <video> now", [], [mp4(3)]),
    "fewer frames than asked for": ("<video> b", [], [animation(4, count=2)]),
    "one frame": ("<video> b", [], [animation(4, count=1, file_format="WEBP", lossless=True)]),
    "picture and video": ("<image> or <video> ?", [picture_bytes(5)], [mp4(6, 9, (96, 32))]),
    "two of each": (
        "<video><image> a <image> b <video>",
        [picture_bytes(7), picture_bytes(8, 30, 99)],
        [animation(9), animation(10, 4, (64, 64))],
    ),
    "a picture alone": ("<image> c", [picture_bytes(11)], []),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers(seen, reference, case: str) -> None:
    assert collect(seen, video_request(*CASES[case])) == reference.answer(case)


def test_all_at_once(seen, reference) -> None:
    with ThreadPoolExecutor(len(CASES)) as pool:
        answers = list(pool.map(lambda case: collect(seen, video_request(*case)), CASES.values()))
    assert answers == [reference.answer(case) for case in CASES]


def test_a_video_on_its_side(seen, reference) -> None:
    data = turned(mp4(12, 8, (32, 96)))
    expected = reference.generate("<video> up", [], [frames_of(data, clockwise=90)])
    assert collect(seen, video_request("<video> up", [], [data])) == expected
    assert expected != reference.generate("<video> up", [], [frames_of(data)])


def test_plan(seen) -> None:
    data = mp4(3)
    request = preprocess_pb2.PlanRequest(prompt=video_request("a <video>", [], [data]).prompt)
    (item,) = seen.stub.Plan(request).items
    assert (item.info.height, item.info.width, item.info.num_frames) == (48, 64, 3)
    assert item.info.frame_rate == pytest.approx(1.5)
    assert item.num_feature_tokens == item.placeholder.length == 3 * 17
    assert [(t.name, list(t.shape)) for t in item.tensors] == [("pixel_values_videos", [3, 3, 56, 56])]


@pytest.mark.parametrize("data", [animation(1), mp4(3), mp4(3, 100, rate=30)], ids=["gif", "mp4", "longer mp4"])
def test_a_prefix_says_how_much_is_needed(seen, data: bytes) -> None:
    """At most twice: for the rest of the file's outline, and for the whole of what describes its frames."""
    num_bytes = 20
    for _ in range(3):
        header = preprocess_pb2.MediaHeader(prefix=data[:num_bytes], total_bytes=len(data))
        item = preprocess_pb2.Media(modality=tensor_pb2.MODALITY_VIDEO, header=header)
        request = preprocess_pb2.PlanRequest(prompt=preprocess_pb2.Prompt(text="<video>", media=[item]))
        if num_bytes < len(data):
            status, _, facts = failure(lambda request=request: seen.stub.Plan(request))
            assert status == "INVALID_ARGUMENT"
            num_bytes = int(facts["bytes_needed"])
    assert num_bytes <= len(data)
    assert seen.stub.Plan(request).items[0].info.num_frames == 3


GIF, WEBP, MP4 = animation(1), animation(2, file_format="WEBP"), mp4(3)
BAD_FILES = {
    "no bytes": (b"", "probe", "0 bytes"),
    "no video": (b"hello, I am text" * 9, "probe", "supported formats: GIF, WEBP, MP4"),
    "a JPEG": (picture_bytes(1, file_format="JPEG"), "probe", "not a supported video"),
    "cut GIF": (GIF[: len(GIF) // 2], "probe", "truncated"),
    "cut WebP": (WEBP[: len(WEBP) // 2], "probe", "truncated"),
    "cut MP4": (MP4[: len(MP4) // 2], "probe", "truncated"),
    "MP4 without its frames": (MP4.replace(MP4[48:400], bytes(352)), "decode", "item 1"),
    "GIF with garbage": (GIF[:820] + b"\xff" * 60 + GIF[880:], "", "item 1"),
    "too long": (mp4(1, 40, rate=1), "probe", "at most 30 s are allowed (--max-video-seconds)"),
    "too large": (animation(1, 2, (16, 600)), "probe", "its longer side may have at most 512"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(seen, kind: str) -> None:
    data, stage, text = BAD_FILES[kind]
    request = video_request("<image><video>", [picture_bytes(2)], [data])
    status, message, facts = failure(lambda: list(seen.stub.Generate(request)))
    assert status == "INVALID_ARGUMENT", message
    assert facts["stage"] == (stage or facts["stage"]), message
    assert (text in message, facts["item"]) == (True, "1"), message


LIES = {
    "no frames": ({"num_frames": 0}, "item 0 lacks its num_frames"),
    "no rate": ({"frame_rate": 0.0}, "item 0 lacks its frame_rate"),
    "endless rate": ({"frame_rate": float("inf")}, "item 0 lacks its frame_rate"),
    "no number": ({"frame_rate": float("nan")}, "item 0 lacks its frame_rate"),
    "negative rate": ({"frame_rate": -1.0}, "item 0 lacks its frame_rate"),
    "no width": ({"width": 0}, "item 0 lacks its width"),
    "another number of frames": ({"num_frames": 3}, "claims 34 tokens; its size gives 51"),
    "too many frames": ({"num_frames": 33}, "at most 32 are allowed (--max-video-frames)"),
    "too slow": ({"frame_rate": 0.01}, "the video lasts 200 s; at most 30 s are allowed"),
    "too large": ({"height": 513}, "its longer side may have at most 512"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused(seen, lie: str) -> None:
    changes, text = LIES[lie]
    family = seen.executor.front.family
    item = MediaItem(MediaInfo.video(30, 40, 2), pictures(1, 2, 30, 40))
    planned = Planner(family, fingerprint(family).digest).plan_items("a <video>", [item])
    for name, value in changes.items():
        setattr(planned.start.items[0].info, name, value)
    with Peer(seen.executor_channel) as peer:
        peer.start(1, planned)
        answer = peer.finish(1)
    assert (answer.code.name, answer.facts["stage"], answer.facts["item"]) == ("INVALID_ARGUMENT", "attest", "0")
    assert text in answer.status.message


def test_the_wrong_order(seen) -> None:
    request = prompt_request("<video><image>", [])
    request.prompt.media.extend([media(picture_bytes(1), tensor_pb2.MODALITY_IMAGE), media(GIF)])
    status, message, _ = failure(lambda: list(seen.stub.Generate(request)))
    assert (status, message) == ("INVALID_ARGUMENT", "placeholder 0 of the prompt is for video, item 0 is image")


def test_without_the_extra(seen, monkeypatch) -> None:
    from preprocess_service.media import probe

    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    status, message, facts = failure(lambda: list(seen.stub.Generate(video_request("<video>", [], [MP4]))))
    assert (status, facts["extra"]) == ("UNIMPLEMENTED", "video")
    assert "pip install 'diptych[video]'" in message
    assert len(collect(seen, video_request("<video>", [], [GIF]))) == 10


def test_the_client(seen, tmp_path) -> None:
    """Files find their modality, and a chat its items."""
    (tmp_path / "clip.mp4").write_bytes(MP4)
    (tmp_path / "face.png").write_bytes(picture_bytes(5))
    clip, face = Media.file(tmp_path / "clip.mp4"), Media.file(tmp_path / "face.png")
    assert (clip.modality, face.modality) == ("video", "image")
    assert Media.file(tmp_path / "face.png", "video").modality == "video"
    with Client(seen.preprocess_address) as client:
        placeholders = client.list_models()[0].placeholders
        assert placeholders == {"image": "<image>", "video": "<video>"}
        chat = Chat.from_prompt("<image> or <video>?", [face, clip], placeholders)
        assert [part if isinstance(part, str) else part.modality for part in chat.messages[0].parts] == [
            "image", " or ", "video", "?",
        ]  # fmt: skip
    with pytest.raises(RequestError, match="placeholder 0 of the prompt is for image, item 0 is video"):
        Chat.from_prompt("<image> or <video>?", [clip, face], placeholders)

"""An audio family from a plugin, through both services, against transformers."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import soxr
import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, Qwen2AudioForConditionalGeneration

from diptych.v1 import preprocess_pb2, tensor_pb2
from registry import MediaInfo, MediaItem
from registry.fingerprint import fingerprint, fixed_sound
from tests.executor_service.peer import Peer, Planned, Planner
from tests.integration.conftest import prompt_request
from tests.integration.test_bad_input import failure
from tests.plugins.checkpoints import make_qwen2_audio
from tests.services import Stack, stack

PLUGIN = "tests.plugins.qwen2_audio"
LIMITS = {"limit_mm_per_prompt": {"audio": 3}, "max_audio_seconds": 2.0, "plugin": PLUGIN}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_qwen2_audio(tmp_path_factory.mktemp("qwen2-audio"))


@pytest.fixture(scope="module")
def heard(checkpoint) -> Iterator[Stack]:
    with stack(checkpoint, executor={**LIMITS, "max_num_batched_tokens": 40}, preprocess=LIMITS) as services:
        yield services
        services.check_idle()


class Reference:
    """transformers end to end."""

    def __init__(self, checkpoint) -> None:
        self.model = Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float64).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.extractor = AutoFeatureExtractor.from_pretrained(checkpoint)
        self.known: dict[str, list[int]] = {}

    def answer(self, case: str) -> list[int]:
        if case not in self.known:
            self.known[case] = self.generate(*CASES[case])
        return self.known[case]

    def features(self, files: list[bytes]):
        samples = [samples_of(data) for data in files]
        return self.extractor(samples, sampling_rate=16000, return_attention_mask=True, return_tensors="pt")

    def prompt_ids(self, text: str, lengths: list[int]) -> list[int]:
        for length in lengths:
            audio = "<|audio_bos|>" + "<|AUDIO |>" * length + "<|audio_eos|>"
            text = text.replace("<|AUDIO|>", audio, 1)
        return self.tokenizer(text.replace("<|AUDIO |>", "<|AUDIO|>"))["input_ids"]

    def generate(self, text: str, files: list[bytes], max_tokens: int = 10) -> list[int]:
        kwargs, lengths = {}, []
        if files:
            found = self.features(files)
            mask = found["attention_mask"]
            _, outputs = self.model.model.audio_tower._get_feat_extract_output_lengths(mask.sum(-1))
            lengths = outputs.tolist()
            kwargs = {"input_features": found["input_features"].double(), "feature_attention_mask": mask}
        ids = torch.tensor([self.prompt_ids(text, lengths)])
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
                eos_token_id=None, pad_token_id=0, **kwargs,
            )  # fmt: skip
        return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def reference(checkpoint) -> Reference:
    return Reference(checkpoint)


def samples_of(data: bytes) -> np.ndarray:
    """Decoded, mixed and resampled as librosa does it."""
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    mono = soxr.resample(samples.mean(axis=1), rate, 16000, quality="HQ")
    length = math.ceil(len(samples) * 16000 / rate)
    return np.pad(mono, (0, max(length - len(mono), 0)))[:length]


def sound(
    seed: int, seconds: float = 0.4, rate: int = 16000, channels: int = 1, file_format: str = "WAV", subtype: str = ""
) -> bytes:
    """A chord with noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate))[:, None] / rate
    chord = sum(np.sin(2 * np.pi * pitch * time) for pitch in rng.uniform(200, 3000, 3))
    samples = 0.2 * chord * rng.uniform(0.5, 1, channels) + rng.normal(0, 0.02, (len(time), channels))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=file_format, subtype=subtype or None)
    return file.getvalue()


def media(data: bytes) -> preprocess_pb2.Media:
    return preprocess_pb2.Media(modality=tensor_pb2.MODALITY_AUDIO, data=data)


def audio_request(text: str, files: list[bytes], **sampling) -> preprocess_pb2.GenerateRequest:
    request = prompt_request(text, [], **sampling)
    request.prompt.media.extend(media(data) for data in files)
    return request


def collect(services: Stack, request) -> tuple[list[int], preprocess_pb2.GenerateFinal]:
    responses = list(services.stub.Generate(request, timeout=120))
    return [token for response in responses for token in response.token_ids], responses[-1].final


CASES = {
    "wav": ("What is <|AUDIO|> this?", [sound(1)]),
    "flac": ("<|AUDIO|>", [sound(2, file_format="FLAC")]),
    "ogg": ("Hear <|AUDIO|> and say", [sound(3, file_format="OGG")]),
    "stereo at 44.1 kHz": ("a <|AUDIO|> b", [sound(4, rate=44100, channels=2)]),
    "8 kHz": ("a <|AUDIO|> b", [sound(5, rate=8000)]),
    "longer than the tower hears": ("a <|AUDIO|> b", [sound(6, seconds=1.5)]),
    "barely enough": ("a <|AUDIO|> b", [sound(7, seconds=0.07)]),
    "several": ("<|AUDIO|><|AUDIO|> or <|AUDIO|>?", [sound(8), sound(9, 0.9), sound(10, 0.1, 22050, 2)]),
    "none": ("Say something", []),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers(heard, reference, case: str) -> None:
    text, files = CASES[case]
    tokens, final = collect(heard, audio_request(text, files))
    assert tokens == reference.answer(case)
    planned = heard.stub.Plan(preprocess_pb2.PlanRequest(prompt=audio_request(text, files).prompt))
    assert final.usage.prompt_tokens == len(planned.prompt_token_ids)
    assert final.usage.image_tokens == sum(item.num_feature_tokens for item in planned.items)


def test_all_at_once(heard, reference) -> None:
    with ThreadPoolExecutor(len(CASES)) as pool:
        answers = list(pool.map(lambda case: collect(heard, audio_request(*case))[0], CASES.values()))
    assert answers == [reference.answer(case) for case in CASES]


def test_the_sound_matters(reference) -> None:
    """Otherwise the tests above would prove nothing."""
    answers = {tuple(reference.generate("a <|AUDIO|> b", [sound(seed)])) for seed in range(5)}
    assert len(answers) >= 4


def test_plan_needs_only_the_header(heard) -> None:
    data = sound(1, 0.5, 44100, 2)
    header = preprocess_pb2.MediaHeader(prefix=data[:64], total_bytes=len(data))
    item = preprocess_pb2.Media(modality=tensor_pb2.MODALITY_AUDIO, header=header)
    request = preprocess_pb2.PlanRequest(prompt=preprocess_pb2.Prompt(text="a <|AUDIO|>", media=[item]))
    (planned,) = heard.stub.Plan(request).items
    assert (planned.info.num_samples, planned.info.sample_rate) == (8000, 16000)
    assert planned.num_feature_tokens == 12
    assert planned.placeholder.length == 14
    assert [(t.name, list(t.shape)) for t in planned.tensors] == [("input_features", [16, 100])]


WAV, FLAC, OGG = sound(1), sound(1, file_format="FLAC"), sound(1, file_format="OGG")
BAD_FILES = {
    "no bytes": (b"", "probe", "0 bytes"),
    "no audio": (b"hello, I am text" * 9, "probe", "supported formats: WAV, FLAC, OGG"),
    "cut WAV": (WAV[: len(WAV) // 2], "probe", "truncated"),
    "cut in the header": (WAV[:30], "probe", "truncated"),
    "cut FLAC": (FLAC[: len(FLAC) // 2], "decode", "item 1"),
    "cut OGG": (OGG[: len(OGG) // 2], "probe", "corrupt or truncated"),
    "garbage in FLAC": (FLAC[:200] + bytes(len(FLAC) - 200), "decode", "item 1"),
    "too long": (sound(1, 2.1), "probe", "at most 32000 are allowed (2 s, --max-audio-seconds)"),
    "too short": (sound(1, 0.005), "plan", "too few for a single feature"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(heard, kind: str) -> None:
    data, stage, text = BAD_FILES[kind]
    request = audio_request("<|AUDIO|><|AUDIO|>", [sound(2), data])
    status, message, facts = failure(lambda: list(heard.stub.Generate(request)))
    assert (status, facts["stage"]) == ("INVALID_ARGUMENT", stage), message
    assert text in message
    assert facts["item"] == "1"


def test_too_many_items(heard) -> None:
    request = audio_request("<|AUDIO|>" * 4, [sound(1)] * 4)
    status, message, _ = failure(lambda: list(heard.stub.Generate(request)))
    assert (status, "4 audio items; at most 3" in message) == ("INVALID_ARGUMENT", True)


def test_a_picture_for_an_audio_family(heard) -> None:
    request = prompt_request("<|AUDIO|>", [b"whatever"])
    status, message, _ = failure(lambda: list(heard.stub.Generate(request)))
    assert (status, "does not support image items; it supports: audio" in message) == ("INVALID_ARGUMENT", True)


# --- peers that lie -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planner(heard) -> Planner:
    family = heard.executor.front.family
    return Planner(family, fingerprint(family).digest)


def plan_sound(planner: Planner, num_samples: int = 5000) -> Planned:
    samples = fixed_sound(num_samples, 16000)
    return planner.plan_items("a <|AUDIO|> b", [MediaItem(MediaInfo.audio(num_samples, 16000), samples)])


LIES = {
    "rate": ({"sample_rate": 8000}, "is sampled at 8000 Hz; the model takes 16000 Hz"),
    "no rate": ({"sample_rate": 0}, "item 0 lacks its sample_rate"),
    "no samples": ({"num_samples": 0}, "item 0 lacks its num_samples"),
    "too many samples": ({"num_samples": 32001}, "at most 32000 are allowed"),
    "overflowing samples": ({"num_samples": 2**64 - 1}, "at most 32000 are allowed"),
    "too short": ({"num_samples": 100}, "too few for a single feature"),
    "another length": ({"num_samples": 9000}, "claims 10 tokens; its size gives 16"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_and_disturbs_nobody(heard, planner, lie: str) -> None:
    changes, text = LIES[lie]
    good, bad = plan_sound(planner), plan_sound(planner)
    for name, value in changes.items():
        setattr(bad.start.items[0].info, name, value)
    with Peer(heard.executor_channel) as peer:
        peer.start(1, good)
        peer.wait_credit(1)
        peer.start(2, bad)
        answer = peer.finish(2)
        assert (answer.code.name, answer.facts["stage"], answer.facts["item"]) == ("INVALID_ARGUMENT", "attest", "0")
        assert text in answer.status.message
        peer.send_tensors(1, good)
        assert len(peer.finish(1).tokens) == 8


def test_a_false_length_with_the_same_layout_is_accepted(heard, planner) -> None:
    """The answer is the one for the declared length: the mask follows from it and never crosses the wire."""
    honest, false = plan_sound(planner), plan_sound(planner)
    false.start.items[0].info.num_samples += 1
    with Peer(heard.executor_channel) as peer:
        assert peer.run(1, false).tokens == peer.run(2, honest).tokens


def test_without_the_extra(heard, monkeypatch) -> None:
    from preprocess_service.media import probe

    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    status, message, facts = failure(lambda: list(heard.stub.Generate(audio_request("<|AUDIO|>", [sound(1)]))))
    assert (status, facts["extra"]) == ("UNIMPLEMENTED", "audio")
    assert "pip install 'diptych[audio]'" in message

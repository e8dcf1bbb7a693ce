"""`diptych check`: whole families pass; each broken one fails in its stage, with the hook, the size and both values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diptych.cli import check
from diptych.cli.main import main
from executor_service.checks import trial
from registry import DummyData, MediaInfo
from registry.checks.probes import noise_item
from registry.models import llava_next
from tests.checkpoints import make_llava_checkpoint, write_json
from tests.cli import broken
from tests.cli.command import diptych
from tests.plugins import checkpoints as plugin_checkpoints

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
STAGES = [
    "checkpoint", "hooks", "layout and mapper", "input processor", "transformers' processor", "maximum tokens",
    "dummy data", "executor model", "features", "forward", "fingerprint",
]  # fmt: skip
Report = dict[str, Any]


def make_checkpoint(path: Path, processor: str, **parameters: Any) -> Path:
    """A tiny checkpoint whose processor is told what those of real ones are told."""
    make_llava_checkpoint(path, **parameters)
    said = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    write_json(path / "processor_config.json", {"processor_class": processor, **said})
    return path


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("check") / "llava", "LlavaProcessor")


@pytest.fixture(scope="module")
def anyres(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check") / "llava-next"
    return make_checkpoint(path, "LlavaNextProcessor", pinpoints=PINPOINTS)


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry's stages alone, as where torch is not installed."""
    monkeypatch.setattr(check, "has_torch", lambda: False)


@pytest.fixture
def report_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., Report]:
    def run(model: Path, plugin: str = "") -> Report:
        code = main(["check", "--model", str(model), "--plugin", plugin, "--json"])
        report: Report = json.loads(capsys.readouterr().out)
        assert code == (0 if report["ok"] else 1)
        assert [stage["name"] for stage in report["stages"]] == STAGES
        assert all(("ok" in stage) != ("skipped" in stage) for stage in report["stages"])
        return report

    return run


def stage(report: Report, name: str) -> Report:
    return next(stage for stage in report["stages"] if stage["name"] == name)


def failed(report: Report) -> list[str]:
    return [stage["name"] for stage in report["stages"] if stage.get("ok") is False]


def only_failure(report: Report, name: str) -> tuple[str, str, str, str]:
    """(hook, item, expected, actual) of the first failure of the one stage that failed."""
    assert failed(report) == [name], report
    return first_failure(report, name)


def first_failure(report: Report, name: str) -> tuple[str, str, str, str]:
    failure = stage(report, name)["failures"][0]
    return failure["hook"], failure["item"], failure["expected"], failure["actual"]


class TestWholeFamilies:
    @pytest.mark.parametrize("which", ["fixed", "anyres"])
    def test_with_weights(self, which: str, request, report_of) -> None:
        report = report_of(request.getfixturevalue(which))
        assert failed(report) == []
        assert not any(stage.get("skipped") for stage in report["stages"])
        assert (
            "3 prompts alone and in chunks, against transformers in float64; the checkpoint's weights"
            in stage(report, "forward")["detail"]
        )
        assert report["fingerprint"] == stage(report, "fingerprint")["detail"]
        assert report["architecture"] == report["family"]

    @pytest.mark.parametrize("which", ["fixed", "anyres"])
    def test_without_weights(self, which: str, request, report_of, tmp_path: Path) -> None:
        bare = shutil.copytree(request.getfixturevalue(which), tmp_path / "bare")
        (bare / "model.safetensors").unlink()
        report = report_of(bare)
        assert failed(report) == []
        assert "against transformers in float64; tiny random weights" in stage(report, "forward")["detail"]

    def test_weights_that_do_not_fit(self, fixed: Path, report_of, monkeypatch) -> None:
        monkeypatch.setattr(trial, "available_bytes", lambda: 1 << 20)
        report = report_of(fixed)
        assert failed(report) == []
        detail = stage(report, "forward")["detail"]
        assert detail.endswith("tiny random weights (two copies of the weights need 2 MiB, 1 MiB are free)")

    def test_the_table(self, fixed: Path, anyres: Path, without_torch, capsys) -> None:
        assert main(["check", "--model", str(fixed)]) == 0
        output = capsys.readouterr()
        assert output.err == ""
        lines = [line.split() for line in output.out.splitlines()]
        assert ["forward", "skipped", "torch", "is", "not", "installed"] in lines
        assert lines[-1] == ["ok"]
        with broken.plugin(max_tokens=3) as name:
            assert main(["check", "--model", str(fixed), "--plugin", name]) == 1
        output = capsys.readouterr()
        # The table's lines are broken to the terminal's width.
        assert "maximum image tokens, image 1x1: expected at least 16, got 3" in " ".join(output.out.split())
        assert output.out.endswith("FAILED: maximum tokens\n")

    def test_a_family_that_transformers_does_not_know(self, fixed: Path, tmp_path: Path, report_of) -> None:
        own = renamed(fixed, tmp_path / "own")
        with broken.plugin(architecture="OwnForImage2Seq") as name:
            report = report_of(own, name)
        assert failed(report) == []
        assert "transformers does not know the architecture" in stage(report, "forward")["detail"]
        assert stage(report, "transformers' processor")["skipped"] is True

    @pytest.mark.parametrize("name", ["qwen2_audio", "video_llava", "patchwork"])
    def test_plugins_of_other_kinds(self, name: str, tmp_path: Path, report_of) -> None:
        """Audio; pictures and video; and a family in one file with a decoder of its own."""
        getattr(plugin_checkpoints, f"make_{name}")(tmp_path)
        report = report_of(tmp_path, f"tests.plugins.{name}")
        assert failed(report) == []
        expected = {
            "qwen2_audio": "2 prompts alone and in chunks, against transformers in float64 (audio with our features)",
            "video_llava": "5 prompts alone and in chunks, against transformers in float64 (video with our features)",
            "patchwork": "3 prompts alone and in chunks, transformers does not know the architecture",
        }
        assert stage(report, "forward")["detail"].startswith(expected[name])

    def test_a_family_without_a_layout(self, fixed: Path, report_of) -> None:
        """There is nothing to hold its hooks against; what can be called is called."""
        with broken.plugin(max_tokens=16, dummy=broken.one_picture, processor=broken.sixteen_each) as name:
            broken.hooks_of_plugin().layouts.clear()
            report = report_of(fixed, name)
        assert failed(report) == []
        skipped = [stage["name"] for stage in report["stages"] if stage.get("skipped")]
        assert skipped == ["input processor", "transformers' processor", "maximum tokens", "features", "forward"]
        assert stage(report, "dummy data")["detail"] == "80 tokens, image 1x1"

    def test_as_a_command(self, fixed: Path) -> None:
        done = diptych("check", "--model", fixed, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["ok"] is True


def renamed(checkpoint: Path, path: Path) -> Path:
    """The checkpoint under an architecture that is nobody's, without weights."""
    shutil.copytree(checkpoint, path)
    (path / "model.safetensors").unlink()
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**config, "architectures": ["OwnForImage2Seq"]})
    return path


@pytest.mark.usefixtures("without_torch")
class TestRegistration:
    def test_no_checkpoint(self, tmp_path: Path, report_of) -> None:
        report = report_of(tmp_path)
        hook, _, _, actual = only_failure(report, "checkpoint")
        assert (hook, actual) == (
            "checkpoint", f"CheckpointError: {tmp_path} is not a checkpoint directory: it has no config.json"
        )  # fmt: skip
        assert stage(report, "hooks")["detail"] == "because checkpoint failed"
        assert report["fingerprint"] is report["family"] is None

    def test_unknown_architecture(self, fixed: Path, tmp_path: Path, report_of) -> None:
        report = report_of(renamed(fixed, tmp_path / "own"))
        hook, _, _, actual = only_failure(report, "hooks")
        assert hook == "hooks"
        assert "no family is registered for architecture 'OwnForImage2Seq'" in actual
        assert report["architecture"] == "OwnForImage2Seq"
        assert all(stage.get("skipped") for stage in report["stages"][2:])

    def test_a_missing_hook(self, fixed: Path, report_of) -> None:
        with broken.plugin() as name:
            broken.hooks_of_plugin().layouts.clear()
            report = report_of(fixed, name)
        assert "must register the maximum tokens by hand" in only_failure(report, "hooks")[3]

    def test_own_and_default_hooks_and_what_overrides_what(self, fixed: Path, report_of) -> None:
        with broken.plugin(max_tokens=16) as name:
            detail = stage(report_of(fixed, name), "hooks")["detail"]
        assert detail.startswith("image: own layout, own mapper, own maximum; default dummy data; default input")
        assert "LlavaForConditionalGeneration is registered more than once; the plugin a_broken_plugin counts" in detail

    def test_a_hook_that_raises(self, fixed: Path, report_of) -> None:
        with broken.plugin(layout=broken.wide_ones_fail) as name:
            report = report_of(fixed, name)
        expected = ("image layout", "image 1x13", "no exception", "ZeroDivisionError: so wide")
        assert first_failure(report, "layout and mapper") == expected
        assert "failures, the first 5 of them here" in stage(report, "layout and mapper")["detail"]

    def test_tokens_that_the_embedding_does_not_have(self, fixed: Path, report_of) -> None:
        with broken.plugin(layout=broken.breaks_of_no_vocabulary) as name:
            failure = first_failure(report_of(fixed, name), "layout and mapper")
        assert failure[:2] == ("image layout", "image 1009x1")
        assert failure[3].endswith("has token id 100000; an int of at least 0 and below 328 is expected")

    @pytest.mark.parametrize(
        ("mapper", "actual"),
        [
            (broken.without_rows, "pixel_values uint8 [3, 55, 56]"),
            (broken.as_floats, "pixel_values float32 [3, 56, 56]"),
            (lambda ctx, item: {}, "no pixel_values"),
        ],
        ids=["shape", "dtype", "missing"],
    )
    def test_a_mapper_of_other_tensors(self, fixed: Path, report_of, mapper, actual: str) -> None:
        with broken.plugin(mapper=mapper) as name:
            report = report_of(fixed, name)
        expected = ("image input mapper", "image 1x1", "pixel_values uint8 [3, 56, 56]", actual)
        assert first_failure(report, "layout and mapper") == expected
        assert stage(report, "fingerprint")["detail"] == "because layout and mapper failed"

    def test_constants_that_differ(self, anyres: Path, report_of) -> None:
        with broken.plugin(llava_next, mapper=broken.sizes_swapped) as name:
            failures = stage(report_of(anyres, name), "layout and mapper")["failures"]
        for failure in failures:
            height, width = map(int, failure["item"].removeprefix("image ").split("x"))
            assert failure["hook"] == "image input mapper"
            assert failure["expected"] == f"image_sizes [{height}, {width}]"
            assert failure["actual"] == f"image_sizes [{width}, {height}]"

    @pytest.mark.parametrize(
        ("maximum", "expected"), [(15, "at least 16"), (17, "16, which no item exceeds")], ids=["low", "high"]
    )
    def test_a_maximum_that_is_not_the_maximum(self, fixed: Path, report_of, maximum: int, expected: str) -> None:
        with broken.plugin(max_tokens=maximum) as name:
            report = report_of(fixed, name)
        failure = only_failure(report, "maximum tokens")
        assert failure == ("maximum image tokens", "image 1x1", expected, str(maximum))

    def test_a_maximum_without_end(self, fixed: Path, report_of) -> None:
        """Dummy data is not asked for so many tokens."""
        with broken.plugin(max_tokens=10**15) as name:
            report = report_of(fixed, name)
        actual = only_failure(report, "maximum tokens")[3]
        assert actual.endswith("is 1000000000000000; it must be an int from 1 to 16777216")
        assert stage(report, "dummy data")["detail"] == "because maximum tokens failed"

    def test_a_picture_without_end(self, fixed: Path, report_of) -> None:
        """The fingerprint, the dummy data and the model are not asked to make its tokens."""
        with broken.plugin(layout=broken.large_ones_are_endless) as name:
            report = report_of(fixed, name)
        hook, item, _, actual = first_failure(report, "layout and mapper")
        assert (hook, item) == ("image layout", "image 4093x1")
        assert actual.endswith("has 1000000000000 tokens; at most 16777216 are allowed")

    def test_dummy_data_that_is_short(self, fixed: Path, report_of) -> None:
        items = [noise_item(MediaInfo.image(1, 1))]
        with broken.plugin(dummy=lambda ctx, seq_len, counts: DummyData([3, 5], items)) as name:
            hook, item, _, actual = only_failure(report_of(fixed, name), "dummy data")
        assert (hook, item) == ("dummy data", "asked for 80 tokens and 1 image")
        assert actual == "InvalidHookError: Broken: dummy data has 17 tokens; at least 80 were asked for"

    def test_dummy_data_without_the_largest_item(self, anyres: Path, report_of) -> None:
        items = [noise_item(MediaInfo.image(1, 1000))]
        with broken.plugin(
            llava_next, dummy=lambda ctx, seq_len, counts: DummyData([3, *[5] * seq_len], items)
        ) as name:
            failure = only_failure(report_of(anyres, name), "dummy data")
        assert failure[:2] == ("dummy data", "image 1x1000")
        assert failure[2:] == ("an item of 88 features (image 57x57)", "at most 16")

    def test_an_input_processor_of_its_own_mind(self, fixed: Path, report_of) -> None:
        with broken.plugin(processor=lambda ctx, inputs: inputs) as name:
            report = report_of(fixed, name)
        hook, item, expected, actual = first_failure(report, "input processor")
        assert (hook, item) == ("input processor", "image 1x1, ids")
        assert (expected, actual) == ("4 3*16 4", "4 3 4")

    def test_a_count_that_transformers_does_not_share(self, fixed: Path, report_of) -> None:
        with broken.plugin(layout=broken.one_more) as name:
            report = report_of(fixed, name)
        failure = first_failure(report, "transformers' processor")
        assert failure == ("image layout", "image 97x1", "16 tokens, as LlavaProcessor counts", "17 tokens")

    def test_a_mapper_that_is_never_the_same(self, fixed: Path, report_of) -> None:
        with broken.plugin(mapper=broken.never_twice) as name:
            assert only_failure(report_of(fixed, name), "fingerprint")[0] == "input mapper"


class TestExecutorModel:
    @pytest.mark.parametrize(
        ("model", "hook", "text"),
        [
            ("Nothing", "executor_model", "cannot load the executor model 'tests.cli.broken:Nothing'"),
            ("NoLogits", "NoLogits", "NoLogits lacks the method compute_logits"),
            (
                "NoPixels",
                "NoPixels",
                "NoPixels.embed_multimodal does not take pixel_values, which the layout emits; it",
            ),
            ("TwoArguments", "TwoArguments.forward", "forward(self, positions, inputs_embeds): too many positional"),
            ("NeedsMore", "NeedsMore.__init__", "the checkpoint lacks weights: more.bias, more.weight"),
        ],
    )
    def test_what_the_model_lacks(self, fixed: Path, report_of, model: str, hook: str, text: str) -> None:
        with broken.plugin(model=model) as name:
            report = report_of(fixed, name)
        found, _, _, actual = only_failure(report, "executor model")
        assert found == hook
        assert text in actual
        assert stage(report, "features")["detail"] == "because executor model failed"

    def test_an_encoder_of_other_features(self, fixed: Path, report_of) -> None:
        with broken.plugin(model="OneFeatureLess") as name:
            report = report_of(fixed, name)
        assert only_failure(report, "features") == (
            "OneFeatureLess.embed_multimodal", "image 1x1", "features of shapes [[16, 64]]", "features of [[15, 64]]"
        )  # fmt: skip
        assert stage(report, "forward")["detail"] == "because features failed"

    def test_a_layout_that_miscounts_a_few_sizes(self, fixed: Path, report_of) -> None:
        with broken.plugin(layout=broken.one_more) as name:
            report = report_of(fixed, name)
        hook, item, expected, actual = first_failure(report, "features")
        assert hook == "LlavaModel.embed_multimodal"
        assert int(item.removeprefix("image ").split("x")[0]) % 97 == 0
        assert (expected, actual) == ("features of shapes [[17, 64]]", "features of [[16, 64]]")


class TestForward:
    @pytest.mark.parametrize("model", ["NoPositions", "NoFeatures"])
    def test_not_what_transformers_computes(self, fixed: Path, report_of, model: str) -> None:
        with broken.plugin(model=model) as name:
            report = report_of(fixed, name)
        assert failed(report) == ["forward"]
        hook, item, expected, actual = first_failure(report, "forward")
        assert hook == f"{model}.forward"
        assert ("text alone" in item) == (model == "NoPositions")
        assert float(expected.removeprefix("transformers' ")) != float(actual)

    def test_not_the_pixels_of_transformers(self, fixed: Path, report_of) -> None:
        with broken.plugin(mapper=broken.channels_swapped) as name:
            assert "image " in only_failure(report_of(fixed, name), "forward")[1]

    def test_chunks_that_matter(self, fixed: Path, report_of) -> None:
        with broken.plugin(model="StepsDiffer") as name:
            assert "StepsDiffer.forward in chunks of" in only_failure(report_of(fixed, name), "forward")[0]

    @pytest.mark.parametrize(("model", "what"), [("NoPositions", "other positions"), ("NoFeatures", "other features")])
    def test_what_it_ignores_without_a_reference(
        self, fixed: Path, tmp_path: Path, report_of, model: str, what: str
    ) -> None:
        with broken.plugin(model=model, architecture="OwnForImage2Seq") as name:
            hook, item, expected, actual = only_failure(report_of(renamed(fixed, tmp_path / "own"), name), "forward")
        assert hook == f"{model}.forward"
        assert item.endswith(what)
        assert expected.startswith(f"other logits with {what} than ")
        assert actual.endswith(" again")

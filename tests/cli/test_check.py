"""`diptych check`: whole families pass; a broken model fails in its stage: the method, the size and both values."""

from __future__ import annotations

import json
import shutil
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diptych.cli.main import main
from executor_service.checks import trial
from executor_service.checks.forward import _before_items
from executor_service.checks.prompts import Prompt
from executor_service.checks.recorder import Answer, Run
from executor_service.checks.reference import _type_arguments
from registry import InputContext, MediaInfo, MediaItem
from registry.checks import prompt as prompt_checks
from registry.families import open_family
from registry.models import llava
from tests.cli import broken
from tests.cli.checking import STAGES, failed, first_failure, only_failure, renamed, stage
from tests.cli.command import diptych
from tests.plugins import checkpoints as plugin_checkpoints


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

    def test_progress_on_a_terminal(self, fixed: Path, without_torch, monkeypatch) -> None:
        terminal = StringIO()
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main(["check", "--model", str(fixed)]) == 0
        shown = terminal.getvalue().split("\r")
        for name in STAGES:
            assert any(line.startswith(f"{name} ") and line.rstrip().endswith("%") for line in shown), name
        assert any("100 %" in line for line in shown)
        assert not shown[-1].strip(), "the bar goes when all is done"

    def test_a_family_that_transformers_does_not_know(self, fixed: Path, tmp_path: Path, report_of) -> None:
        own = renamed(fixed, tmp_path / "own")
        with broken.plugin(architecture="OwnForImage2Seq") as name:
            report = report_of(own, name)
        assert failed(report) == []
        assert "transformers does not know the architecture" in stage(report, "forward")["detail"]
        assert stage(report, "transformers' processor")["skipped"] is True

    @pytest.mark.parametrize("name", ["qwen2_audio", "video_llava", "patchwork", "gemma3"])
    def test_plugins_of_other_kinds(self, name: str, tmp_path: Path, report_of) -> None:
        """Audio; pictures and video; a family in one file with a decoder of its own.

        And pictures whose tokens see each other, of which transformers is told by marks on them.
        """
        getattr(plugin_checkpoints, f"make_{name}")(tmp_path)
        report = report_of(tmp_path, f"tests.plugins.{name}")
        assert failed(report) == []
        expected = {
            "qwen2_audio": "2 prompts alone and in chunks, against transformers in float64 (audio with our features)",
            "video_llava": "5 prompts alone and in chunks, against transformers in float64 (video with our features)",
            "patchwork": "3 prompts alone and in chunks, transformers does not know the architecture",
            "gemma3": "3 prompts alone and in chunks, against transformers in float64; the checkpoint's weights",
        }
        assert stage(report, "forward")["detail"].startswith(expected[name])

    @pytest.mark.parametrize(
        ("parameter", "names"),
        [
            ("mm_token_type_ids", ["mm_token_type_ids"]),
            ("token_type_ids", ["token_type_ids"]),
            ("token_type_ids, mm_token_type_ids", ["mm_token_type_ids"]),
            ("attention_mask", []),
        ],
    )
    def test_marks_go_by_the_name_that_the_model_has_for_them(self, parameter: str, names: list[str]) -> None:
        model = SimpleNamespace(forward=eval(f"lambda input_ids, {parameter}: None"))
        marks = _type_arguments(model, torch.tensor([0, 1]))
        assert {name: value.tolist() for name, value in marks.items()} == {name: [[0, 1]] for name in names}

    @pytest.mark.parametrize("more", [0, 1])
    def test_a_processor_that_counts_separators(self, more: int, tmp_path: Path, report_of, monkeypatch) -> None:
        """As some of transformers' do; any other number is a failure."""
        plugin_checkpoints.make_gemma3(tmp_path)
        family = open_family(tmp_path, plugins=["tests.plugins.gemma3"])
        count = family.layout(MediaInfo.image(32, 32)).num_tokens
        monkeypatch.setattr(prompt_checks, "make_processor", lambda ctx: ctx.tokenizer)
        monkeypatch.setattr(prompt_checks, "_own_counts", lambda _, infos: [count + 2 + more] * len(infos))
        monkeypatch.setattr(prompt_checks, "_check_ids", lambda *_: None)
        report = report_of(tmp_path, "tests.plugins.gemma3")
        assert ("transformers' processor" in failed(report)) == bool(more)
        if more:
            hook, _, expected, actual = first_failure(report, "transformers' processor")
            assert (hook, expected.split()[0]) == ("image layout", str(count + 3))
            assert actual == f"{count} tokens, {count + 2} with separators"

    def test_an_answer_is_compared_up_to_what_stands_for_an_item(self) -> None:
        """Transformers would take it for one more picture."""
        some = SimpleNamespace(family=SimpleNamespace(feature_token_ids=frozenset({9})), token_ids=[1, 2, 3])
        for token_ids, kept in (([5, 9, 7], [5, 9]), ([9, 5, 7], [9]), ([5, 7, 9], [5, 7, 9]), ([5, 6, 7], [5, 6, 7])):
            answer = _before_items(some, some, Answer(token_ids, torch.zeros(5, 4)))
            assert answer.token_ids == kept
            assert len(answer.logits) == 3 + len(kept) - 1

    def test_a_family_without_a_layout(self, fixed: Path, report_of) -> None:
        """There is nothing to hold its hooks against; what can be called is called."""
        with broken.plugin(max_tokens=16, dummy=broken.several_pictures, processor=broken.sixteen_each) as name:
            broken.hooks_of_plugin().layouts.clear()
            report = report_of(fixed, name)
        assert failed(report) == []
        skipped = [stage["name"] for stage in report["stages"] if stage.get("skipped")]
        assert skipped == ["input processor", "transformers' processor", "maximum tokens", "features", "forward"]
        assert stage(report, "dummy data")["detail"] == "80 tokens, image 1x1; 96 tokens, image 1x1, image 1x1"

    def test_as_a_command(self, fixed: Path) -> None:
        done = diptych("check", "--model", fixed, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["ok"] is True

    def test_what_a_plugin_prints_is_not_in_the_report(self, fixed: Path, without_torch, capsys) -> None:
        def mapper(ctx: InputContext, item: MediaItem) -> dict[str, np.ndarray]:
            print("mapping")
            return llava.map_image(ctx, item)

        with broken.plugin(mapper=mapper) as name:
            assert main(["check", "--model", str(fixed), "--plugin", name, "--json"]) == 0
        output = capsys.readouterr()
        assert json.loads(output.out)["ok"] is True
        assert "mapping" in output.err


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
            ("NeedsMasks", "NeedsMasks", "requires masks, which no layout emits; the layouts emit pixel_values"),
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

    def test_items_that_change_places(self, fixed: Path, report_of) -> None:
        with broken.plugin(model="Backwards") as name:
            hook, item, expected, actual = only_failure(report_of(fixed, name), "features")
        assert hook == "Backwards.embed_multimodal"
        assert item.startswith("two of image ")
        assert (expected, actual) == ("the features that each has alone", "each other's")


class TestForward:
    def test_logits_of_fewer_tokens(self, fixed: Path, tmp_path: Path, report_of) -> None:
        with broken.plugin(model="NarrowLogits", architecture="OwnForImage2Seq") as name:
            failure = only_failure(report_of(renamed(fixed, tmp_path / "own"), name), "forward")
        assert failure == ("NarrowLogits.compute_logits", "text alone", "328 logits, as many as ids", "325 logits")

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

    def test_tokens_in_chunks_that_are_not_those_in_one_piece(self, fixed: Path, report_of, monkeypatch) -> None:
        """Of the last token no logits follow that would show it."""
        answer = Run.answer

        def another_last_token(run: Run, prompts: list[Prompt]) -> list[Answer]:
            answers = answer(run, prompts)
            if len(prompts) > 1:
                answers[1].token_ids[-1] ^= 1
            return answers

        monkeypatch.setattr(Run, "answer", another_last_token)
        hook, item, expected, actual = only_failure(report_of(fixed), "forward")
        assert "LlavaModel.forward in chunks of" in hook
        assert item.endswith(", greedy tokens")
        assert json.loads(expected)[:-1] == json.loads(actual)[:-1]
        assert json.loads(expected)[-1] ^ 1 == json.loads(actual)[-1]

    def test_tokens_that_transformers_would_not_choose(self, fixed: Path, report_of) -> None:
        with broken.plugin(model="OtherChoices") as name:
            hook, item, expected, actual = only_failure(report_of(fixed, name), "forward")
        assert (hook, item) == ("OtherChoices.forward", "text alone, greedy tokens")
        assert len(json.loads(expected)) == len(json.loads(actual)) == 6
        assert expected != actual

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

"""`diptych check` without torch: each broken hook fails in its stage, with the hook, the size and both values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from registry import DummyData, ItemLayout, MediaInfo, Run, TensorSpec
from registry.checks.probes import noise_item
from registry.models import llava_next
from tests.checkpoints import write_json
from tests.cli import broken
from tests.cli.checking import first_failure, only_failure, renamed, stage

pytestmark = pytest.mark.usefixtures("without_torch")


def test_no_checkpoint(tmp_path: Path, report_of) -> None:
    report = report_of(tmp_path)
    hook, _, _, actual = only_failure(report, "checkpoint")
    assert (hook, actual) == (
        "checkpoint", f"CheckpointError: {tmp_path} is not a checkpoint directory: it has no config.json"
    )  # fmt: skip
    assert stage(report, "hooks")["detail"] == "because checkpoint failed"
    assert report["fingerprint"] is report["family"] is None


def test_unknown_architecture(fixed: Path, tmp_path: Path, report_of) -> None:
    report = report_of(renamed(fixed, tmp_path / "own"))
    hook, _, _, actual = only_failure(report, "hooks")
    assert hook == "hooks"
    assert "no family is registered for architecture 'OwnForImage2Seq'" in actual
    assert report["architecture"] == "OwnForImage2Seq"
    assert all(stage.get("skipped") for stage in report["stages"][2:])


def test_a_missing_hook(fixed: Path, report_of) -> None:
    with broken.plugin() as name:
        broken.hooks_of_plugin().layouts.clear()
        report = report_of(fixed, name)
    assert "must register the maximum tokens by hand" in only_failure(report, "hooks")[3]


def test_a_placeholder_that_the_tokenizer_does_not_have(fixed: Path, tmp_path: Path, report_of) -> None:
    path = shutil.copytree(fixed, tmp_path / "changed")
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**config, "image_token_index": 320})
    assert only_failure(report_of(path), "hooks") == ("image placeholder", "", "a token id below 320", "320")


def test_own_and_default_hooks_and_what_overrides_what(fixed: Path, report_of) -> None:
    with broken.plugin(max_tokens=16) as name:
        detail = stage(report_of(fixed, name), "hooks")["detail"]
    assert detail.startswith("image: own layout, own mapper, own maximum; default dummy data; default input")
    assert "LlavaForConditionalGeneration is registered more than once; the plugin a_broken_plugin counts" in detail


def test_a_hook_that_raises(fixed: Path, report_of) -> None:
    with broken.plugin(layout=broken.wide_ones_fail) as name:
        report = report_of(fixed, name)
    expected = ("image layout", "image 1x13", "no exception", "ZeroDivisionError: so wide")
    assert first_failure(report, "layout and mapper") == expected
    assert "failures, the first 5 of them here" in stage(report, "layout and mapper")["detail"]


def test_tokens_that_the_embedding_does_not_have(fixed: Path, report_of) -> None:
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
def test_a_mapper_of_other_tensors(fixed: Path, report_of, mapper, actual: str) -> None:
    with broken.plugin(mapper=mapper) as name:
        report = report_of(fixed, name)
    expected = ("image input mapper", "image 1x1", "pixel_values uint8 [3, 56, 56]", actual)
    assert first_failure(report, "layout and mapper") == expected
    assert stage(report, "fingerprint")["detail"] == "because layout and mapper failed"


@pytest.mark.parametrize(
    ("emitted", "expected", "actual"),
    [
        (None, "the layout's tensors", "Broken: the image input mapper returned NoneType; a Mapping is expected"),
        (np.full((3, 2), np.nan, np.float32), "finite pixel_values", "6 of 6 values are NaN or infinite"),
        (
            np.array([[0, 1], [np.inf, 1], [0, 0]], np.float32),
            "finite pixel_values",
            "1 of 6 values are",
        ),
    ],
    ids=["nothing", "nan", "infinity"],
)
def test_a_mapper_of_no_numbers(fixed: Path, report_of, emitted, expected: str, actual: str) -> None:
    layout = ItemLayout((Run(3, 16),), {"pixel_values": TensorSpec("float32", (3, 2))})
    result = None if emitted is None else {"pixel_values": emitted}
    with broken.plugin(layout=lambda *_: layout, mapper=lambda *_: result) as name:
        failure = first_failure(report_of(fixed, name), "layout and mapper")
    assert failure[:3] == ("image input mapper", "image 1x1", expected)
    assert failure[3].startswith(actual)


def test_a_mapper_of_more_than_the_layout_names(fixed: Path, report_of) -> None:
    with broken.plugin(mapper=broken.with_masks) as name:
        failure = first_failure(report_of(fixed, name), "layout and mapper")
    assert failure == ("image input mapper", "image 1x1", "only pixel_values", "masks too")


def test_a_mapper_that_fails_on_large_pictures(anyres: Path, report_of) -> None:
    with broken.plugin(llava_next, mapper=broken.large_without_tile) as name:
        failures = stage(report_of(anyres, name), "layout and mapper")["failures"]
    assert [failure["item"] for failure in failures] == ["image 1080x1920", "image 3000x4000"]
    assert failures[0]["expected"] == "pixel_values uint8 [5, 3, 56, 56]"
    assert failures[0]["actual"] == "pixel_values uint8 [4, 3, 56, 56]"


def test_a_mapper_that_fails_on_the_longest_pictures(fixed: Path, report_of) -> None:
    with broken.plugin(mapper=broken.without_lines) as name:
        failures = stage(report_of(fixed, name), "layout and mapper")["failures"]
    assert {failure["item"] for failure in failures} == {"image 1x8192", "image 8192x1"}
    assert {failure["actual"] for failure in failures} == {"ValueError: so long"}


def test_an_input_processor_that_returns_nothing(fixed: Path, report_of) -> None:
    with broken.plugin(processor=lambda ctx, inputs: None) as name:
        failure = first_failure(report_of(fixed, name), "input processor")
    assert failure[:2] == ("input processor", "image 1x1")
    assert failure[3] == "InvalidHookError: the input processor returned NoneType; a ProcessorInputs is expected"


def test_a_plugin_that_does_not_run(fixed: Path, report_of, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "is_no_python.py").write_text("def f(:", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    failure = first_failure(report_of(fixed, "is_no_python"), "hooks")
    assert failure[3].startswith("RegistryError: cannot import the plugin 'is_no_python': SyntaxError: invalid")


def test_constants_that_differ(anyres: Path, report_of) -> None:
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
def test_a_maximum_that_is_not_the_maximum(fixed: Path, report_of, maximum: int, expected: str) -> None:
    with broken.plugin(max_tokens=maximum) as name:
        report = report_of(fixed, name)
    failure = only_failure(report, "maximum tokens")
    assert failure == ("maximum image tokens", "image 1x1", expected, str(maximum))


def test_a_maximum_without_end(fixed: Path, report_of) -> None:
    """Dummy data is not asked for so many tokens."""
    with broken.plugin(max_tokens=10**15) as name:
        report = report_of(fixed, name)
    actual = only_failure(report, "maximum tokens")[3]
    assert actual.endswith("is 1000000000000000; it must be an int from 1 to 16777216")
    assert stage(report, "dummy data")["detail"] == "because maximum tokens failed"


def test_a_picture_without_end(fixed: Path, report_of) -> None:
    """The fingerprint, the dummy data and the model are not asked to make its tokens."""
    with broken.plugin(layout=broken.large_ones_are_endless) as name:
        report = report_of(fixed, name)
    hook, item, _, actual = first_failure(report, "layout and mapper")
    assert (hook, item) == ("image layout", "image 4093x1")
    assert actual.endswith("has 1000000000000 tokens; at most 16777216 are allowed")


def test_dummy_data_that_is_short(fixed: Path, report_of) -> None:
    items = [noise_item(MediaInfo.image(1, 1))]
    with broken.plugin(dummy=lambda ctx, seq_len, counts: DummyData([3, 5], items)) as name:
        hook, item, _, actual = only_failure(report_of(fixed, name), "dummy data")
    assert (hook, item) == ("dummy data", "asked for 80 tokens and 1 image")
    assert actual == "InvalidHookError: Broken: dummy data has 17 tokens; at least 80 were asked for"


def test_dummy_data_without_the_largest_item(anyres: Path, report_of) -> None:
    items = [noise_item(MediaInfo.image(1, 1000))]
    with broken.plugin(llava_next, dummy=lambda ctx, seq_len, counts: DummyData([3, *[5] * seq_len], items)) as name:
        failure = only_failure(report_of(anyres, name), "dummy data")
    assert failure[:2] == ("dummy data", "image 1x1000")
    assert failure[2:] == ("an item of 88 features (image 57x57)", "at most 16")


def test_an_input_processor_of_its_own_mind(fixed: Path, report_of) -> None:
    with broken.plugin(processor=lambda ctx, inputs: inputs) as name:
        report = report_of(fixed, name)
    hook, item, expected, actual = first_failure(report, "input processor")
    assert (hook, item) == ("input processor", "image 1x1, ids")
    assert (expected, actual) == ("4 3*16 4", "4 3 4")


def test_an_input_processor_that_is_right_with_one_item(fixed: Path, report_of) -> None:
    with broken.plugin(processor=broken.fewer_behind_the_first) as name:
        failures = stage(report_of(fixed, name), "input processor")["failures"]
    assert [failure["item"].count(" and ") for failure in failures] == [1, 1, 2, 2]
    assert (failures[0]["expected"], failures[0]["actual"]) == ("4 3*16 4 3*16 4", "4 3*16 4 3*15 4")


def test_an_input_processor_of_other_ranges(fixed: Path, report_of) -> None:
    with broken.plugin(processor=broken.ranges_off_by_one) as name:
        failure = first_failure(report_of(fixed, name), "input processor")
    assert failure == (
        "input processor", "image 1x1, ranges",
        "[PlaceholderRange(offset=1, length=16)]", "[PlaceholderRange(offset=2, length=15)]",
    )  # fmt: skip


def test_dummy_data_that_cannot_be_mapped(fixed: Path, report_of) -> None:
    def dummy(ctx, seq_len, counts):
        count = counts["image"]
        return [*[3] * count, *[5] * seq_len], [noise_item(MediaInfo.image(*broken.ODD_SIZE))] * count

    with broken.plugin(dummy=dummy, mapper=broken.all_but_odd) as name:
        failure = only_failure(report_of(fixed, name), "dummy data")
    assert failure == ("image input mapper", "image 555x444", "no exception", "ValueError: so odd")


def test_dummy_data_that_ignores_the_number(fixed: Path, report_of) -> None:
    with broken.plugin(dummy=broken.one_picture) as name:
        hook, item, _, actual = only_failure(report_of(fixed, name), "dummy data")
    assert (hook, item) == ("dummy data", "asked for 96 tokens and 2 image")
    assert actual == "InvalidHookError: Broken: dummy data has 1 image items; 2 were asked for"


def test_a_count_that_transformers_does_not_share(fixed: Path, report_of) -> None:
    with broken.plugin(layout=broken.one_more) as name:
        report = report_of(fixed, name)
    failure = first_failure(report, "transformers' processor")
    assert failure == ("image layout", "image 97x1", "16 tokens, as LlavaProcessor counts", "17 tokens")


def test_ids_that_transformers_does_not_share(fixed: Path, report_of) -> None:
    """As many features, so that its count is ours."""
    with broken.plugin(layout=broken.starts_with_a_token) as name:
        hook, item, expected, actual = only_failure(report_of(fixed, name), "transformers' processor")
    assert hook == "input processor"
    assert item.endswith(", ids")
    assert expected.replace(" 3*16 ", " 4 3*16 ") == actual


def test_a_mapper_that_is_never_the_same(fixed: Path, report_of) -> None:
    with broken.plugin(mapper=broken.never_twice) as name:
        assert only_failure(report_of(fixed, name), "fingerprint")[0] == "input mapper"

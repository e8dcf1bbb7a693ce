"""Prompts as they are expanded: by the family's own input processor, and by transformers' processor."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, Final

import transformers

from registry.checks.mapper import lay_out
from registry.checks.probes import describe, noise_item, representatives
from registry.checks.report import Findings, SkippedStageError
from registry.checks.subject import Subject
from registry.contract import expect_type
from registry.defaults.input_processor import splice_replacements
from registry.inputs import ProcessorInputs
from registry.media import MediaInfo

NUM_PROMPTS: Final = 3
"""Pictures that go through transformers' processor whole."""
SEVERAL: Final = (2, 3)
"""Items of the prompts with more than one, each of another size."""
MODALITY_PARTS: Final = ("image_processor", "tokenizer", "feature_extractor", "video_processor", "chat_template")


def check_input_processor(subject: Subject, findings: Findings) -> str:
    """The expanded ids and placeholder ranges are those of the layout."""
    if not subject.layouts:
        raise SkippedStageError("there is no layout to compare with")
    if subject.family.hooks.input_processor is None:
        return "default: splices the layout's replacement"
    count = 0
    for modality in subject.layouts:
        infos = representatives(lay_out(subject, modality, Findings()))
        prompts = [[info] for info in infos] + [infos[:number] for number in SEVERAL if number <= len(infos)]
        for media in findings.each(prompts):
            _check_expansion(subject, media, findings)
        count += len(prompts)
    return f"{count} prompts"


def _check_expansion(subject: Subject, media: list[MediaInfo], findings: Findings) -> None:
    family, item = subject.family, " and ".join(map(describe, media))
    text, placeholder = family.text_token_id, family.placeholder_token_id(media[0].modality)
    inputs = ProcessorInputs([text, *[placeholder, text] * len(media)], media)
    with findings.calling("input processor", item):
        assert family.hooks.input_processor is not None
        expected = splice_replacements(family, inputs)
        actual = expect_type(family.hooks.input_processor(family.ctx, inputs), ProcessorInputs, "the input processor")
        ids = _runs(expected.prompt_token_ids), _runs(actual.prompt_token_ids)
        findings.expect("input processor", f"{item}, ids", *ids)
        ranges = list(expected.placeholders), list(actual.placeholders)
        findings.expect("input processor", f"{item}, ranges", *ranges)


def check_transformers_processor(subject: Subject, findings: Findings) -> str:
    """Its own count of every size, and its own ids of a few prompts, against the layout's."""
    if "image" not in subject.layouts:
        raise SkippedStageError("there is no image layout to compare with")
    processor = make_processor(subject.ctx)
    probes = lay_out(subject, "image", Findings())
    infos = [info for info, _ in probes]
    counts = _own_counts(processor, infos)
    for (info, layout), count in zip(probes, counts, strict=True):
        # Some processors count features, others all that stands in the placeholder's place.
        if count not in (layout.num_tokens, layout.length):
            expected = f"{count} tokens, as {_name(processor)} counts"
            separators = "" if layout.length == layout.num_tokens else f", {layout.length} with separators"
            findings.fail("image layout", describe(info), expected, f"{layout.num_tokens} tokens{separators}")
    usable = [info for info in representatives(probes) if min(info.size) >= 16][:NUM_PROMPTS]
    try:
        for info in findings.each(usable):
            _check_ids(subject, processor, info, findings)
    except SkippedStageError as reason:
        return f"{_name(processor)}: {len(counts)} counts; no prompts: {reason}"
    return f"{_name(processor)}: {len(counts)} counts, {len(usable)} prompts"


def make_processor(ctx: Any) -> Any:
    """Transformers' processor of the checkpoint; SkippedStageError says why there is none."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    model_type = ctx.model_config.model_type
    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None or not hasattr(transformers, ctx.architecture):
        raise SkippedStageError(f"transformers has no processor for {ctx.architecture}")
    try:
        cls = getattr(importlib.import_module(f"transformers.models.{model_type}.processing_{model_type}"), name)
        parameters = _parameters(cls, ctx)
        return cls(image_processor=ctx.image_processor, tokenizer=ctx.tokenizer, **parameters)
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        raise SkippedStageError(f"transformers' {name} cannot be made here: {_first_line(error)}") from error


def _parameters(cls: Any, ctx: Any) -> dict[str, Any]:
    """What the processor is told beside its parts; what the checkpoint does not say is not guessed."""
    wanted = [
        parameter
        for parameter in inspect.signature(cls.__init__).parameters.values()
        if parameter.name not in ("self", *MODALITY_PARTS)
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    given = {p.name: ctx.processor_config[p.name] for p in wanted if p.name in ctx.processor_config}
    if missing := [p.name for p in wanted if p.default is None and p.name not in given]:
        raise SkippedStageError(f"the processor's configuration does not say {', '.join(missing)}")
    return given


def _own_counts(processor: Any, infos: Sequence[MediaInfo]) -> list[int]:
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None:
        raise SkippedStageError(f"{_name(processor)} does not count tokens")
    try:
        return [int(number) for number in count(image_sizes=[list(info.size) for info in infos]).num_image_tokens]
    except (ImportError, AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise SkippedStageError(f"{_name(processor)} cannot count: {_first_line(error)}") from error


def _check_ids(subject: Subject, processor: Any, info: MediaInfo, findings: Findings) -> None:
    """The whole prompt as transformers tokenizes it, picture included."""
    family = subject.family
    text = f"a{family.placeholder_texts['image']} b"
    try:
        expected = processor(text=text, images=[noise_item(info).data], return_tensors="np")["input_ids"][0].tolist()
    except (ImportError, TypeError, ValueError) as error:
        raise SkippedStageError(f"{_name(processor)} does not run here: {_first_line(error)}") from error
    with findings.calling("input processor", describe(info)):
        ours = family.process(ProcessorInputs(list(family.ctx.tokenizer(text)["input_ids"]), [info]))
        findings.expect("input processor", f"{describe(info)}, ids", _runs(expected), _runs(ours.prompt_token_ids))


def _runs(token_ids: Sequence[int]) -> str:
    """Ids with repetitions counted: `1 40 3*576 41`."""
    runs: list[list[int]] = []
    for token in token_ids:
        if runs and runs[-1][0] == token:
            runs[-1][1] += 1
        else:
            runs.append([token, 1])
    return " ".join(str(token) if count == 1 else f"{token}*{count}" for token, count in runs)


def _name(processor: Any) -> str:
    return type(processor).__name__


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

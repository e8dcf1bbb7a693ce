"""The maximum tokens bound every item from above, some item attains them, and dummy data holds such an item."""

from __future__ import annotations

from typing import Final

from registry.checks.mapper import check_item, lay_out
from registry.checks.probes import describe
from registry.checks.report import Findings, SkippedStageError
from registry.checks.subject import Subject
from registry.media import MediaInfo, MediaItem

TEXT_TOKENS: Final = 64
"""Tokens that dummy data is asked for beyond its items."""


def check_maximum(subject: Subject, findings: Findings) -> str:
    """Compared with the largest item of the search and of hill-climbing."""
    if not subject.layouts:
        raise SkippedStageError("there is no layout to search")
    details = []
    for modality in findings.each(subject.layouts):
        hook = f"maximum {modality} tokens"
        with findings.calling(hook):
            most, info = find_most(subject, modality, findings)
            registered = subject.family.max_tokens(modality)
            if registered < most:
                findings.fail(hook, describe(info), f"at least {most}", registered)
            elif registered > most:
                findings.fail(hook, describe(info), f"{most}, which no item exceeds", registered)
            details.append(f"{modality}: {registered} at {describe(info)}")
    return "; ".join(details)


def find_most(subject: Subject, modality: str, findings: Findings) -> tuple[int, MediaInfo]:
    """Features of the largest item, and the item."""
    infos = [info for info, _ in lay_out(subject, modality, findings)]
    infos.append(subject.family.find_largest(modality, "num_tokens"))
    return max(((subject.family.layout(info).num_tokens, info) for info in infos), key=lambda pair: pair[0])


def check_dummy_data(subject: Subject, findings: Findings) -> str:
    """As many items as a prompt may have, then twice as many: the limits are each executor's to set."""
    limits = subject.family.ctx.limits
    counts = {modality: limits.max_items(modality) for modality in subject.family.modalities}
    details = [_check_dummy_data(subject, counts, findings)]
    if not findings.failures:
        twice = {modality: 2 * count for modality, count in counts.items()}
        details.append(_check_dummy_data(subject, twice, findings))
    return "; ".join(details)


def _check_dummy_data(subject: Subject, counts: dict[str, int], findings: Findings) -> str:
    """As many items as were asked for, one of them the largest there is, all mapped as their layouts say."""
    family = subject.family
    seq_len = TEXT_TOKENS + sum(count * family.max_tokens(modality) for modality, count in counts.items())
    items: list[MediaItem] = []
    with findings.calling("dummy data", f"asked for {seq_len} tokens and {_counted(counts)}"):
        _, items = family.dummy_data(seq_len, counts)
        for modality in subject.layouts:
            _check_largest(subject, modality, items, findings)
    for info in dict.fromkeys(item.info for item in items):
        if family.has_layout(info.modality):
            check_item(family, info, findings)
    return f"{seq_len} tokens, " + ", ".join(describe(item.info) for item in items)


def _check_largest(subject: Subject, modality: str, items: list[MediaItem], findings: Findings) -> None:
    most, info = find_most(subject, modality, Findings())
    there = [item.info for item in items if item.modality == modality]
    largest = max(there, key=lambda one: subject.family.layout(one).num_tokens)
    held = subject.family.layout(largest).num_tokens
    if held < most:
        expected = f"an item of {most} features ({describe(info)})"
        findings.fail("dummy data", describe(largest), expected, f"at most {held}")


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {modality}" for modality, count in counts.items())

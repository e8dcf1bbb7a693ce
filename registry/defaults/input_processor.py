"""Default input processor: splice each item's replacement in place of its placeholder, as token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from registry.errors import MediaError, PlaceholderMismatchError
from registry.inputs import ProcessorInputs
from registry.layout import ItemLayout, PlaceholderRange
from registry.media import MediaInfo

if TYPE_CHECKING:
    from registry.family import ModelFamily


def splice_replacements(family: ModelFamily, inputs: ProcessorInputs) -> ProcessorInputs:
    """Expanded ids and ranges; PlaceholderMismatchError naming both numbers if placeholders and items differ."""
    positions = _find_placeholders(family, inputs)
    layouts = [_layout_of(family, info, index) for index, info in enumerate(inputs.media)]
    expanded: list[int] = []
    ranges: list[PlaceholderRange] = []
    done = 0
    for position, layout in zip(positions, layouts, strict=True):
        expanded += inputs.prompt_token_ids[done:position]
        ranges.append(PlaceholderRange(len(expanded), layout.length))
        expanded += layout.token_ids
        done = position + 1
    expanded += inputs.prompt_token_ids[done:]
    return ProcessorInputs(expanded, inputs.media, ranges, layouts)


def _layout_of(family: ModelFamily, info: MediaInfo, index: int) -> ItemLayout:
    """The item's layout; what the family refuses is named by its place."""
    try:
        return family.layout(info)
    except MediaError as error:
        error.item_index = index
        raise


def _find_placeholders(family: ModelFamily, inputs: ProcessorInputs) -> list[int]:
    """Positions of the placeholders; their kinds must be those of the items, in order."""
    kinds = family.modality_of_placeholder
    positions = [index for index, token in enumerate(inputs.prompt_token_ids) if token in kinds]
    found = [kinds[inputs.prompt_token_ids[position]] for position in positions]
    given = [info.modality for info in inputs.media]
    if len(found) != len(given):
        raise PlaceholderMismatchError(
            f"the prompt has {len(found)} media placeholders and the request has {len(given)} media items",
            limit=len(found),
            actual=len(given),
        )
    for index, (placeholder, modality) in enumerate(zip(found, given, strict=True)):
        if placeholder != modality:
            raise PlaceholderMismatchError(
                f"placeholder {index} of the prompt is for {placeholder}, item {index} is {modality}", item_index=index
            )
    return positions

"""The model families that come with Diptych, one file each."""

from typing import Final

BUILT_IN_FAMILIES: Final = {
    "LlavaForConditionalGeneration": "registry.models.llava:LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration": "registry.models.llava_next:LlavaNextForConditionalGeneration",
}
"""Architecture name -> "module:Class"; imported on first use."""

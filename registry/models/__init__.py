"""The model families that come with Diptych, one file each."""

from typing import Final

BUILT_IN_FAMILIES: Final = {
    "LlavaForConditionalGeneration": "registry.models.llava:LlavaForConditionalGeneration",
}
"""Architecture name -> "module:Class"; imported on first use."""

"""What a model developer writes once per model family, and both services read.

A family is a class that implements `SupportsMultiModal`, decorated with the hooks it needs:

    @MULTIMODAL_REGISTRY.register_image_layout(layout)
    @MULTIMODAL_REGISTRY.register_image_input_mapper()
    @MULTIMODAL_REGISTRY.register_max_image_tokens()
    @INPUT_REGISTRY.register_dummy_data()
    @INPUT_REGISTRY.register_input_processor()
    class YourModelForImage2Seq(SupportsMultiModal): ...

This package imports no torch, no grpc and nothing else of the project.
"""

from registry.context import InputContext
from registry.hooks import SupportsMultiModal
from registry.inputs import INPUT_REGISTRY, DummyData, ProcessorInputs
from registry.layout import ItemLayout, Normalization, PlaceholderRange, Run, TensorSpec
from registry.limits import MediaLimits
from registry.media import MediaInfo, MediaItem
from registry.multimodal import MULTIMODAL_REGISTRY

__all__ = [
    "INPUT_REGISTRY",
    "MULTIMODAL_REGISTRY",
    "DummyData",
    "InputContext",
    "ItemLayout",
    "MediaInfo",
    "MediaItem",
    "MediaLimits",
    "Normalization",
    "PlaceholderRange",
    "ProcessorInputs",
    "Run",
    "SupportsMultiModal",
    "TensorSpec",
]

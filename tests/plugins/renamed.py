"""LLaVA-1.5 whose executor model has its decoder under another name than transformers' has; needs no torch."""

from registry import MULTIMODAL_REGISTRY, SupportsMultiModal
from registry.models.llava import layout, map_image


@MULTIMODAL_REGISTRY.register_image_layout(layout)
@MULTIMODAL_REGISTRY.register_image_input_mapper(map_image)
class RenamedForConditionalGeneration(SupportsMultiModal):
    executor_model = "tests.plugins.renamed_model:RenamedModel"

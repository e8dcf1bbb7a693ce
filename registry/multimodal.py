"""`MULTIMODAL_REGISTRY`: layouts, input mappers and maximum tokens, by class and modality."""

from __future__ import annotations

from registry.hooks import Decorator, FamilyT, InputMapperHook, LayoutHook, MaxTokensHook, note_registration
from registry.media import check_modality


class MultiModalRegistry:
    """Decorators for what concerns one modality. General forms take the modality first."""

    def register_item_layout(self, modality: str, layout: LayoutHook) -> Decorator:
        """Register `(ctx, media info) -> ItemLayout`, pure integer arithmetic on header facts."""
        check_modality(modality)

        def decorate(family: FamilyT, /) -> FamilyT:
            note_registration(family, f"the {modality} layout").layouts[modality] = layout
            return family

        return decorate

    def register_input_mapper(self, modality: str, mapper: InputMapperHook | None = None) -> Decorator:
        """Register `(ctx, item) -> {name: array}`, one item per call; empty: the modality's default."""
        check_modality(modality)

        def decorate(family: FamilyT, /) -> FamilyT:
            note_registration(family, f"the {modality} input mapper").input_mappers[modality] = mapper
            return family

        return decorate

    def register_max_multimodal_tokens(self, modality: str, max_tokens: MaxTokensHook | int | None = None) -> Decorator:
        """Register an upper bound of feature tokens per item: a number, or `(ctx) -> int`; empty: a search."""
        check_modality(modality)

        def decorate(family: FamilyT, /) -> FamilyT:
            note_registration(family, f"the maximum {modality} tokens").max_tokens[modality] = max_tokens
            return family

        return decorate

    def register_image_layout(self, layout: LayoutHook) -> Decorator:
        """`register_item_layout("image", layout)`."""
        return self.register_item_layout("image", layout)

    def register_video_layout(self, layout: LayoutHook) -> Decorator:
        """`register_item_layout("video", layout)`."""
        return self.register_item_layout("video", layout)

    def register_audio_layout(self, layout: LayoutHook) -> Decorator:
        """`register_item_layout("audio", layout)`."""
        return self.register_item_layout("audio", layout)

    def register_image_input_mapper(self, mapper: InputMapperHook | None = None) -> Decorator:
        """`register_input_mapper("image", mapper)`."""
        return self.register_input_mapper("image", mapper)

    def register_video_input_mapper(self, mapper: InputMapperHook | None = None) -> Decorator:
        """`register_input_mapper("video", mapper)`."""
        return self.register_input_mapper("video", mapper)

    def register_audio_input_mapper(self, mapper: InputMapperHook | None = None) -> Decorator:
        """`register_input_mapper("audio", mapper)`."""
        return self.register_input_mapper("audio", mapper)

    def register_max_image_tokens(self, max_tokens: MaxTokensHook | int | None = None) -> Decorator:
        """`register_max_multimodal_tokens("image", max_tokens)`."""
        return self.register_max_multimodal_tokens("image", max_tokens)

    def register_max_video_tokens(self, max_tokens: MaxTokensHook | int | None = None) -> Decorator:
        """`register_max_multimodal_tokens("video", max_tokens)`."""
        return self.register_max_multimodal_tokens("video", max_tokens)

    def register_max_audio_tokens(self, max_tokens: MaxTokensHook | int | None = None) -> Decorator:
        """`register_max_multimodal_tokens("audio", max_tokens)`."""
        return self.register_max_multimodal_tokens("audio", max_tokens)


MULTIMODAL_REGISTRY = MultiModalRegistry()

"""Media facts, layouts and fingerprints between registry values and messages."""

from __future__ import annotations

from diptych.v1 import executor_pb2, tensor_pb2
from diptych.wire.dtypes import MODALITY_OF_NAME, NAME_OF_MODALITY
from registry import MediaInfo, PlaceholderRange
from registry.fingerprint import Fingerprint

_OPTIONAL_FIELDS = ("height", "width", "num_frames", "frame_rate", "num_samples", "sample_rate")


def media_info_to_proto(info: MediaInfo) -> tensor_pb2.MediaInfo:
    """Set fields only."""
    facts = {name: value for name in _OPTIONAL_FIELDS if (value := getattr(info, name)) is not None}
    return tensor_pb2.MediaInfo(modality=MODALITY_OF_NAME[info.modality], **facts)


def media_info_from_proto(message: tensor_pb2.MediaInfo) -> MediaInfo:
    """ValueError for a modality that is not set or not known."""
    if message.modality not in NAME_OF_MODALITY:
        raise ValueError(f"modality {message.modality} is not known")
    facts = {name: getattr(message, name) for name in _OPTIONAL_FIELDS if message.HasField(name)}
    return MediaInfo(NAME_OF_MODALITY[message.modality], **facts)


def placeholder_to_proto(placeholder: PlaceholderRange) -> tensor_pb2.PlaceholderRange:
    """The range as a message."""
    return tensor_pb2.PlaceholderRange(offset=placeholder.offset, length=placeholder.length)


def fingerprint_to_proto(value: Fingerprint) -> executor_pb2.Fingerprint:
    """The fingerprint as a message."""
    return executor_pb2.Fingerprint(digest=value.digest, parts=value.parts, probes=value.probes)


def fingerprint_from_proto(message: executor_pb2.Fingerprint) -> Fingerprint:
    """The fingerprint of a message."""
    return Fingerprint(message.digest, dict(message.parts), tuple(message.probes))

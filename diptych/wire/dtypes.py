"""The contract's dtypes and modalities, by the registry's names."""

from __future__ import annotations

from typing import Final

from diptych.v1 import tensor_pb2

DTYPE_OF_NAME: Final = {
    "bool": tensor_pb2.D_TYPE_BOOL,
    "uint8": tensor_pb2.D_TYPE_UINT8,
    "int8": tensor_pb2.D_TYPE_INT8,
    "int16": tensor_pb2.D_TYPE_INT16,
    "int32": tensor_pb2.D_TYPE_INT32,
    "int64": tensor_pb2.D_TYPE_INT64,
    "float16": tensor_pb2.D_TYPE_FLOAT16,
    "bfloat16": tensor_pb2.D_TYPE_BFLOAT16,
    "float32": tensor_pb2.D_TYPE_FLOAT32,
    "float64": tensor_pb2.D_TYPE_FLOAT64,
}
NAME_OF_DTYPE: Final = {number: name for name, number in DTYPE_OF_NAME.items()}
MODALITY_OF_NAME: Final = {
    "image": tensor_pb2.MODALITY_IMAGE,
    "video": tensor_pb2.MODALITY_VIDEO,
    "audio": tensor_pb2.MODALITY_AUDIO,
}
NAME_OF_MODALITY: Final = {number: name for name, number in MODALITY_OF_NAME.items()}

"""Typed Python client of both services, synchronous and asynchronous.

with Client("127.0.0.1:50051") as client:
for piece in client.stream(Prompt("<image> What is this?", [Media.file("cat.jpg")]), max_tokens=32):
print(piece.text, end="")
"""

from diptych.client.aio import AsyncClient
from diptych.client.errors import RequestError
from diptych.client.inputs import Chat, GenerateOptions, Media, Message, Prompt
from diptych.client.results import (
    ExecutorModel,
    Final,
    Generation,
    Item,
    Logprobs,
    MemoryLedger,
    Model,
    Piece,
    Plan,
    Processed,
    TensorShape,
    Usage,
)
from diptych.client.sync import Client

__all__ = [
    "AsyncClient",
    "Chat",
    "Client",
    "ExecutorModel",
    "Final",
    "GenerateOptions",
    "Generation",
    "Item",
    "Logprobs",
    "Media",
    "MemoryLedger",
    "Message",
    "Model",
    "Piece",
    "Plan",
    "Processed",
    "Prompt",
    "RequestError",
    "TensorShape",
    "Usage",
]

"""Settings of the preprocess service."""

from __future__ import annotations

import os
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, ByteSize, Field

from diptych.service.lifecycle import MAX_MESSAGE_BYTES
from diptych.service.settings import Names, ServiceSettings
from preprocess_service.limits import DEFAULT_MAX_PROMPT_BYTES


def _check_addresses(addresses: tuple[str, ...]) -> tuple[str, ...]:
    if not addresses:
        raise ValueError("at least one HOST:PORT is needed")
    for address in addresses:
        _, colon, port = address.rpartition(":")
        if not colon or not port.isdigit() or not 1 <= int(port) <= 65535:
            raise ValueError(f"{address!r} is not of the form HOST:PORT")
    return addresses


class PreprocessSettings(ServiceSettings):
    """What `diptych preprocess` can be told."""

    default_port: ClassVar[int] = 50051

    executor: Annotated[Names, AfterValidator(_check_addresses)] = Field(
        description="executor addresses, HOST:PORT, separated by commas"
    )
    executor_streams: Literal["shared", "per-request"] = Field(
        "shared",
        description="one stream per executor for all requests, or one per request (where one address fronts "
        "several executors)",
    )
    max_pending_requests: int = Field(
        256, ge=1, description="requests worked on at once; more are refused with RESOURCE_EXHAUSTED"
    )
    max_media_bytes: ByteSize = Field(
        ByteSize(MAX_MESSAGE_BYTES), gt=0, description="size of one media file at most, e.g. 16MiB"
    )
    max_prompt_bytes: ByteSize = Field(
        ByteSize(DEFAULT_MAX_PROMPT_BYTES),
        gt=0,
        description="text of one prompt, of all messages of a chat, or to Tokenize, as UTF-8, at most, e.g. 1MiB",
    )
    media_threads: int = Field(
        default_factory=lambda: os.cpu_count() or 1, ge=1, description="threads that decode and map media"
    )

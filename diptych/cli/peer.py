"""What listens at an address: found out by its health, which names the service that it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from diptych.client.errors import RequestError
from diptych.client.sync import Client
from diptych.v1 import executor_pb2, preprocess_pb2

PREPROCESS: Final[str] = preprocess_pb2.DESCRIPTOR.services_by_name["PreprocessService"].full_name
EXECUTOR: Final[str] = executor_pb2.DESCRIPTOR.services_by_name["ExecutorService"].full_name
_PATIENCE: Final = 5.0
"""Seconds that finding out may take, once something has gone wrong already."""


def find_service(client: Client) -> tuple[str, str] | None:
    """(name, state) of the one of our services that is there; RequestError if it has no health to ask."""
    for name in (PREPROCESS, EXECUTOR):
        try:
            return name, client.health(name)
        except RequestError as error:
            if error.code != "NOT_FOUND":
                raise
    return None


@contextlib.contextmanager
def preprocess_client(address: str) -> Iterator[Client]:
    """A client of a preprocess service; if another server is there, the RequestError says which."""
    try:
        with Client(address) as client:
            yield client
    except RequestError as error:
        if error.code != "UNIMPLEMENTED" or error.details:  # what is not served yet has details
            raise
        raise RequestError(error.code, _mistake(address, error.message), {"address": address}) from None


def _mistake(address: str, message: str) -> str:
    with Client(address, _PATIENCE) as client:
        try:
            found = find_service(client)
        except RequestError:
            found = None
    if found is None:
        return (
            f"what listens on {address} is no preprocess service ({message}): give the address that `diptych serve` or "
            "`diptych preprocess` says it listens on, port 50051 by default"
        )
    if found[0] == EXECUTOR:
        return (
            f"{address} is an executor, which takes no prompts: give the address of a preprocess service; "
            f"`diptych preprocess --model DIR --executor {address}` runs one in front of it"
        )
    return f"the preprocess service on {address} is of another version and does not have this method ({message})"

"""Messages to the engine process, sent from the event loop as far as the pipe takes them, and the rest when it does.

A thread that writes costs its wake-up, in the middle of a request's way to the engine.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import struct
from multiprocessing.connection import Connection

from executor_service.engine.messages import ToEngine


class EngineOutbox:
    """Writes what `multiprocessing.connection.Connection.recv` reads at the other end: length, then pickle.

    To be made and used in the event loop; `connection` is one end of a duplex `Pipe` and stays the owner's.
    """

    def __init__(self, connection: Connection) -> None:
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._unsent = bytearray()

    @property
    def num_unsent_bytes(self) -> int:
        """Bytes that the pipe has not taken yet."""
        return len(self._unsent)

    def send(self, message: ToEngine) -> None:
        """Never blocks. A pipe whose other end is closed takes nothing: its reader is the one who notices."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        was_empty = not self._unsent
        self._unsent += struct.pack("!i", len(data)) + data
        if was_empty and not self._flush():
            asyncio.get_running_loop().add_writer(self._socket.fileno(), self._go_on)

    def close(self) -> None:
        """Drop what is unsent."""
        if self._unsent:
            asyncio.get_running_loop().remove_writer(self._socket.fileno())
            self._unsent.clear()
        self._socket.close()

    def _go_on(self) -> None:
        if self._flush():
            asyncio.get_running_loop().remove_writer(self._socket.fileno())

    def _flush(self) -> bool:
        """Whether nothing is left to send."""
        try:
            # The flag is the call's: the connection, which shares the pipe's end, may go on waiting when it reads.
            num_sent = self._socket.send(self._unsent, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            num_sent = len(self._unsent)
        del self._unsent[:num_sent]
        return not self._unsent

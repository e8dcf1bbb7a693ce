"""The engine process: boots the engine and runs it until told to stop.

Started by the front as `python -m executor_service.engine.process CONNECTION_FD ARENA_FD ARENA_BYTES`.
It ends by itself when the front is gone.

Importing torch and transformers takes longer than all that the boot does itself. So this module imports neither, and
what needs neither begins beside it: a GPU's context and the kernels' machine code, then the way of the weights to it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import mmap
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Final, NoReturn

from executor_service.engine.messages import BootFailed, EngineConfig, EngineFailed
from executor_service.engine.stages import Stages
from executor_service.imports import compiled_anew, lean_imports
from registry.errors import CheckpointError

if TYPE_CHECKING:
    from executor_service.engine.boot import BootedEngine

MAX_REASON: Final = 200
"""Characters of an error that are told beyond the log."""
ON_PURPOSE: Final = (TypeError, ImportError, RuntimeError)
"""What the boot raises where a class, a package or a GPU is not what it takes, besides error types of our own."""
OUR_PACKAGES: Final = ("registry.", "executor_service.")
SWITCH_SECONDS: Final = 0.0005
"""How long a thread may wait for the one that imports: readers of weights ask for the interpreter often and briefly."""


def main(argv: list[str]) -> int:
    """Boot and run; 0 after a Shutdown or when the front has gone. It ends the process if it fails, having said why."""
    connection_fd, arena_fd, arena_bytes = (int(argument) for argument in argv)
    # Ctrl-C reaches the whole process group; the front decides when the engine stops. It had the signal blocked so far.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    faulthandler.register(signal.SIGUSR1)  # shows where all threads are
    connection = Connection(connection_fd)
    arena = memoryview(mmap.mmap(arena_fd, arena_bytes))
    os.close(arena_fd)
    try:
        booted = _boot(connection.recv(), connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the front has gone
    except Exception as error:  # left alone, one would wait for threads that read weights, for ever
        traceback.print_exc(file=sys.stderr)
        _end(connection, BootFailed(_boot_error(error)))
    from executor_service.engine.loop import EngineLoop

    # What the boot has made lives as long as the process: to look through it for garbage would stop steps for long.
    gc.collect()
    gc.freeze()
    connection.send(booted.report)
    try:
        EngineLoop(connection, arena, booted).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the front has gone
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        reason = str(error).partition("\n")[0][:MAX_REASON]
        _end(connection, EngineFailed(f"{type(error).__name__}: {reason}"))
    return 0


def _boot(config: EngineConfig, connection: Connection) -> BootedEngine:
    stages = Stages(connection.send, config.began)
    with stages.stage("start_process"):
        pass  # it has begun, and gets here
    with stages.stage("import_modules") as stage:
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.disable()  # to look through modules while they are imported takes a fifth of that time, and finds nothing
        if config.device != "cpu":
            from executor_service.kernels.cuda import ahead

            ahead.begin()
        with lean_imports():
            from executor_service.engine.configuration import pick_device
            from executor_service.models.weights import WeightReader

            device = pick_device(config.device)
            reader = None
            if device.type == "cuda":
                with contextlib.suppress(CheckpointError):  # which is told in its turn
                    reader = WeightReader(config.model_dir, device)
            from executor_service.engine.boot import boot

        gc.freeze()
        gc.enable()
        stage.detail = compiled_anew("torch")
    booted = boot(config, connection.send, stages.since, reader)
    sys.setswitchinterval(before)
    return booted


def _boot_error(error: Exception) -> str:
    """What is raised on purpose speaks for itself; of anything else the type's name is half of what it says."""
    kind = type(error)
    if kind in ON_PURPOSE or kind.__module__.startswith(OUR_PACKAGES):
        return str(error)
    return f"{kind.__name__}: {error}"


def _end(connection: Connection, last_word: BootFailed | EngineFailed) -> NoReturn:
    """Say why, and end at once: what is left of a process whose GPU has failed may wait for it for ever."""
    with contextlib.suppress(OSError):
        connection.send(last_word)
        connection.close()
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

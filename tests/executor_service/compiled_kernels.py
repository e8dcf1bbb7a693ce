"""What a kernel source says of its kernels: parameters, threads, template arguments and constants.

By the C++ preprocessor, since macros make the kernels. So a test can ask what a launch has to be, and whether there is
such a kernel at all, without a GPU and without a copy of either in the test.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from executor_service.kernels.cuda.code import SOURCES
from tests.executor_service.host_kernels import COMPILER

FLAGS: Final = ("-E", "-P", "-x", "c++", "-D__CUDA_ARCH__=900", "-D__CUDA_ARCH_FEAT_SM90_ALL")
SIZES: Final = {"float": 4, "float16": 2, "bfloat16": 2}
MOST_THREADS: Final = 1024
KERNEL: Final = re.compile(
    r'extern "C" __global__ void (?:__launch_bounds__\((?P<bounds>.*?)\) )?(?P<name>\w+)\( ?(?P<parameters>[^)]*)\) ?'
    r"\{(?P<body>.*?)\}(?= ?extern|\s*$)",
    re.DOTALL | re.MULTILINE,
)
CONSTANTS: Final = re.compile(r"^(?:\[\[maybe_unused\]\] )?constexpr int (.*?);", re.MULTILINE)


@dataclass(frozen=True)
class Parameter:
    """Of a kernel: `float16*` and `x`, say; without `const`."""

    type: str
    name: str


@dataclass(frozen=True)
class Compiled:
    """A kernel that Python can look up."""

    source: str
    name: str
    parameters: tuple[Parameter, ...]
    max_threads: int
    """Of a block, as the kernel is compiled."""
    template: tuple[Any, ...]
    """What its macro gives the function that does the work: `("float16", 8, 4)`, say; true is 1."""


@cache
def constants(source: str) -> dict[str, int]:
    """Those of the source and its headers that do not depend on a template."""
    values: dict[str, int] = {}
    for declarations in CONSTANTS.findall(_preprocessed(source)):
        for declaration in declarations.split(", "):
            name, _, value = declaration.partition(" = ")
            with contextlib.suppress(NameError, SyntaxError):
                values.setdefault(name, eval(value.replace("/", "//"), {}, values))
    return values


@cache
def compiled(source: str) -> dict[str, Compiled]:
    """The kernels of a source by name."""
    return {kernel.name: kernel for kernel in _kernels(source)}


@cache
def _preprocessed(source: str) -> str:
    command = [str(COMPILER), *FLAGS, str(SOURCES / f"{source}.cu")]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def _kernels(source: str) -> Iterator[Compiled]:
    for found in KERNEL.finditer(_preprocessed(source)):
        bounds = found["bounds"]
        most = eval(f"({bounds},)", {}, constants(source))[0] if bounds else MOST_THREADS
        yield Compiled(
            source,
            found["name"],
            tuple(_parameter(text) for text in found["parameters"].split(",")),
            most,
            _template(found["body"]),
        )


def _parameter(text: str) -> Parameter:
    text = " ".join(word for word in text.split() if word not in ("const", "__grid_constant__"))
    type_name, _, name = text.rpartition(" ")
    return Parameter(type_name, name)


def _template(body: str) -> tuple[Any, ...]:
    body = re.sub(r"kWide<(\w+)>", lambda wide: str(16 // SIZES[wide[1]]), body)
    arguments = re.search(r"\w<([^()]*)>\s*\(", body)
    assert arguments is not None, body
    return tuple(_value(word.strip()) for word in arguments[1].split(","))


def _value(word: str) -> str | int:
    return {"true": 1, "false": 0}.get(word, int(word) if word.isdigit() else word)

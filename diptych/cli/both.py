"""The settings of both services from one command line, and each service's own command line from them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel

from diptych.cli.commands import UsageError
from diptych.service import settings as service_settings
from diptych.service.settings import ENV_PREFIX, SettingsError, flag_of, load_settings
from executor_service.settings import ExecutorSettings
from preprocess_service.settings import PreprocessSettings

LOOPBACK: Final = "127.0.0.1"
NOT_ASKED: Final = ("executor",)
"""Settings of the preprocess service that `serve` knows by itself."""


def add_arguments(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """One flag per setting of either service."""
    service_settings.add_arguments(parser, PreprocessSettings, ExecutorSettings, leave_out=(*NOT_ASKED, *leave_out))


class BothSettings:
    """What was set for each service, as text for its command line; both are validated."""

    def __init__(self, arguments: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        """`arguments` are the parsed flags; `defaults` count where nothing else sets a value."""
        given = {name: value for name, value in arguments.items() if value is not None}
        self._values = {**(defaults or {}), **_without_environment(_read_config(given.get("config"))), **given}
        self.preprocess = self._load(PreprocessSettings, executor=(f"{LOOPBACK}:1",))
        self.executor = self._load(ExecutorSettings)

    def executor_arguments(self, port: int) -> list[str]:
        """The command line of the executor, which only this machine can reach."""
        fixed = _flags_of(host=LOOPBACK, port=port, metrics_port=self._executor_metrics_port)
        return ["executor", *self._flags(ExecutorSettings, ("host", "port", "metrics_port")), *fixed]

    @property
    def _executor_metrics_port(self) -> int | None:
        """The port after the preprocess service's: the two cannot share one."""
        port: int | None = self.preprocess.metrics_port
        return port + 1 if port else port

    def preprocess_arguments(self, executor: str) -> list[str]:
        """The command line of the preprocess service."""
        settings = self.preprocess
        fixed = _flags_of(host=settings.host, port=settings.port, executor=executor)
        return ["preprocess", *self._flags(PreprocessSettings, ("host", "port", *NOT_ASKED)), *fixed]

    def _load(self, cls: Any, **fixed: Any) -> Any:
        try:
            return load_settings(cls, {**self._values, "config": None}, **fixed)
        except SettingsError as error:
            raise UsageError(str(error)) from None

    def _flags(self, cls: type[BaseModel], leave_out: tuple[str, ...]) -> list[str]:
        names = [name for name in cls.model_fields if name in self._values and name not in leave_out]
        return _flags_of(**{name: self._values[name] for name in names})


def _read_config(path: str | None) -> dict[str, Any]:
    """The file's settings; a key that neither service has is an error."""
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read --config {path}: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: a mapping of settings is expected")
    values = {str(name).replace("-", "_"): value for name, value in content.items()}
    known = PreprocessSettings.model_fields.keys() | ExecutorSettings.model_fields.keys()
    if unknown := sorted(values.keys() - known):
        raise UsageError(f"--config {path}: unknown settings: {', '.join(unknown)}")
    return values


def _without_environment(values: dict[str, Any]) -> dict[str, Any]:
    """The file gives way to the environment, which the children read themselves."""
    return {name: value for name, value in values.items() if ENV_PREFIX + name.upper() not in os.environ}


def _flags_of(**values: Any) -> list[str]:
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(flag_of(name) if value else flag_of("no_" + name))
        elif value is not None:
            flags.append(f"{flag_of(name)}={_as_text(value)}")
    return flags


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={number}" for name, number in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)

"""What the commands that run a service share: settings from flags, logs, the service's whole life."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from diptych.cli.commands import UsageError
from diptych.service.lifecycle import Service, run_service
from diptych.service.logs import set_up_logs
from diptych.service.settings import ServiceSettings, SettingsError, load_settings

SettingsT = TypeVar("SettingsT", bound=ServiceSettings)


def run_with_settings(
    arguments: argparse.Namespace, cls: type[SettingsT], make: Callable[[], Callable[[SettingsT], Service]]
) -> int:
    """Run a service with the settings of flags, environment and file.

    `make` imports and returns the service's class: only once the settings are known to be right.
    """
    settings = read_settings(cls, arguments)
    set_up_logs(settings.log_level, settings.log_format)
    service_class = make()
    return run_service(lambda: service_class(settings), settings.grace_period)


def read_settings(cls: type[SettingsT], arguments: argparse.Namespace) -> SettingsT:
    """UsageError for settings that do not validate."""
    try:
        return load_settings(cls, vars(arguments))
    except SettingsError as error:
        raise UsageError(str(error)) from None

"""Settings: a command-line flag = an environment variable (DIPTYCH_…) = a YAML key, validated once.

A flag wins over the environment, the environment over the file (`--config FILE.yaml`), the file over the
default. One pydantic class per service is the only place where a setting is declared.
"""

from __future__ import annotations

import argparse
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

if TYPE_CHECKING:  # import transformers and OpenTelemetry, for which `--help` need not wait
    from diptych.service.telemetry import TelemetryOptions
    from registry.limits import MediaLimits

ENV_PREFIX: Final = "DIPTYCH_"


def _parse_counts(value: object) -> object:
    """`image=4,video=1` -> {"image": 4, "video": 1}."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part]
    if not all(separator for _, separator, _ in pairs):
        raise ValueError(f"{value!r} is not of the form image=4,video=1")
    return {name.strip(): number for name, _, number in pairs}


def _parse_list(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Counts = Annotated[dict[str, Annotated[int, Field(ge=0)]], BeforeValidator(_parse_counts)]
"""Numbers by name, written `image=4,video=1`."""
Names = Annotated[tuple[str, ...], BeforeValidator(_parse_list)]
"""Names, written with commas."""


class ServiceSettings(BaseModel):
    """What both services have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    default_port: ClassVar[int] = 50051

    model: Path = Field(description="checkpoint directory (Hugging Face layout)")
    served_model_name: str | None = Field(None, description="name clients use; default: the directory's name")
    plugin: Names = Field((), description="modules with more model families, separated by commas")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(50051, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    limit_mm_per_prompt: Counts = Field(
        default_factory=dict, description="media items per prompt, e.g. image=4; 1 where not given"
    )
    max_image_side: int = Field(8192, ge=1, le=65535, description="longest side of an image in pixels")
    max_image_pixels: int = Field(64 * 1024 * 1024, ge=1, description="height times width of an image at most")
    max_video_frames: int = Field(32, ge=1, description="frames of a video at most, after sampling")
    max_video_pixels: int = Field(
        256 * 1024 * 1024, ge=1, description="pixels of all sampled frames of a video together at most"
    )
    max_video_seconds: float = Field(600.0, gt=0, description="duration of a video at most")
    max_audio_seconds: float = Field(300.0, gt=0, description="duration of an audio item at most")
    grace_period: float = Field(10.0, ge=0, description="seconds that running requests get when the service stops")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log shown")
    log_format: Literal["text", "json"] = Field("text", description="one line for people, or one JSON object")
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^/]+/?$")] | None = Field(
        default_factory=lambda: os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None,
        validate_default=True,
        description="collector that traces and metrics are sent to by gRPC, http://HOST:PORT; "
        "OTEL_EXPORTER_OTLP_ENDPOINT counts too",
    )
    trace_sample_ratio: float = Field(
        1.0, ge=0, le=1, description="share of the traces to record, of those that no caller has decided about"
    )
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="port of the Prometheus endpoint, on the same host; 0 picks a free one"
    )
    debug: bool = Field(False, description="serve gRPC's channelz: the state of every connection, to anyone who asks")

    @property
    def model_name(self) -> str:
        """The name clients use."""
        return self.served_model_name or self.model.resolve().name

    def telemetry(self, service_name: str) -> TelemetryOptions:
        """What the service is to show of itself."""
        from diptych.service.telemetry import TelemetryOptions

        return TelemetryOptions(service_name, self.otlp_endpoint, self.trace_sample_ratio, self.host, self.metrics_port)

    @property
    def limits(self) -> MediaLimits:
        """Limits on media, as the registry knows them."""
        from registry.limits import MediaLimits

        return MediaLimits(
            self.limit_mm_per_prompt,
            self.max_image_side,
            self.max_image_pixels,
            self.max_video_frames,
            self.max_video_pixels,
            self.max_video_seconds,
            self.max_audio_seconds,
        )


SettingsT = TypeVar("SettingsT", bound=BaseModel)


class SettingsError(Exception):
    """Settings that do not validate; the message names flag, environment variable and what is allowed."""


def add_arguments(parser: argparse.ArgumentParser, *classes: type[BaseModel], leave_out: Sequence[str] = ()) -> None:
    """One flag per field, each once however many classes have it; plus --config."""
    parser.add_argument("--config", metavar="FILE.yaml", help="file with any of these settings, underscores for dashes")
    done = set(leave_out)
    for cls in classes:
        for name, info in cls.model_fields.items():
            if name not in done:
                done.add(name)
                _add_argument(parser, name, info)


def load_settings(
    cls: type[SettingsT], arguments: Mapping[str, Any], environment: Mapping[str, str] | None = None, **fixed: Any
) -> SettingsT:
    """Settings from parsed arguments, environment and file; `fixed` values win over all.

    Keys of the file that this class does not have are for the other service only if another settings
    class has them; the caller passes a file that validates for all its classes.
    """
    environment = os.environ if environment is None else environment
    values = _read_file(arguments.get("config"), cls)
    for name in cls.model_fields:
        if (text := environment.get(ENV_PREFIX + name.upper())) is not None:
            values[name] = text
        if (argument := arguments.get(name)) is not None:
            values[name] = argument
    try:
        return cls(**{**values, **fixed})
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None


def describe(settings: BaseModel) -> dict[str, object]:
    """Every setting and its value, for the log at boot."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings}


def flag_of(name: str) -> str:
    """`max_num_seqs` -> `--max-num-seqs`."""
    return "--" + name.replace("_", "-")


def _add_argument(parser: argparse.ArgumentParser, name: str, info: FieldInfo) -> None:
    text = (info.description or "").replace("%", "%%")
    default = info.get_default(call_default_factory=True)
    shown = "required" if info.is_required() else f"default: {_show(default)}"
    help_text = f"{text} ({shown}; env {ENV_PREFIX}{name.upper()})"
    kind = _plain_type(info.annotation)
    if kind is bool:
        parser.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, default=None, help=help_text)
    else:
        choices = get_args(kind) if get_origin(kind) is Literal else None
        metavar = None if choices else name.rsplit("_", 1)[-1].upper()
        parser.add_argument(flag_of(name), choices=choices, metavar=metavar, default=None, help=help_text)


def _plain_type(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(inner for inner in get_args(annotation) if inner is not type(None))
    return annotation


def _show(default: object) -> str:
    if default in (None, (), {}):
        return "none"
    return str(default)


def _read_file(path: str | None, cls: type[BaseModel]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"cannot read --config {path}: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: a mapping of settings is expected")
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def _explain(error: ValidationError) -> str:
    lines = []
    for entry in error.errors():
        name = str(entry["loc"][0]) if entry["loc"] else "settings"
        what = "is required" if entry["type"] == "missing" else f"{entry['msg'].lower()} (got {entry['input']!r})"
        lines.append(f"{flag_of(name)} (env {ENV_PREFIX}{name.upper()}): {what}")
    return "; ".join(lines)


__all__ = ["ByteSize", "Counts", "Names", "ServiceSettings", "SettingsError", "add_arguments", "load_settings"]

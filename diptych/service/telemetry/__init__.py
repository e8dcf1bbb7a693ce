"""What a service shows of itself: traces, metrics, and the trace ids of its log lines.

The only room that knows OpenTelemetry. `Telemetry` is one service's; `stage` is all that the code on a request's
path needs.
"""

from diptych.service.telemetry.options import TelemetryOptions
from diptych.service.telemetry.request_span import RequestSpan
from diptych.service.telemetry.service import Telemetry
from diptych.service.telemetry.tracing import annotate, note_error, stage, trace_fields

__all__ = ["RequestSpan", "Telemetry", "TelemetryOptions", "annotate", "note_error", "stage", "trace_fields"]

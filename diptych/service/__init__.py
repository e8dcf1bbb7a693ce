"""The frame both services stand in: errors, interceptor, settings, lifecycle, logs, telemetry."""

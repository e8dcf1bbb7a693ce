"""How clients connect; the numbers match the servers' (`diptych.service.lifecycle`)."""

from __future__ import annotations

from typing import Final

from grpc.experimental import ChannelOptions

CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
# Whoever waits for an answer reads it himself; a thread of grpc's that hands it on costs a fraction of a millisecond.
SYNC_CHANNEL_OPTIONS: Final = (*CHANNEL_OPTIONS, (ChannelOptions.SingleThreadedUnaryStream, 1))

"""What both Diptych services and their clients share: contract, wire format, service frame, client, commands."""

__version__ = "0.1.0"

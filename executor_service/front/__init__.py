"""The front process: admission, credit and reassembly, between gRPC streams and the engine. No torch here."""

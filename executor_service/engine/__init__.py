"""The engine: one thread, the device, no grpc. Other packages know it through `engine.messages` only."""

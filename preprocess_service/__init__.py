"""The CPU service: turns a multimodal request into tensors and tokens."""

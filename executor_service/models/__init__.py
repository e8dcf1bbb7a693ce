"""Executor models: what runs a family's encoder and language model on this side."""

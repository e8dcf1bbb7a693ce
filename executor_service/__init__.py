"""The executor service: tensors and token ids in, token ids out."""

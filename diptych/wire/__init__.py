"""Between Python values and the contract's messages: dtypes, media facts, tensors, chunk framing."""

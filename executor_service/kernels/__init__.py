"""One op per file: `torch.library` schema, CPU reference, fake implementation, typed wrapper.

Kernels know raw pointers, bindings know tensors, the rest of the executor knows the wrappers. Every op
has the same contract on every device; the CPU implementation is the reference.
"""

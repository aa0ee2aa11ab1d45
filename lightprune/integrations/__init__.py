"""What touches private names of other libraries: Lightning, PyTorch, transformers, deepspeed's parameters."""

"""A quantized matrix to named tensors and back, one file a layout; and the PEFT adapter."""

"""What the quantized model does to inputs, keys and values, applied while a model is quantized."""

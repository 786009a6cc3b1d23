"""Number formats that a GGUF file stores bit by bit: k-quants and IQ4_NL."""

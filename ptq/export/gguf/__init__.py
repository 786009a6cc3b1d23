"""GGUF: results as llama.cpp reads them, without rounding again."""

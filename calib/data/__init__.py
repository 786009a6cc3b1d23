"""From a text to tokens: sources of text, sampling from a model, the draw and its fingerprint."""

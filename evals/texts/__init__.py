"""Perplexity and KL on texts: windows, scores of tokens, what is kept of the full-precision base."""

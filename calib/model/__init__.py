"""The map of a model: blocks, linears, what shares an input, experts, how a block is called."""

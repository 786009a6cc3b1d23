"""The loops over the blocks: linear by linear, and window by window."""

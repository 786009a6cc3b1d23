"""Input that cannot be used: one sentence, exit status 2 or 1, nothing written."""

"""Running a model for scores: logits, batches that fit in memory, the fingerprint of its weights."""

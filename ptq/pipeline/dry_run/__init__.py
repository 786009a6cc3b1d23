"""The forecast of a run from its first blocks (``--dry-run``)."""

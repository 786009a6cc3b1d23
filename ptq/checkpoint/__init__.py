"""The crash-safe output folder: shards, journal, resume, verification. Knows no method."""

"""Where the results of a run go: shards of finished blocks, what passes through, the report."""

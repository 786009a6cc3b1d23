"""Channel scales folded into neighbouring weights: where they can go, found by trial."""

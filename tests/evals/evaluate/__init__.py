"""`evals.evaluate` alone and against a base."""

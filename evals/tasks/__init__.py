"""Multiple-choice and word-prediction tasks: rows, prompts, requests, log-likelihoods, metrics."""

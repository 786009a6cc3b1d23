"""Number formats made for weights behind a random rotation, which look Gaussian."""

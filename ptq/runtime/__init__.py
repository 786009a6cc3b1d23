"""What runs after loading: packed linears, rounded activations, the key-value cache."""

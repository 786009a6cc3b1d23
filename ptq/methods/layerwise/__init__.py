"""Methods that quantize one linear at a time, one a file."""

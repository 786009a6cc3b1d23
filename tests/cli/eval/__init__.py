"""`ptq eval`: what it prints and writes, and what it refuses."""

"""The Hugging Face side: loading packed checkpoints through transformers."""

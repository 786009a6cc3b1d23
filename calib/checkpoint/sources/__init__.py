"""Where a model's tensors come from: a folder, a module in memory, the text model of a multimodal checkpoint."""

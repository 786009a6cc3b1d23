"""How the main job runs: the run over the blocks, its two loops (layer-wise and windowed), its events."""

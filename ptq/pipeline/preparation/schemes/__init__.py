"""What is done to every linear: its scheme, the rotation of its input, the kinds of block."""

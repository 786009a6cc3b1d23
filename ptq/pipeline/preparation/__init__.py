"""What is settled before the run: the scheme of every linear, sizes, memory and disk, what is refused."""

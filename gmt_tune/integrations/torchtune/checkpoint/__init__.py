"""A run's checkpoints: folders that are whole or absent, what is in them, and going on from them."""

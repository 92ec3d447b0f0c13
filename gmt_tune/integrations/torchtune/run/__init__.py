"""What our recipes are made of: the base recipe, and what it needs for data, gradients, logs and stopping."""

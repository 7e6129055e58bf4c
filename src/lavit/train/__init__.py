"""Training: one loop, three stages, health and checkpoints."""

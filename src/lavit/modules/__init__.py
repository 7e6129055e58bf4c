"""The boxes of the paper's figure, pure torch."""

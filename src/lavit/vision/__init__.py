"""The frozen encoder: pictures to a grid of features."""

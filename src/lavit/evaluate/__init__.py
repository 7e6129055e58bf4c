"""Evaluation: figures with count, interval, floor and ceiling."""

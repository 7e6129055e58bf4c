"""Data: sources, corpora, documents, cached features."""

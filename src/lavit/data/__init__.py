"""Data: sources, the starter set, corpora, documents, cached features."""

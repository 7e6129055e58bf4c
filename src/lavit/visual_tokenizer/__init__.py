"""Features to discrete tokens and back: selector, merger, codebook, reconstructor (Sec. 3.1)."""

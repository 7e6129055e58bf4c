"""One causal language model over words and visual tokens (Sec. 3.2)."""

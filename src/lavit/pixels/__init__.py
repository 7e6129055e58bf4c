"""Reconstructed features to pictures: the diffusion decoder (Sec. 3.1, Eq. 5)."""

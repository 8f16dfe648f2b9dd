"""Averages of the weights of any length, made after training (EDM2, Karras et al., 2024)."""

"""Weights of a checkpoint for programs without Lightning."""

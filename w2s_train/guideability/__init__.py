"""How far training is from the fixed point of its target, and which weak source would help."""

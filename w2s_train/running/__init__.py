"""What happens around a step, and keeps a run alive."""

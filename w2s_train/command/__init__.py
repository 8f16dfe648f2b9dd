"""What the ``lightning`` command does."""

"""``lightning tune``: which guidance at sampling, how strong and where, for one checkpoint."""

"""``lightning compare``: runs against a baseline, from what their folders say; no torch."""

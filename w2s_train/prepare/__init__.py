"""Images to shards (``data/prepare.py``), and these to latents (``data/encode_latents.py``)."""

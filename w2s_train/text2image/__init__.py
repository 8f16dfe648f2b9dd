"""Text-to-image models that others have trained: guidance, images, scores."""

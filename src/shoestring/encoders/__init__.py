"""Encoders: pictures to latents and back, captions to token embeddings."""

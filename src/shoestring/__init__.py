"""shoestring: train image diffusion models from scratch on a shoestring."""

__version__ = "0.1.0"

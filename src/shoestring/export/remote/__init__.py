"""Code that goes into exported folders as it is: it reads torch, diffusers, transformers and numpy only."""

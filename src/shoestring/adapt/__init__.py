"""What comes after pre-training."""

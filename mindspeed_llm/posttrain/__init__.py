"""What a post-training stage adds to training."""

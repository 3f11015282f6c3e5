"""What a post-training stage adds to training. SFT adds nothing: its rows bring their own labels."""

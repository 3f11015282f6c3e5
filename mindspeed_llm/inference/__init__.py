"""Generation: cache, decoding, sampling, beam search, text and chat."""

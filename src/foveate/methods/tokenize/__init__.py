"""Tokenizers: pictures to a few ids of a codebook, and back."""

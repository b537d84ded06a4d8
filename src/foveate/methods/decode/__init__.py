"""Decoding of autoregressive and masked generators in fewer passes of the model."""

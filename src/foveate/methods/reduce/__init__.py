"""Fewer tokens inside an existing model: drop, merge, exit, skip."""

"""Guiding what a model attends to or generates, without making it cheaper."""

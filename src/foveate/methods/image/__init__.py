"""Backbones and heads for pictures."""

"""Objectives, augmentation and pre-training: what a model learns from, not what it is."""

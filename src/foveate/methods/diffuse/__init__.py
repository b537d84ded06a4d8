"""Denoisers and samplers of diffusion pipelines."""

"""Resampling Forcing (arXiv 2512.15702): teacher-free training of causal video diffusion transformers on DeepSpeed."""

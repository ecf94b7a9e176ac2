"""Scaling studies of GRPO post-training, end to end, over exact and fast native kernels."""

__version__ = "0.1.0"

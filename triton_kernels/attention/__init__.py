"""Attention for Hopper GPUs, forward and backward."""

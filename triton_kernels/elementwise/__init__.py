"""Kernels over rows: norm, rotary embedding, SwiGLU, cross-entropy."""

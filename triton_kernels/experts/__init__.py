"""Grouped GEMMs in bf16 and fp8, SwiGLU, and rows brought into expert order."""

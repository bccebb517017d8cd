"""Transformer blocks in segments, stages, and the overlapped pair on two lanes.

May import: moe, gradients, and what they may.
"""

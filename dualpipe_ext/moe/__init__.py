"""MoE layers: router, experts and their moves, checkpoints.

May import: exchange, balance, and what they may.
"""

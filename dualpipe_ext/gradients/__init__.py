"""Weight gradients that wait, pieces of a model with a backward of their own, data parallelism.

May import: what ops may, and ops.
"""

"""Operators with autograd and fakes, each a Triton kernel and the same in plain torch.

May import: errors, compat, triton_kernels.
"""

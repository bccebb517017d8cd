"""Dispatch and combine: one interface, `Exchange`, and a backend a form (`backend.py`).

May import: errors, compat, triton_kernels, ops, ranks, trace.
"""

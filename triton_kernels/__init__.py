"""Triton kernels of dualpipe_ext for NVIDIA Hopper, installed as `dualpipe_ext.triton_kernels`.

Nothing here that needs Triton is imported before a kernel is needed: on the reference path the
package works without it.
"""

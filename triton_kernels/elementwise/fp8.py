"""What fp8 e4m3 rows and weights are scaled by: constants of the host and of all kernels.

No Triton in it. csrc/exchange/dispatch_unique.cu rounds by the same numbers.
"""

__all__ = ["BLOCK", "E4M3_MAX", "SMALLEST_AMAX"]

BLOCK = 128  # columns of a row, or side of a square of a weight, that share an fp32 scale
E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4  # a block of zeros still has a scale to divide by

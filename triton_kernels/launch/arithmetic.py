"""Arithmetic of the host before a launch: `triton.cdiv` and its like take 7 us a call (3.6)."""

__all__ = ["ceil_div", "power_of_two"]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << (n - 1).bit_length()

"""How far apart numbers are."""

import torch


def relative_error(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; 0 when both are zero or empty.

    `floor`: root mean square below which `expected` counts as that large.
    """
    expected = expected.detach().double()
    found = found.detach().double().to(expected.device)
    difference = (found - expected).norm().item()
    size = max(expected.norm().item(), floor * expected.numel() ** 0.5)
    if not difference:
        return 0.0
    return difference / size if size else float("inf")

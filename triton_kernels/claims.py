"""SMs that communication claims from persistent kernels which draw their tiles. No Triton in it.

Communication that comes second would wait for a GEMM's end. So its stream first writes, which takes
no SM, how many programs a kernel may have to a word in memory. Programs look at it once a tile, and
those beyond it leave (`tiles_hopper.gives_way`): a kernel that waits for SMs takes theirs.
"""

import torch

__all__ = ["claim_sms", "program_limit"]


_limits: dict[torch.device, torch.Tensor] = {}


def program_limit(device: torch.device) -> torch.Tensor:
    """Programs that a kernel may have, 0: any number. [1] int32, one a device, for good."""
    limit = _limits.get(device)
    if limit is None:
        limit = torch.zeros(1, dtype=torch.int32, device=device)
        # In a CUDA graph's making it would be the graph's, and zero in its replays only.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _limits[device] = limit
    return limit


def claim_sms(device: torch.device, limit: int) -> None:
    """From here on in the current stream's order kernels get `limit` programs, 0: any number."""
    word = program_limit(device).view(torch.uint32)
    torch.ops.symm_mem.stream_write_value32_(word, 0, limit)

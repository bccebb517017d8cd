"""SMs that communication claims from persistent kernels which draw their tiles. No Triton in it.

Communication that comes second would wait for a GEMM's end. So its stream first writes how many SMs
it wants to a word in memory, which takes no SM; programs look at it once a tile, and the first as
many leave (`tiles_hopper.gives_way`). A kernel that waits for SMs takes theirs.
"""

import torch

__all__ = ["claim_sms", "claim_word"]


_words: dict[torch.device, torch.Tensor] = {}


def claim_word(device: torch.device) -> torch.Tensor:
    """[1] int32, one a device, for good."""
    word = _words.get(device)
    if word is None:
        word = torch.zeros(1, dtype=torch.int32, device=device)
        # In a CUDA graph's making it would be the graph's, and zero in its replays only.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _words[device] = word
    return word


def claim_sms(device: torch.device, count: int) -> None:
    """From here on in the current stream's order `count` SMs are claimed, 0: none."""
    torch.ops.symm_mem.stream_write_value32_(claim_word(device).view(torch.uint32), 0, count)

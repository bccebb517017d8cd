"""Kernels that draw their tiles: what they draw from, and the SMs that communication claims from
them. No Triton in it.

Communication that comes second would wait for a GEMM's end. So its stream first writes to a word in
memory how many programs a kernel may have, which takes no SM. Programs look at it once a tile, and
those beyond it leave (`tiles_hopper.gives_way`): a kernel that waits for SMs takes theirs.

A program that left does not come back before the next kernel. There is one word a device: of two
pairs at once the first to end its communication takes back the other's claim. Only speed is at
stake.
"""

import torch

from dualpipe_ext.compat import can_write_value, current_raw_stream, write_value

from .zeros import keep_zeros

__all__ = ["can_claim", "claim_sms", "make_counters", "program_limit", "tile_counter"]

COUNTERS = 256  # made at once
_limits: dict[torch.device, torch.Tensor] = {}
_counters: dict[tuple[torch.device, int], list[torch.Tensor]] = {}  # by stream


def can_claim(device: torch.device) -> bool:
    """Whether kernels here look at the limit, as Hopper's do, and this torch can write it."""
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    return hopper and can_write_value()


def program_limit(device: torch.device) -> torch.Tensor:
    """Programs that a kernel may have, 0: any number. [1] int32, one a device, for good."""
    limit = _limits.get(device)
    if limit is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # It belongs to the graph, and is zero in its replays only.
            return torch.zeros(1, dtype=torch.int32, device=device)
        limit = _limits[device] = keep_zeros(1, torch.int32, device)
    return limit


def claim_sms(device: torch.device, limit: int) -> None:
    """From here on in the current stream's order kernels get `limit` programs, 0: any number."""
    word = program_limit(device).view(torch.uint32)
    write_value(word, limit)


def make_counters(device: torch.device) -> None:
    """Makes zeros for `tile_counter` on the current stream in advance: to clear one for every
    launch takes a launch of its own, of which a pair of two layers would have fourteen.

    Not by `tile_counter` itself, which may run in the warm-up of torch.compile's graphs: nothing
    made there may stay.
    """
    if not torch.cuda.is_current_stream_capturing():
        left = _counters.setdefault(_stream(device), [])
        if len(left) < COUNTERS:  # of 16 bytes, as aligned as any
            zeros = torch.zeros(COUNTERS, 4, dtype=torch.int32, device=device)
            left.extend(zeros.unbind())


def tile_counter(device: torch.device) -> torch.Tensor:
    """Where the programs of one launch on the current stream draw tile numbers from: int32 zero.

    A graph clears its own at every replay.
    """
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        left = _counters.get(_stream(device))
        if left:
            return left.pop()
    return torch.zeros(1, dtype=torch.int32, device=device)


def _stream(device: torch.device) -> tuple[torch.device, int]:
    return device, current_raw_stream(device.index)

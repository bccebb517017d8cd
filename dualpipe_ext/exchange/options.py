"""What the ranks of an exchange agree on before it opens: its sizes, and the backend."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..errors import KernelCompileError
from ..ops.expert_order import ROW_ALIGNMENT
from ..ops.operator import triton_obstacle
from ..ranks.agreement import Agreement
from ..ranks.backend import choose_backend
from ..ranks.groups import host_identity
from ..ranks.peer_memory import PeerMemory
from ..triton_kernels.launch import available

__all__ = ["ExchangeOptions", "agree_on_backend"]

FORMS = ("expert", "unique")
MAX_TOPK = 32  # a route a lane of the warp that moves a token
MAX_LOCAL_EXPERTS = 512  # the plan's prefix sums stay in shared memory
OPENING = 600.0  # seconds that ranks may come late: they load weights and compile
NVLINK_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class ExchangeOptions:
    """Arguments of an Exchange that must be the same on every rank."""

    hidden: int
    num_experts: int
    topk: int
    max_tokens: int
    dtype: torch.dtype
    backend: str
    form: str
    form_is_free: bool  # the user named none
    max_rows: int | None
    timeout: float = field(compare=False)

    def check(self, world_size: int) -> None:
        """Raise what is wrong with them on their own."""
        for name in ("hidden", "num_experts", "topk", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive integer: pass 1 or more")
        if self.hidden % 8:
            raise ValueError(
                f"hidden={self.hidden} is not a multiple of 8: "
                f"pad the model width to {-(-self.hidden // 8) * 8}"
            )
        if self.num_experts % world_size:
            fitting = -(-self.num_experts // world_size) * world_size
            raise ValueError(
                f"num_experts={self.num_experts} is not divisible by the {world_size} ranks "
                f"of the group: use {fitting} experts"
            )
        if self.topk > min(self.num_experts, MAX_TOPK):
            raise ValueError(
                f"topk={self.topk} exceeds {min(self.num_experts, MAX_TOPK)} (the smaller of "
                f"num_experts={self.num_experts} and {MAX_TOPK}): lower topk"
            )
        local_experts = self.num_experts // world_size
        if local_experts > MAX_LOCAL_EXPERTS:
            raise ValueError(
                f"{local_experts} experts a rank exceed {MAX_LOCAL_EXPERTS}: "
                f"shard them over more ranks"
            )
        if not self.dtype.is_floating_point:
            raise TypeError(f"dtype={self.dtype} is not a floating-point type: use torch.bfloat16")
        if self.form not in FORMS:
            raise ValueError(f'form={self.form!r}: choose "expert" or "unique"')
        rows = self.max_rows
        if rows is not None and (not isinstance(rows, int) or rows < 1 or rows % ROW_ALIGNMENT):
            raise ValueError(
                f"max_rows={rows!r} is not a positive multiple of {ROW_ALIGNMENT}, to which every "
                f"expert's rows are padded: round it up"
            )
        if not self.timeout > 0:
            raise ValueError(
                f"timeout={self.timeout} s is not above 0: pass seconds, such as 100.0"
            )


@dataclass
class _Proposal:
    """What one rank brings to the agreement."""

    options: ExchangeOptions
    host: str
    rendezvous: int  # peer memories that it has opened with others
    backend: str = "reference"
    reason: str = ""
    obstacle: str | None = None  # to the kernels of form "unique"
    error: Exception | None = None


def agree_on_backend(
    options: ExchangeOptions, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[str, str, str]:
    """Check every rank's arguments everywhere, so that all ranks raise or none does. Collective.

    Returns:
        The backend that all ranks can run, the reason in plain words, and the form.

    Raises:
        ValueError, TypeError: an argument of some rank is wrong, or differs from rank 0's.
        KernelCompileError: backend="nvlink", and kernels do not compile on some rank.
        DualPipeError: a rank did not come.
    """
    mine = _Proposal(options, host_identity(), PeerMemory.rendezvous)
    world_size = 1 if group is None else dist.get_world_size(group)
    try:
        options.check(world_size)
        _check_device(device)
        mine.backend, mine.reason = _choose(options, device, world_size)
        mine.obstacle = _kernel_obstacle(options, mine.backend, device)
    except (TypeError, ValueError, KernelCompileError) as error:
        mine.error = error
    proposals: list[_Proposal] = Agreement(group, OPENING).gather("open the exchange", mine)
    for rank, proposal in enumerate(proposals):
        if proposal.error is not None:
            raise type(proposal.error)(f"rank {rank}: {proposal.error}")
        if proposal.options != proposals[0].options:
            raise ValueError(
                f"rank {rank} asks for {proposal.options}, but rank 0 for "
                f"{proposals[0].options}: pass the same on every rank"
            )
    hosts = {proposal.host for proposal in proposals}
    if len(hosts) > 1:
        if options.backend == "nvlink":
            raise ValueError(
                f"the group spans {len(hosts)} hosts, NVLink kernels reach one: make the group "
                'from one host\'s ranks, or use backend="reference"'
            )
        return "reference", "the group spans several hosts", options.form
    for rank, proposal in enumerate(proposals):
        if proposal.backend == "reference":
            return "reference", f"rank {rank}: {proposal.reason}", options.form
    _check_rendezvous([proposal.rendezvous for proposal in proposals])
    for rank, proposal in enumerate(proposals):
        if proposal.obstacle is not None:
            problem = f"rank {rank}: {proposal.obstacle}"
            return "nvlink", f'{mine.reason}; form "expert", since {problem}', "expert"
    return mine.backend, mine.reason, options.form


def _kernel_obstacle(options: ExchangeOptions, name: str, device: torch.device) -> str | None:
    """What keeps the compute kernels of form "unique" from running, where "expert" can replace it.

    Raises:
        KernelCompileError: kernels are missing that were asked for by backend or form.
    """
    if name != "nvlink" or device.type != "cuda":
        return None
    asked = options.backend == "nvlink"
    obstacle = available.first_failure() if asked else None
    if obstacle is None and options.form == "unique":
        obstacle = triton_obstacle(device)
    if obstacle is not None and asked:
        raise KernelCompileError(f'{obstacle}; backend="auto" runs without these kernels')
    if obstacle is not None and not options.form_is_free:
        raise KernelCompileError(f'{obstacle}; form="unique" needs Triton: pass form="expert"')
    return obstacle


def _choose(options: ExchangeOptions, device: torch.device, world_size: int) -> tuple[str, str]:
    name, reason = choose_backend(options.backend, device, world_size)
    if name == "nvlink" and options.dtype not in NVLINK_DTYPES:
        reason = f"the NVLink kernels move bfloat16 and float32 rows, not {options.dtype}"
        if options.backend == "nvlink":
            raise TypeError(f'{reason}: cast the rows, or use backend="reference"')
        return "reference", reason
    return name, reason


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ValueError(
            f"device={device} is not the current device {torch.cuda.current_device()}: "
            f"call torch.cuda.set_device({device.index}) when the process starts"
        )


def _check_rendezvous(counts: list[int]) -> None:
    """Refuse what would hang inside torch, see :class:`PeerMemory`."""
    if min(counts) != max(counts):
        raise ValueError(
            f"the ranks of this group have opened {counts} NVLink exchanges so far, and torch's "
            f"symmetric memory needs equally many on each: open the exchanges of the larger group "
            f'first, or as many in every smaller group, or use backend="reference"'
        )

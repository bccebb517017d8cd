"""How the fused operators are registered, and where they run.

An operator is a torch.library op with a fake implementation, so that torch.compile sees through it,
and has two implementations of one meaning: Triton on a GPU, plain torch anywhere.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache

import torch

__all__ = [
    "check_num_sms",
    "define",
    "device_facts",
    "has_triton",
    "sm_count",
    "use_triton",
    "wide",
]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# Library.define and impl cost about 1 us a call, torch.library.custom_op tens.
_library = torch.library.Library("dualpipe_ext", "FRAGMENT")


class Operator:
    """A registered operator, for calls from Python.

    Where nobody needs to see it as an operator (torch.compile, a dispatch mode, a tensor subclass)
    the implementation runs at once, or as an autograd.Function: torch.library's Python wrapper and
    two trips through the dispatcher cost more of the host's time than most of these kernels take.
    """

    def __init__(self, name: str, implementation: Callable) -> None:
        self._operator = getattr(torch.ops.dualpipe_ext, name)
        self._implementation = implementation
        self._function: type[torch.autograd.Function] | None = None

    def set_gradient(self, backward: Callable, setup_context: Callable) -> None:
        implementation = self._implementation

        def forward(ctx, *inputs):
            output = implementation(*inputs)
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward)}
        methods["backward"] = staticmethod(torch.autograd.function.once_differentiable(backward))
        self._function = type(self._operator.__name__, (torch.autograd.Function,), methods)

    def __call__(self, *inputs):
        if torch.compiler.is_compiling() or _is_observed(inputs):
            return self._operator(*inputs)
        if self._function is not None and torch.is_grad_enabled():
            for x in inputs:
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    return self._function.apply(*inputs)
        return self._implementation(*inputs)


def _is_observed(inputs: tuple) -> bool:
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return True
    plain = (torch.Tensor, torch.nn.Parameter)
    return any(isinstance(x, torch.Tensor) and type(x) not in plain for x in inputs)


def define(
    schema: str,
    implementation: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Operator:
    """Registers ``dualpipe_ext::<schema>`` for CPU and CUDA, with its gradient if it has one."""
    _library.define(schema)
    name = schema.partition("(")[0]
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"dualpipe_ext::{name}", fake, lib=_library)
    operator = Operator(name, implementation)
    if backward is not None:
        torch.library.register_autograd(
            f"dualpipe_ext::{name}", backward, setup_context=setup_context, lib=_library
        )
        operator.set_gradient(backward, setup_context)
    return operator


@cache
def has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        warnings.warn(
            "Triton is not installed: router, norm, rotary embedding, cross-entropy and experts, "
            "one after the other, run in plain torch. Install triton.",
            stacklevel=2,
        )
        return False
    return True


@cache
def device_facts(device: torch.device) -> tuple[int, tuple[int, int]]:
    """Number of SMs and compute capability."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)


def use_triton(*tensors: torch.Tensor | None, tma: bool = False) -> bool:
    """Whether a kernel takes these: bf16, fp16 or fp32 on a GPU (Hopper for TMA), or on the CPU
    where TRITON_INTERPRET=1 asks for Triton's interpreter."""
    tensors = tuple(tensor for tensor in tensors if tensor is not None)
    if any(tensor.dtype not in FLOATS for tensor in tensors):
        return False
    device = tensors[0].device
    if device.type == "cuda":
        return (not tma or device_facts(device)[1] >= (9, 0)) and has_triton()
    return os.environ.get("TRITON_INTERPRET") == "1" and tensors[0].dtype != torch.bfloat16


def sm_count(tensor: torch.Tensor, num_sms: int) -> int:
    """`num_sms`, or all of the device's for 0; 1 off CUDA."""
    if num_sms or not tensor.is_cuda:
        return num_sms or 1
    return device_facts(tensor.device)[0]


def check_num_sms(num_sms: int | None) -> int:
    """`num_sms` for an operator, where 0 stands for all."""
    if num_sms is not None and (not isinstance(num_sms, int) or num_sms < 1):
        raise ValueError(f"num_sms={num_sms!r}: pass an int of at least 1, or None for all SMs")
    return num_sms or 0


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are made in: fp32, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)

"""How the fused operators are registered, and where they run.

An operator is a torch.library op with a fake implementation, so that torch.compile sees through it,
and has two implementations of one meaning: Triton on a GPU, plain torch anywhere.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps

import torch
from torch.autograd import forward_ad

from .. import compat
from ..errors import KernelCompileError, MissingKernelsWarning
from ..triton_kernels.launch import available

__all__ = [
    "autocast_off",
    "check_num_sms",
    "check_tma_address",
    "define",
    "device_facts",
    "has_gluon",
    "has_triton",
    "is_observed",
    "sm_count",
    "triton_obstacle",
    "use_triton",
    "wide",
    "without_autocast",
    "without_missing_kernels",
]

_NOTHING = nullcontext()
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

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self._operator.__name__, (torch.autograd.Function,), methods)

    def __call__(self, *inputs):
        if torch.compiler.is_compiling():
            return self._operator(*inputs)
        if compat.takes_tangents():
            self._refuse_tangents(inputs)
        if is_observed(inputs):
            return self._operator(*inputs)
        if self._function is not None and torch.is_grad_enabled():
            for x in inputs:
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    return self._function.apply(*inputs)
        return self._implementation(*inputs)

    def _refuse_tangents(self, inputs: tuple) -> None:
        """Kernels would drop them without a word."""
        for x in inputs:
            if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(
                    f"{self._operator.__name__} has no forward-mode derivative: take the gradient "
                    "by backward(), or compute the tangent in plain torch"
                )


def is_observed(inputs: tuple) -> bool:
    """Whether somebody looks on: a dispatch mode, functorch, torch.jit.trace, a subclass."""
    if compat.is_traced():
        return True
    for x in inputs:  # a loop: a generator in any() takes twice its time
        kind = type(x)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            continue
        if isinstance(x, torch.Tensor):
            return True
    return False


def _once(backward: Callable, num_inputs: int) -> Callable:
    """`backward` that raises where its results are differentiated: its operators have no gradient.
    Without any gradient given, none is found.

    torch's once_differentiable does so only where the incoming gradients want one, and would let
    a penalty on a gradient pass for a constant.
    """

    @wraps(backward)
    def run(ctx, *gradients):
        if all(gradient is None for gradient in gradients):
            return (None,) * num_inputs
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            found = backward(ctx, *gradients)
        refuse = compat.raise_in_backward(
            "dualpipe_ext's operators have no second derivative: compute what is differentiated "
            "twice in plain torch",
            len(found),
        )
        return refuse(*(x if x is None else x.detach().requires_grad_() for x in found))

    return run


def _without_zeros(setup_context: Callable) -> Callable:
    """`setup_context` that has autograd pass None instead of zeros: the experts' activations, which
    an operator returns to its own backward, are the largest tensors of a layer."""

    def setup(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    return setup


def _count_writes(name: str) -> None:
    """Makes an operator raise the version of what it writes, as autograd's check of saved tensors
    needs it: a kernel writes through an address."""
    operator = getattr(torch.ops.dualpipe_ext, name).default
    _, written = compat.written_arguments(operator)
    if not written:
        return

    def count(keyset, *inputs):
        for i in written:
            if not inputs[i].is_inference():
                torch.autograd.graph.increment_version(inputs[i])
        return compat.call_below_autograd(operator, keyset, inputs)

    _library.impl(name, count, "ADInplaceOrView", with_keyset=True)


def define(
    schema: str,
    implementation: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Operator:
    """Registers ``dualpipe_ext::<schema>`` for CPU and CUDA, with its gradient if it has one.

    ``backward`` gets None for an output that nobody used or that has no gradient. It cannot be
    differentiated in turn: that raises RuntimeError.
    """
    implementation = without_missing_kernels(implementation)
    _library.define(schema)
    name = schema.partition("(")[0]
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"dualpipe_ext::{name}", fake, lib=_library)
    _count_writes(name)
    operator = Operator(name, implementation)
    if backward is not None:
        num_inputs, _ = compat.written_arguments(getattr(torch.ops.dualpipe_ext, name).default)
        backward, setup_context = _once(backward, num_inputs), _without_zeros(setup_context)
        torch.library.register_autograd(
            f"dualpipe_ext::{name}", backward, setup_context=setup_context, lib=_library
        )
        operator.set_gradient(backward, setup_context)
    return operator


def has_triton() -> bool:
    """Whether Triton kernels can run here. Warns once if it is missing, too old or unchecked."""
    return available.compiles("triton") and _fits(compat.triton_version())


def has_gluon() -> bool:
    """Whether the kernels that only Hopper GPUs run can."""
    return available.compiles("gluon") and has_triton()


@cache
def _fits(version: str | None) -> bool:
    """Whether this release of Triton, None for none, is to be tried."""
    instead = (
        ": router, norm, rotary embedding, SwiGLU, cross-entropy, attention and experts, one after "
        "the other, run in plain torch"
    )
    if version is None:
        remedy = ". Install triton."
        warnings.warn(f"Triton is not installed{instead}{remedy}", MissingKernelsWarning, 3)
        return False
    if compat.TRITON.is_too_old(version):
        compat.warn_of_unchecked(compat.TRITON, version, instead)
        return False
    compat.warn_of_unchecked(compat.TRITON, version, "; launches cost the host more")
    return True


@cache
def triton_obstacle(device: torch.device) -> str | None:
    """Why a small Triton kernel does not compile and start on a CUDA device; None if it does."""
    if not has_triton():
        return available.first_failure() or "Triton is missing or too old: install triton"
    try:
        from ..triton_kernels.elementwise.swiglu import swiglu

        with torch.cuda.device(device):
            x = torch.zeros(1, 32, device=device)
            swiglu(x, x.new_empty(1, 16), num_sms=1)
    except (KernelCompileError, ImportError) as error:
        return str(error)
    return None


def without_missing_kernels(function: Callable) -> Callable:
    """`function`, called again without the kernels that do not compile.

    So one that writes in place launches one kernel: nothing was written when that fails.
    """

    @wraps(function)
    def run(*inputs):
        while True:
            before = available.compiles("gluon"), available.compiles("triton")
            try:
                return function(*inputs)
            except (KernelCompileError, ImportError) as error:
                available.give_up(error)
                if before == (available.compiles("gluon"), available.compiles("triton")):
                    raise  # it does not ask which kernels compile, or wants them by name

    return run


@cache
def device_facts(device: torch.device) -> tuple[int, tuple[int, int]]:
    """Number of SMs and compute capability."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)


def use_triton(*tensors: torch.Tensor, tma: bool = False) -> bool:
    """Whether a kernel takes these: bf16, fp16 or fp32 on a GPU (Hopper for TMA), or on the CPU
    where TRITON_INTERPRET=1 asks for Triton's interpreter."""
    for tensor in tensors:
        if tensor.dtype not in FLOATS:
            return False
    first = tensors[0]
    if first.is_cuda:
        return (not tma or device_facts(first.device)[1] >= (9, 0)) and has_triton()
    return os.environ.get("TRITON_INTERPRET") == "1" and first.dtype != torch.bfloat16


def sm_count(tensor: torch.Tensor, num_sms: int) -> int:
    """`num_sms`, or all of the device's for 0; 1 off CUDA."""
    if num_sms or not tensor.is_cuda:
        return num_sms or 1
    return device_facts(tensor.device)[0]


def check_tma_address(**tensors: torch.Tensor) -> None:
    """ValueError for a tensor, by name, that does not start where TMA can."""
    for name, tensor in tensors.items():
        if tensor.data_ptr() % 16:
            raise ValueError(
                f"{name} starts at address {tensor.data_ptr():#x}, TMA needs a multiple of 16: "
                f"clone it, or pad what lies in front of it in its buffer"
            )


def check_num_sms(num_sms: int | None) -> int:
    """`num_sms` for an operator, where 0 stands for all."""
    if num_sms is not None and (not isinstance(num_sms, int) or num_sms < 1):
        raise ValueError(f"num_sms={num_sms!r}: pass an int of at least 1, or None for all SMs")
    return num_sms or 0


def without_autocast(function: Callable) -> Callable:
    """`function`, of a tensor and more, in the dtypes that it chose: autocast would multiply in
    bf16 what plain torch has widened to fp32."""

    @wraps(function)
    def run(x, *rest, **options):
        with autocast_off(x.device.type):
            return function(x, *rest, **options)

    return run


def autocast_off(kind: str) -> AbstractContextManager:
    """torch.autocast(kind, enabled=False), for 8 us less where it is off."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are made in: fp32, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)

"""How the fused operators are registered, and where they run.

An operator is a torch.library op with a fake implementation, so that torch.compile sees through it,
and has two implementations of one meaning: Triton on a GPU, plain torch anywhere. It is written as
one class, which `Operator` registers.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import compat
from ..errors import KernelCompileError, MissingKernelsWarning
from ..triton_kernels.launch import available

__all__ = [
    "Operator",
    "Options",
    "aligned",
    "autocast_off",
    "check_implementation",
    "check_num_sms",
    "check_tma_address",
    "device_facts",
    "has_gluon",
    "has_triton",
    "is_aligned",
    "is_capturing",
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
IMPLEMENTATIONS = ("auto", "triton", "reference")

# Library.define and impl cost about 1 us a call, torch.library.custom_op tens.
_library = torch.library.Library("dualpipe_ext", "FRAGMENT")


class Options:
    """Base of an operator's options: a frozen dataclass of scalars, which travels as one value.

    A schema has its fields, in their order, behind all other arguments.
    """

    __slots__ = ()
    __match_args__: tuple[str, ...]  # every dataclass has them

    @classmethod
    def schema(cls) -> str:
        """The fields as a schema writes them: "int num_sms, str implementation"."""
        return ", ".join(f"{field.type} {field.name}" for field in _fields(cls))

    def scalars(self) -> list:
        """The values in the schema's order, from which the class makes the options again."""
        return [getattr(self, name) for name in self.__match_args__]


def _fields(options: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(options)


class Operator:
    """``dualpipe_ext::<schema>`` for CPU and CUDA, registered, for calls from Python.

    Where nothing needs to see it as an operator (torch.compile, a dispatch mode, a tensor subclass)
    the implementation runs at once, or as an autograd.Function: torch.library's Python wrapper and
    two trips through the dispatcher cost more of the host's time than most of these kernels take.

    The functions of ``definition``, a class, are static and take the schema's arguments, but for
    the fields of ``options``, with which a schema ends: these come as one value.

        forward(*inputs)           the outputs, by kernels where they take the tensors
        plain(*inputs)             optional: the same meaning in plain torch. On fake tensors it
                                   tells torch.compile what comes out
        fake(*inputs)              instead, where plain torch reads the values of tensors or writes
                                   to them; neither is needed by a schema that ends in "-> ()"
        save(ctx, inputs, output)  with ``backward``: what that needs of a forward
        backward(ctx, *gradients)  the gradients of the first inputs, a tuple; the others have none.
                                   A gradient is None for an output that was not used or that has
                                   none. It cannot be differentiated in turn: that raises
                                   RuntimeError
    """

    def __init__(self, schema: str, definition: Any, options: type[Options] | None = None) -> None:
        self.__doc__ = definition.__doc__
        self.plain: Any = getattr(definition, "plain", None)
        self.fake: Callable = _fake_of(schema, definition)
        _library.define(schema)
        name = schema.partition("(")[0]
        self._operator = getattr(torch.ops.dualpipe_ext, name)
        self._options = options
        self._num_arguments, _ = compat.written_arguments(self._operator.default)
        self._num_inputs = self._num_arguments
        if options is not None:  # one value in the place of its scalars
            self._num_inputs += 1 - len(_fields(options))
        self._implementation = without_missing_kernels(definition.forward)
        for key in ("CPU", "CUDA"):
            _library.impl(name, self._of_scalars(self._implementation), key)
        fake = self._of_scalars(self.fake)
        torch.library.register_fake(f"dualpipe_ext::{name}", fake, lib=_library)
        _count_writes(name)
        self._function: type[torch.autograd.Function] | None = None
        if hasattr(definition, "backward"):
            self._register_gradient(name, definition)

    def _of_scalars(self, function: Callable) -> Callable:
        """`function` of a schema's arguments."""
        options, first = self._options, self._num_inputs - 1
        if options is None:
            return function

        def run(*scalars):
            return function(*scalars[:first], options(*scalars[first:]))

        return run

    def _register_gradient(self, name: str, definition: Any) -> None:
        implementation, save = self._implementation, definition.save
        options, first = self._options, self._num_inputs - 1

        # Gradients that are None instead of zeros: the experts' activations, which an operator
        # returns to its own backward, are the largest tensors of a layer.
        def forward(ctx, *inputs):
            output = implementation(*inputs)
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)
            return output

        def setup_context(ctx, inputs, output):
            if options is not None:
                inputs = (*inputs[:first], options(*inputs[first:]))
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        backward = _once(definition.backward, self._num_inputs)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(name, (torch.autograd.Function,), methods)
        torch.library.register_autograd(
            f"dualpipe_ext::{name}",
            _once(definition.backward, self._num_arguments),
            setup_context=setup_context,
            lib=_library,
        )

    def __call__(self, *inputs):
        if torch.compiler.is_compiling():
            return self.dispatch(*inputs)
        if compat.takes_tangents():
            self._refuse_tangents(inputs)
        if is_observed(inputs):
            return self.dispatch(*inputs)
        if self._function is not None and torch.is_grad_enabled():
            for x in inputs:
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    return self._function.apply(*inputs)
        return self._implementation(*inputs)

    def dispatch(self, *inputs):
        """The call through torch's dispatcher, which counts what is written in place."""
        if self._options is None:
            return self._operator(*inputs)
        return self._operator(*inputs[:-1], *inputs[-1].scalars())

    def _refuse_tangents(self, inputs: tuple) -> None:
        """Kernels would drop them without a word."""
        for x in inputs:
            if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(
                    f"{self._operator.__name__} has no forward-mode derivative: take the gradient "
                    "by backward(), or compute the tangent in plain torch"
                )


def _fake_of(schema: str, definition: Any) -> Callable:
    if hasattr(definition, "fake"):
        return definition.fake
    if schema.endswith("-> ()"):
        return _return_nothing
    if hasattr(definition, "plain"):
        return definition.plain
    raise TypeError(
        f"{definition.__name__} has outputs and neither plain nor fake: add plain, or a fake that "
        "returns empty tensors like them"
    )


def _return_nothing(*inputs) -> None:
    pass


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
    """`backward` with a gradient for each of `num_inputs`, that raises where these are
    differentiated: its operators have no gradient. Given none, it returns none.

    torch's once_differentiable does so only where the incoming gradients want one, and would let
    a penalty on a gradient pass for a constant.
    """
    none = (None,) * num_inputs

    @wraps(backward)
    def run(ctx, *d_outputs):
        for d_output in d_outputs:
            if d_output is not None:
                break
        else:
            return none
        if not torch.is_grad_enabled():
            gradients = backward(ctx, *d_outputs)
            return *gradients, *none[len(gradients) :]
        with torch.no_grad():
            gradients = backward(ctx, *d_outputs)
        gradients = *gradients, *none[len(gradients) :]
        refuse = compat.raise_in_backward(
            "dualpipe_ext's operators have no second derivative: compute what is differentiated "
            "twice in plain torch",
            num_inputs,
        )
        return refuse(*(x if x is None else x.detach().requires_grad_() for x in gradients))

    return run


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


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether it starts where TMA and 16-byte accesses can."""
    return tensor.data_ptr() % 16 == 0


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values where TMA and 16-byte accesses can start; seldom a copy."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


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


def check_implementation(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: pass one of {IMPLEMENTATIONS}")


def without_autocast(function: Callable) -> Callable:
    """`function`, of a tensor and more, in the dtypes that it chose: autocast would multiply in
    bf16 what plain torch has widened to fp32."""

    @wraps(function)
    def run(x, *rest, **options):
        with autocast_off(x.device.type):
            return function(x, *rest, **options)

    return run


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream is captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def autocast_off(kind: str) -> AbstractContextManager:
    """torch.autocast(kind, enabled=False), for 8 us less where it is off."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are made in: fp32, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32

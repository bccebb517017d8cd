"""Everything that is private to torch or moves between its releases, and which releases of torch
and Triton were checked. Triton's own names are in triton_kernels/compat.py.

All of it ran on torch 2.11; what needs no GPU also on 2.13 and 2.14. tests/test_compat.py checks
what each function here does on the torch that is installed, and that no other file uses a private
name of torch. What belongs to one class of another library stays in its file under integrations/.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DistributedDataParallel

from .errors import UncheckedVersionWarning

__all__ = [
    "TORCH",
    "TRITON",
    "CheckedReleases",
    "StorageWeakRef",
    "average_ddp_gradients",
    "begin_fsdp_step",
    "call_below_autograd",
    "call_post_accumulate_hooks",
    "can_write_value",
    "constant_in_graphs",
    "current_raw_stream",
    "default_store",
    "end_fsdp_step",
    "has_module_hooks",
    "has_tensor_hooks",
    "is_profiling",
    "is_traced",
    "is_view",
    "raise_in_backward",
    "saves_tensors_elsewhere",
    "storage_key",
    "symmetric_memory",
    "takes_tangents",
    "triton_version",
    "warn_of_unchecked",
    "write_value",
    "written_arguments",
]

Function = TypeVar("Function", bound=Callable[..., object])


# ---- Releases ----


@dataclass(frozen=True)
class CheckedReleases:
    """The oldest and the newest release of a package that this one was run with."""

    package: str
    oldest: tuple[int, int]
    newest: tuple[int, int]

    def is_too_old(self, version: str) -> bool:
        return release_of(version) < self.oldest

    def problem(self, version: str | None) -> str | None:
        """One line that says what is wrong with `version`, and the remedy; None if nothing is."""
        if version is None:
            return None
        release = release_of(version)
        oldest, newest = (".".join(map(str, x)) for x in (self.oldest, self.newest))
        remedy = f'pip install "{self.package}>={oldest},<{self.newest[0]}.{self.newest[1] + 1}"'
        if release < self.oldest:
            return (
                f"{self.package} {version} is older than {oldest}, the oldest that dualpipe_ext "
                f"was run with: {remedy}"
            )
        if release > self.newest:
            return (
                f"{self.package} {version} is newer than {newest}, the newest that dualpipe_ext "
                f"was run with: if something fails, update dualpipe_ext, or {remedy}"
            )
        return None


TORCH = CheckedReleases("torch", (2, 11), (2, 14))
TRITON = CheckedReleases("triton", (3, 6), (3, 8))


def release_of(version: str) -> tuple[int, int]:
    """(3, 8) of "3.8.0", "3.8.0+git1234", "3.8a0" and "3.8"; (3, 0) of "3"."""
    found = re.match(r"(\d+)(?:\.(\d+))?", version)
    assert found is not None
    major, minor = found.groups()
    return int(major), int(minor or 0)


@cache
def triton_version() -> str | None:
    """None without Triton."""
    try:
        import triton
    except ImportError:
        return None
    version: str = triton.__version__
    return version


def warn_of_unchecked(releases: CheckedReleases, version: str, consequence: str = "") -> None:
    """One warning where `version` was not checked; the caller sees to it that it comes once."""
    problem = releases.problem(version)
    if problem is not None:
        warnings.warn(problem + consequence, UncheckedVersionWarning, stacklevel=3)


warn_of_unchecked(TORCH, torch.__version__)


# ---- What is going on around a call ----


def is_traced() -> bool:
    """Whether a dispatch mode, functorch or torch.jit.trace looks on."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return True
    return torch._C._get_tracing_state() is not None


def takes_tangents() -> bool:
    """Inside torch.autograd.forward_ad.dual_level."""
    return forward_ad._current_level >= 0


def is_profiling() -> bool:
    return torch.autograd._profiler_enabled()


def saves_tensors_elsewhere() -> bool:
    """Inside torch.autograd.graph.saved_tensors_hooks, such as save_on_cpu's."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def current_raw_stream(device_index: int) -> int:
    """The address of a GPU's current stream; torch.cuda.current_stream takes 3 us for it."""
    return torch._C._cuda_getCurrentRawStream(device_index)


def constant_in_graphs(function: Function) -> Function:
    """torch.compiler.assume_constant_result, which would load torch._dynamo, for a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # dynamo looks for it
    return function


# ---- Hooks and storages ----


def has_module_hooks(*modules: nn.Module) -> bool:
    """Whether any hook runs in a call of one of these modules or in its backward."""
    if _has_any_global_hook():
        return True
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            return True
        if module._backward_hooks or module._backward_pre_hooks:
            return True
    return False


def has_tensor_hooks(tensor: torch.Tensor) -> bool:
    """Whether tensor.register_hook was called."""
    return bool(tensor._backward_hooks)


def call_post_accumulate_hooks(parameter: nn.Parameter) -> None:
    """Runs what register_post_accumulate_grad_hook left on a parameter."""
    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
        hook(parameter)


def storage_key(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Differs wherever two living tensors differ in storage, address or number of writes."""
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.data_ptr(), tensor._version


def is_view(tensor: torch.Tensor) -> bool:
    """Whether autograd takes it for a view of another tensor."""
    return tensor._base is not None


# ---- Operators ----


def written_arguments(operator: Any) -> tuple[int, list[int]]:
    """How many arguments an OpOverload has, and the places of those that it writes to."""
    arguments = operator._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    return len(arguments), written


def call_below_autograd(
    operator: Any, keyset: torch._C.DispatchKeySet, inputs: tuple[object, ...]
) -> Any:
    """From an implementation for the key ADInplaceOrView: what `operator` does below that key."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *inputs)


def raise_in_backward(message: str, count: int) -> Callable[..., Any]:
    """A function of `count` tensors that gives them back, and raises when differentiated."""
    return torch._C._functions.DelayedError(message.encode(), count)


# ---- Data parallelism ----


def average_ddp_gradients(ddp: DistributedDataParallel) -> None:
    """Fires DDP's hooks once: a backward that adds zeros to the gradients that are there.

    As torch.distributed.pipelining does. Parameters that DDP was told to ignore stay as they are.
    """
    ignored = getattr(ddp.module, "_ddp_params_and_buffers_to_ignore", ())
    parameters = [
        parameter
        for name, parameter in ddp.module.named_parameters()
        if parameter.requires_grad and name not in ignored
    ]
    zeros = [parameter.new_zeros(()).expand_as(parameter) for parameter in parameters]
    ddp.reducer.prepare_for_backward([])
    torch.autograd.backward(parameters, zeros)


def begin_fsdp_step(root: Any) -> None:
    """Keeps an FSDP2 module's hooks from reducing, and its parameters from being sharded again."""
    root._get_fsdp_state()._lazy_init()  # a pipeline's segments do not call the root itself
    root.set_reshard_after_forward(False)
    root.set_reshard_after_backward(False)
    root.set_requires_gradient_sync(False)
    root.set_is_last_backward(False)


def end_fsdp_step(root: Any) -> None:
    """Reduces all gradients of an FSDP2 module and shards its parameters again."""
    root.set_is_last_backward(True)
    root.set_reshard_after_backward(True)
    root.set_requires_gradient_sync(True)
    state = root._get_fsdp_state()
    for inner in state._state_ctx.all_states:
        if inner._fsdp_param_group:
            inner._fsdp_param_group.post_backward()
    state._root_post_backward_final_callback()


# ---- Between ranks ----


def default_store() -> dist.Store:
    """The store that init_process_group made."""
    return dist.distributed_c10d._get_default_store()


def symmetric_memory() -> ModuleType:
    """torch's module of that name; it loads CUDA."""
    import torch.distributed._symmetric_memory as module

    return module


def can_write_value() -> bool:
    """Whether torch can write to memory from a stream without a kernel (`write_value`)."""
    return hasattr(torch.ops.symm_mem, "stream_write_value32_")


def write_value(word: torch.Tensor, value: int) -> None:
    """The current stream writes `value` to word [1] uint32, which takes no SM."""
    torch.ops.symm_mem.stream_write_value32_.default(word, 0, value)

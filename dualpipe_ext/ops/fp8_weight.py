"""Weights as fp8 e4m3 with a scale for 128 × 128 numbers, rounded once a training step."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..compat import StorageWeakRef, storage_key
from .fp8 import BLOCK, E4M3, E4M3_MAX, SMALLEST_AMAX, runs_fp8_kernels
from .operator import is_capturing, is_observed, without_missing_kernels

__all__ = ["Fp8Weight", "forget_fp8", "fp8_weight"]


class Fp8Weight(NamedTuple):
    """A weight [L, N, K] as e4m3, in both orientations: fp8 products sum along contiguous numbers.

    Two bytes a number, as much as the weight in bf16.
    """

    q: torch.Tensor  # [L, N, K] e4m3
    transposed: torch.Tensor  # [L, K, N] e4m3
    scales: torch.Tensor  # [L, ceil(N / 128), ceil(K / 128)] fp32, of either


@dataclass
class _Kept:
    """What `fp8_weight` leaves on a weight; neither copied nor saved with it."""

    key: tuple
    storage: StorageWeakRef  # while it is held no other storage is at that address
    rounded: Fp8Weight
    stream: torch.cuda.Stream | None
    event: torch.cuda.Event | None

    def __reduce__(self):
        return OrderedDict, ()  # what torch.load(weights_only=True) takes


class _OptimizerSteps:
    """Steps of all optimizers of the process. torch's fused ones write parameters without counting
    up their version (AdamW(fused=True), torch 2.13: 0 before, 0 after)."""

    count = 0

    @classmethod
    def add(cls, *_) -> None:
        cls.count += 1


register_optimizer_step_post_hook(_OptimizerSteps.add)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
@torch.no_grad()
def fp8_weight(weight: torch.Tensor, implementation: str = "auto") -> Fp8Weight:
    """`weight` [L, N, K] rounded to fp8, made once a training step and kept on the weight.

    It is made again when the weight has been written in place (its version counter), lies elsewhere
    (its storage and address), or any `torch.optim.Optimizer` has made a step. Writing through
    `weight.data` between steps, or by a CUDA graph, shows in none of these: call `forget_fp8` after
    it.

    What is kept takes two bytes a number, freed with the weight or at the next rounding. Nothing is
    kept of a tensor made on the fly, such as a weight cast by autocast, beyond its own life: that
    is rounded in each forward. In a CUDA graph under capture weights are rounded at every replay.
    """
    if weight.is_inference() or is_capturing(weight.device) or is_observed(()):
        return _round_weight(weight, implementation)
    kept = getattr(weight, "_dualpipe_fp8", None)
    storage = weight.untyped_storage()
    shape = (weight.shape, weight.stride(), weight.dtype)
    key = (*storage_key(weight), *shape, _OptimizerSteps.count)
    if not isinstance(kept, _Kept) or kept.key != key:
        kept = None
        forget_fp8(weight)  # its memory serves the new one
        rounded, stream, event = _round_weight(weight, implementation), None, None
        if weight.is_cuda:
            stream = torch.cuda.current_stream(weight.device)
            event = stream.record_event()
        # Whole when another thread sees it.
        kept = _Kept(key, StorageWeakRef(storage), rounded, stream, event)
        weight._dualpipe_fp8 = kept  # type: ignore[attr-defined]  # ours, on torch's tensor
    elif kept.stream is not None:
        stream = torch.cuda.current_stream(weight.device)
        if stream != kept.stream:
            assert kept.event is not None
            stream.wait_event(kept.event)
            for tensor in kept.rounded:
                tensor.record_stream(stream)
    return kept.rounded


def forget_fp8(*weights: torch.Tensor) -> None:
    """Drop what `fp8_weight` keeps on these weights: the next forward rounds them anew."""
    for weight in weights:
        if getattr(weight, "_dualpipe_fp8", None) is not None:
            weight._dualpipe_fp8 = None  # type: ignore[attr-defined]  # as above


@without_missing_kernels
def _round_weight(weight: torch.Tensor, implementation: str) -> Fp8Weight:
    if runs_fp8_kernels(weight, implementation):
        from ..triton_kernels.experts.quantize import quantize_weights

        return Fp8Weight(*quantize_weights(weight))
    L, N, K = weight.shape
    squares = weight.float().view(L, N // BLOCK, BLOCK, K // BLOCK, BLOCK)
    amax = squares.abs().amax((2, 4), keepdim=True).clamp_min(SMALLEST_AMAX)
    largest = torch.full_like(amax, E4M3_MAX)  # torch multiplies by a scalar's reciprocal instead
    q = (squares * (largest / amax)).to(E4M3).view(L, N, K)
    return Fp8Weight(
        q, q.transpose(1, 2).contiguous(), (amax / largest).view(L, N // 128, K // 128)
    )

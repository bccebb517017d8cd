"""Causal self-attention for a transformer block, its projections ready for delayed gradients.

Letters: B sequences, S positions, H hidden, N heads, D width of a head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..gradients.delayed import DelayedLinear
from ..ops.attention import AttentionOptions, flash_attention, runs_as_kernels
from ..ops.heads import split_heads, tables, turn_tail
from ..ops.operator import check_num_sms
from ..ops.rotary import rotary

__all__ = ["GroupedQueryAttention", "LatentAttention"]

# Where our kernels do not run cuDNN comes first: 606 TFLOPS forward, FlashAttention-2's 330 (H200,
# B4 N32 S4096 D128).
_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


IMPLEMENTATIONS = ("auto", "sdpa", "triton")
Layer: TypeAlias = "GroupedQueryAttention | LatentAttention"


def _attend(layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention [B, N, S, D], by the implementation and on the SMs that the layer names."""
    if _uses_flash_attention(layer, query, (query.shape[-1], value.shape[-1])):
        deterministic = torch.are_deterministic_algorithms_enabled()
        return flash_attention(
            *(query, key, value),
            causal=True,
            num_sms=layer.num_sms,
            deterministic=deterministic,
        )
    shared = query.shape[1] != key.shape[1]
    with _kernels(query):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared)


def _uses_flash_attention(layer: Layer, like: Tensor, widths: tuple[int, int]) -> bool:
    choice = layer.implementation
    return choice == "triton" or (choice == "auto" and runs_as_kernels(like, widths))


def _check_implementation(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: pass one of {IMPLEMENTATIONS}")


def _kernels(x: Tensor) -> AbstractContextManager[object]:
    return sdpa_kernel(_FASTEST_FIRST, set_priority=True) if x.is_cuda else nullcontext()


class GroupedQueryAttention(nn.Module):
    """N query heads share `kv_heads` keys and values (GQA, arXiv 2305.13245); [B, S, H] → the same.

    `kv_heads` = `heads` is multi-head, 1 multi-query attention. `head_width` D defaults to H / N.
    `normalize` puts an RMSNorm on queries and keys (Qwen3). `implementation` is "sdpa" (torch's),
    "triton" (`flash_attention`, which is plain torch where its kernels do not run), or "auto": the
    kernels for bf16 and fp16 on Hopper with a `head_width` of 64 or 128, torch's for the rest.
    `num_sms` caps the SMs of `flash_attention`, a backward's as its forward's; None takes all.

    Raises ValueError where the heads do not divide, or D is odd.
    """

    query_norm: nn.RMSNorm | None
    key_norm: nn.RMSNorm | None

    def __init__(
        self,
        hidden: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_width: int | None = None,
        rope_base: float = 10_000.0,
        normalize: bool = False,
        implementation: str = "auto",
        num_sms: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if head_width is None and hidden % heads:
            raise ValueError(f"hidden={hidden} is no multiple of heads={heads}: pass head_width=")
        width = hidden // heads if head_width is None else head_width
        if heads % kv_heads:
            raise ValueError(f"heads={heads} is no multiple of kv_heads={kv_heads}: choose one")
        _check_even("head_width", width)
        _check_implementation(implementation)
        self.implementation, self.num_sms = implementation, num_sms
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width
        self.rope_base = rope_base
        like: dict[str, Any] = {"bias": False, "dtype": dtype, "device": device}
        self.qkv = DelayedLinear(hidden, (heads + 2 * kv_heads) * width, **like)
        self.out = DelayedLinear(heads * width, hidden, **like)
        self.query_norm = self.key_norm = None
        if normalize:
            self.query_norm = nn.RMSNorm(width, dtype=dtype, device=device)
            self.key_norm = nn.RMSNorm(width, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_width))  # [B, S, N + 2G, D]
        if self.query_norm is None or self.key_norm is None:
            query, key, value = split_heads(heads, self.kv_heads, base=self.rope_base)
        else:
            query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
            turns = tables(x.shape[1], self.head_width, self.rope_base, x.device)
            query = rotary(self.query_norm(query), *turns)
            key = rotary(self.key_norm(key), *turns)
        mixed = _attend(self, *(part.transpose(1, 2) for part in (query, key, value)))
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y

    def uses_flash_attention(self, x: Tensor) -> bool:
        """Whether x would be attended to by `flash_attention`, and not by torch's."""
        return _uses_flash_attention(self, x, (self.head_width, self.head_width))

    def kernel_options(self) -> AttentionOptions:
        """Of `flash_attention.forward_operator`, behind the packed sequences."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        num_sms = check_num_sms(self.num_sms)
        return AttentionOptions(True, self.head_width**-0.5, num_sms, deterministic, "auto")


class LatentAttention(nn.Module):
    """Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434); [B, S, H] → the same.

    Keys and values come out of `kv_rank` numbers a token, queries out of `query_rank` (None: out of
    H directly). Each head's query and key have `head_width` parts without position and `rope_width`
    with; the latter's key is one for all heads. Values have `value_width` parts, by default
    `head_width`. DeepSeek-V3: heads=128, query_rank=1536, kv_rank=512, and the defaults.
    `implementation` and `num_sms` as in `GroupedQueryAttention`; the kernels take queries of 192
    numbers, positions included, with values of 128, both of 128, or both of 64.
    """

    def __init__(
        self,
        hidden: int,
        *,
        heads: int,
        kv_rank: int,
        query_rank: int | None = None,
        head_width: int = 128,
        rope_width: int = 64,
        value_width: int | None = None,
        rope_base: float = 10_000.0,
        implementation: str = "auto",
        num_sms: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_even("rope_width", rope_width)
        _check_implementation(implementation)
        self.implementation, self.num_sms = implementation, num_sms
        value_width = head_width if value_width is None else value_width
        self.heads, self.kv_rank, self.rope_base = heads, kv_rank, rope_base
        self.head_width, self.rope_width, self.value_width = head_width, rope_width, value_width
        like: dict[str, Any] = {"bias": False, "dtype": dtype, "device": device}
        query_out = heads * (head_width + rope_width)
        if query_rank is None:
            self.query: nn.Module = DelayedLinear(hidden, query_out, **like)
        else:
            self.query = nn.Sequential(
                DelayedLinear(hidden, query_rank, **like),
                nn.RMSNorm(query_rank, dtype=dtype, device=device),
                DelayedLinear(query_rank, query_out, **like),
            )
        self.kv_down = DelayedLinear(hidden, kv_rank + rope_width, **like)
        self.kv_norm = nn.RMSNorm(kv_rank, dtype=dtype, device=device)
        self.kv_up = DelayedLinear(kv_rank, heads * (head_width + value_width), **like)
        self.out = DelayedLinear(heads * value_width, hidden, **like)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (self.heads, -1))  # [B, S, N, D]
        query = turn_tail(query, self.rope_width, base=self.rope_base)
        latent, key_rope = self.kv_down(x).split([self.kv_rank, self.rope_width], dim=-1)
        both = self.kv_up(self.kv_norm(latent)).unflatten(-1, (self.heads, -1))
        key, value = both.split([self.head_width, self.value_width], dim=-1)
        turns = tables(x.shape[1], self.rope_width, self.rope_base, x.device)
        key_rope = rotary(key_rope.unsqueeze(2), *turns).expand(-1, -1, self.heads, -1)
        key = torch.cat([key, key_rope], dim=-1)
        mixed = _attend(self, *(part.transpose(1, 2) for part in (query, key, value)))
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


def _check_even(name: str, width: int) -> None:
    if width < 2 or width % 2:
        raise ValueError(
            f"{name}={width} is odd or 0, rotary embedding turns pairs: pass {width + 1}"
        )

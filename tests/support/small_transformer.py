"""Small transformers for the tests of blocks, pairs and pipelines, and their inputs."""

import torch
from torch import nn

from dualpipe_ext.blocks.attention import GroupedQueryAttention, LatentAttention
from dualpipe_ext.blocks.block import TransformerBlock
from dualpipe_ext.blocks.stage import TransformerStage
from dualpipe_ext.moe.layer import MoELayer
from dualpipe_ext.moe.router import Router

HIDDEN, WORDS = 16, 11


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.words = nn.Linear(HIDDEN, WORDS)

    def forward(self, x):
        return self.words(self.norm(x))


class Dense(nn.Module):
    """A feed-forward part that knows nothing of this package."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(HIDDEN, 24)
        self.down = nn.Linear(24, HIDDEN)

    def forward(self, x):
        return self.down(self.up(x).relu())


def moe_layer(**options):
    """Routing weights and experts of order one, so that every gradient matters."""
    options = {"aux_loss_coefficient": 0.1, "init_std": 0.3, **options}
    return MoELayer(hidden=HIDDEN, expert_hidden=8, num_experts=4, topk=2, **options)


def fused_router():
    router = Router(HIDDEN, 4, 2, implementation="triton")
    router.reset_parameters(0.3)
    return router


def attention(kind="gqa"):
    if kind == "plain":  # with a `fused_router`: an `AttentionSegment`
        return GroupedQueryAttention(HIDDEN, heads=4, kv_heads=2, implementation="triton")
    if kind == "gqa":
        return GroupedQueryAttention(HIDDEN, heads=4, kv_heads=2, normalize=True)
    return LatentAttention(
        HIDDEN, heads=2, kv_rank=8, query_rank=8, head_width=4, rope_width=2, value_width=6
    )


def block(kind="gqa", feed_forward=None, recompute=(), **options):
    feed_forward = moe_layer(**options) if feed_forward is None else feed_forward
    return TransformerBlock(HIDDEN, attention(kind), feed_forward, recompute=recompute)


def stage(blocks=1, *, first=False, last=False, **options):
    """`blocks`: how many, or the list."""
    if isinstance(blocks, int):
        blocks = [block(**options) for _ in range(blocks)]
    return TransformerStage(
        blocks, first=nn.Embedding(WORDS, HIDDEN) if first else None, last=Head() if last else None
    )


def words(*shape, seed=0):
    """Token indices [*shape] int64."""
    return torch.randint(WORDS, shape, generator=torch.Generator().manual_seed(seed))


def word_loss(logits, labels):
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def gradients(module):
    """Name → gradient; zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
    }

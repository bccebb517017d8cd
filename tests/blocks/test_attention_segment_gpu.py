"""The attention segment that is written down on a GPU: its kernels are those that autograd gets."""

import copy

import pytest
import torch

from dualpipe_ext.blocks.attention import GroupedQueryAttention
from dualpipe_ext.blocks.attention_segment import AttentionSegment, fits
from dualpipe_ext.blocks.block import TransformerBlock
from dualpipe_ext.gradients.segment import Segment
from dualpipe_ext.moe.layer import MoELayer
from tests.support.compare import relative_error

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="by themselves attention and router take kernels on Hopper GPUs only",
    ),
]


@pytest.mark.parametrize(
    ("B", "S", "H", "heads", "kv_heads", "width", "router"),
    [
        (2, 513, 512, 4, 2, 128, "softmax"),
        (1, 1024, 1024, 8, 8, 64, "sigmoid"),
        (3, 40, 256, 8, 1, 64, "softmax"),
    ],
)
def test_against_autograd(B, S, H, heads, kv_heads, width, router):
    torch.manual_seed(1)
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_width": width}
    moe = MoELayer(hidden=H, expert_hidden=128, num_experts=16, topk=4, router=router, **like)
    torch.nn.init.normal_(moe.router.weight, std=H**-0.5)
    blocks = [TransformerBlock(H, GroupedQueryAttention(H, **sizes, **like), moe, **like)]
    blocks.append(copy.deepcopy(blocks[0]))
    x = torch.randn(B, S, H, **like)
    assert fits(blocks[0], x)
    given = [torch.randn(B, S, H, **like), torch.randn(B * S, H, **like)]
    given += [torch.randn(B * S, 4, device="cuda"), torch.tensor(0.7, device="cuda")]
    results = []
    for block, segment in zip(
        blocks,
        (AttentionSegment(blocks[0]), Segment(blocks[1].attend_and_route)),
        strict=True,
    ):
        outputs = segment.forward(x)
        (dx,) = segment.backward_input(*given, None, None)
        segment.backward_weight()
        found = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
        results.append((outputs, dx, found))
    (outputs, dx, found), (want, want_dx, wanted) = results
    torch.testing.assert_close(outputs[3], want[3], rtol=1e-6, atol=0)  # the balance loss
    assert all(torch.equal(outputs[i], want[i]) for i in (0, 1, 2, 4, 5))
    assert relative_error(dx, want_dx) < 5e-3  # rounded once less
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert relative_error(found[name], wanted[name]) < 5e-3, name

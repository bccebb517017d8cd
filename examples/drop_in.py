"""`python examples/drop_in.py` on one device; `torchrun --nproc-per-node 4 examples/drop_in.py`."""

import os

import torch
import torch.distributed as dist

from dualpipe_ext import MoELayer

cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
dtype = torch.bfloat16 if cuda else torch.float32
if "RANK" in os.environ:  # started by torchrun
    dist.init_process_group("nccl" if cuda else "gloo")
group = dist.group.WORLD if dist.is_initialized() else None
ranks = dist.get_world_size() if group else 1

torch.manual_seed(0)
moe = MoELayer(
    hidden=256, expert_hidden=512, num_experts=8, topk=2, group=group, device=device, dtype=dtype
)
optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-3)
for _ in range(20):
    x = torch.randn(4, 128, 256, device=device, dtype=dtype)  # [batch, sequence, hidden]
    loss = (moe(x) - x.sin()).float().square().mean() + moe.aux_loss
    loss.backward()
    for p in moe.parameters():  # experts hold the sum over all ranks already
        if group and not getattr(p, "expert_parallel", False):
            dist.all_reduce(p.grad)
        p.grad /= ranks
    optimizer.step()
    optimizer.zero_grad()
print(f"{moe.exchange.backend} backend, loss {loss.item():.3f}, {moe.tokens_per_expert.tolist()}")
moe.close()
if group:
    dist.destroy_process_group()

"""`python examples/drop_in.py` on one device; `torchrun --nproc-per-node 4 examples/drop_in.py`."""

import os

import torch
import torch.distributed as dist

from dualpipe_ext import MoELayer

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
if "RANK" in os.environ:  # started by torchrun
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
group = dist.group.WORLD if dist.is_initialized() else None

torch.manual_seed(0)  # the router must start alike on every rank
moe = MoELayer(hidden=256, expert_hidden=512, num_experts=8, topk=2, group=group, device=device)
optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-3)
for _ in range(20):
    x = torch.randn(4, 128, 256, device=device)  # [batch, sequence, hidden]
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = (moe(x) - x.sin()).square().mean() + moe.aux_loss
    loss.backward()
    for p in moe.parameters():  # experts already hold the sum over all ranks' tokens
        if group and not getattr(p, "expert_parallel", False):
            dist.all_reduce(p.grad)
    optimizer.step()
    optimizer.zero_grad()
print(f"{moe.exchange.backend} backend, loss {loss.item():.3f}, {moe.tokens_per_expert.tolist()}")
moe.close()
if group:
    dist.destroy_process_group()

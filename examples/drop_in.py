"""`torchrun --nproc-per-node 4 examples/drop_in.py`, one process a GPU, or as many without any."""

import torch
import torch.distributed as dist

from dualpipe_ext import MoELayer

dist.init_process_group()
device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = dist.init_device_mesh(device, (dist.get_world_size(),))  # each process takes its own GPU

torch.manual_seed(0)  # the router must start alike on every rank
moe = MoELayer(hidden=256, expert_hidden=512, num_experts=8, topk=2, group=mesh, device=device)
optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-3)
for _ in range(20):
    x = torch.randn(4, 128, 256, device=device)  # [batch, sequence, hidden]
    with torch.autocast(device, torch.bfloat16):
        loss = (moe(x) - x.sin()).square().mean() + moe.aux_loss
    loss.backward()
    dist.all_reduce(moe.router.weight.grad)  # the experts' is summed over all ranks' tokens already
    optimizer.step()
    optimizer.zero_grad()
print(f"{moe.exchange.backend} backend, loss {loss.item():.3f}, {moe.tokens_per_expert.tolist()}")
moe.close()
dist.destroy_process_group()

"""Experts that move over NCCL, and dispatch to their copies over NVLink."""

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext import ExpertPlacement, MoELayer
from tests.support.compare import relative_error

TOLERANCE = 5e-3  # tests/gpu/test_moe.py
SIZES = dict(hidden=512, expert_hidden=256, num_experts=16, topk=4, init_std=512**-0.5)


def place(num_slots, seed):
    generator = torch.Generator().manual_seed(seed)
    copies = torch.randint(16, (num_slots - 16,), generator=generator)
    slots = torch.cat([torch.arange(16), copies])
    return ExpertPlacement(slots[torch.randperm(num_slots, generator=generator)], 4)


def run_under_placements(rank, group, num_slots):
    """Outputs and logical gradients before a move and after each, and whether all state came."""
    torch.manual_seed(2)
    layer = MoELayer(**SIZES, num_slots=num_slots, group=group, dtype=torch.bfloat16, device="cuda")
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.0)
    x = torch.randn(300 + rank, 512, generator=torch.Generator().manual_seed(rank))
    x = x.bfloat16().cuda()

    def run():
        layer.zero_grad()
        y = layer(x)
        y.float().square().sum().backward()
        layer.sync_replica_gradients()
        squares = layer.squared_gradient_norm()
        dist.all_reduce(squares, group=group)
        gradients = [layer.to_logical(w.grad).float().cpu() for w in (layer.w13, layer.w2)]
        return [y.detach().float().cpu(), squares.cpu(), *gradients]

    def state():
        moments = [optimizer.state[w][k] for w in (layer.w13, layer.w2) for k in ("exp_avg",)]
        return [layer.full_state_dict()["w13"], *(layer.to_logical(m).clone() for m in moments)]

    runs = [run()]
    optimizer.step()
    before = state()
    for seed in range(3):
        layer.rebalance(place(num_slots, seed), optimizer=optimizer)
        for old, new in zip(before, state(), strict=True):
            assert torch.equal(old, new)
        runs.append(run())
    assert layer.exchange.backend == "nvlink"
    torch.cuda.set_sync_debug_mode("error")  # the host must not wait here
    try:
        topk_idx = layer.router(x).topk_idx
        layer.record_load(layer.tokens_per_expert)
        layer.choose_slots(topk_idx)
        layer.sync_replica_gradients()
        layer.squared_gradient_norm()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    load = layer.expert_load()
    layer.close()
    return runs, load.cpu()


@pytest.mark.gpu_4
@pytest.mark.parametrize("num_slots", [16, 24])
def test_outputs_and_gradients_do_not_depend_on_placement(num_slots, gpu_workers_4):
    answers = gpu_workers_4.run(run_under_placements, num_slots)
    for runs, load in answers:
        assert torch.equal(load, answers[0][1])
        for run in runs[1:]:
            for found, expected in zip(run, runs[0], strict=True):
                assert relative_error(found, expected) < 2 * TOLERANCE  # both are rounded

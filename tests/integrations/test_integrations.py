"""Our pair under other pipeline runtimes: torch's ScheduleDualPipeV, and DeepSeek's calls."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules

from dualpipe_ext.blocks.pair import OverlappedPair
from dualpipe_ext.integrations.deepseek import DualPipeStage
from tests.support import small_transformer as small
from tests.support.compare import relative_error

CHUNKS, CHUNK, LENGTH = 5, 2, 4


def build_stages(num_stages):
    torch.manual_seed(5)
    return [
        small.stage(1, first=s == 0, last=s + 1 == num_stages).double() for s in range(num_stages)
    ]


def batch(chunks=CHUNKS):
    shape = (chunks * CHUNK, LENGTH)
    return small.words(*shape, seed=1), small.words(*shape, seed=2)


def sequential(stages, chunks=CHUNKS):
    stages = copy.deepcopy(stages)
    losses = []
    for y, labels in zip(*(x.split(CHUNK) for x in batch(chunks)), strict=True):
        for stage in stages:
            y = stage(y)
        loss = small.word_loss(y, labels)
        losses.append(loss.detach())
        (loss + sum(stage.aux_loss() for stage in stages)).backward()
    return losses, [small.gradients(stage) for stage in stages]


def assert_same(found, expected):
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) <= 1e-12, name


class Store:
    """As dualpipe.utils.WeightGradStore: a list of functions while enabled."""

    enabled = False

    def __init__(self):
        self.waiting = []

    def put(self, function):
        self.waiting.append(function)


def call_as_dualpipe(modules, store):
    """One rank, two stages: the calls, tensors and `.grad` reads of DeepSeek's DualPipeV."""
    words, labels = (x.split(CHUNK) for x in batch())
    losses, found = [], {}

    def start(i):
        inputs0, outputs0 = found[i] = [words[i]], [modules[0](words[i])]
        inputs1 = [y.detach().requires_grad_() for y in outputs0]
        return inputs0, outputs0, inputs1

    def backward(module, inputs, loss, outputs, gradients):
        if loss is not None:
            loss.backward()
        else:
            torch.autograd.backward(outputs, gradients)
        return [x.grad for x in inputs]

    _, outputs0, inputs1 = start(0)
    loss = small.word_loss(modules[1](*inputs1), labels[0])
    losses.append(loss)
    for i in range(1, CHUNKS):
        # F0 & B1, then F1 & B0
        hook = type(modules[0]).overlapped_forward_backward
        inputs_next = [words[i]]
        outputs_next, none = hook(modules[0], inputs_next, None, [], modules[1], losses[-1], [], [])
        assert none is None and all(y._base is None for y in outputs_next)
        gradients = [x.grad for x in inputs1]
        inputs1 = [y.detach().requires_grad_() for y in outputs_next]
        (logits,), loss = hook(
            *(modules[1], inputs1, small.word_loss, [labels[i]]),
            *(modules[0], None, outputs0, gradients),
        )
        assert logits.shape == (CHUNK, LENGTH, small.WORDS)
        losses.append(loss)
        outputs0 = outputs_next
    store.enabled = True
    gradients = backward(modules[1], inputs1, losses[-1], None, None)
    backward(modules[0], [], None, outputs0, gradients)
    store.enabled = False
    assert len(store.waiting) == 2
    assert modules[0].stage.blocks[0].feed_forward.w13.grad is not None
    for function in store.waiting:
        function()
    return [loss.detach() for loss in losses]


def test_deepseek_hook():
    stages, store = build_stages(2), Store()
    expected_losses, expected = sequential(stages)
    pair = OverlappedPair("cpu")
    losses = call_as_dualpipe([DualPipeStage(s, pair=pair, store=store) for s in stages], store)
    for loss, other in zip(losses, expected_losses, strict=True):
        assert abs(loss - other) < 1e-12
    for stage, gradients in zip(stages, expected, strict=True):
        assert_same(small.gradients(stage), gradients)


def test_hook_wants_its_own_stages():
    module = DualPipeStage(small.stage(1), store=SimpleNamespace(enabled=False))
    y = nn.Linear(3, 1)(torch.ones(3))
    with pytest.raises(ValueError, match="no AutogradStage made this tensor"):
        type(module).overlapped_forward_backward(module, [], None, [], module, y, [], [])


needs_overlap = pytest.mark.skipif(
    not hasattr(schedules, "OVERLAP_F_B"), reason="this torch has no OVERLAP_F_B action"
)


def under_torch(rank, group, chunks):
    from dualpipe_ext.integrations.torch_pipelining import PipelinedStage, overlap_pairs

    ranks = group.size()
    whole = build_stages(2 * ranks)
    mine = (rank, 2 * ranks - 1 - rank)
    pair = OverlappedPair("cpu")
    modules = [PipelinedStage(whole[stage], pair=pair) for stage in mine]
    stages = [
        PipelineStage(
            *(module, index, 2 * ranks, torch.device("cpu")),
            group=group,
            dw_builder=module.take_weights,
        )
        for module, index in zip(modules, mine, strict=True)
    ]
    schedule = schedules.ScheduleDualPipeV(
        stages, chunks, loss_fn=small.word_loss, scale_grads=False
    )
    overlap_pairs(schedule)
    if not hasattr(PipelineStage, "_warmup_forward_vote"):
        # In torch 2.11 a rank that holds neighbouring stages first sends itself a word, which gloo
        # refuses. Nothing but connections comes of it.
        for stage in stages:
            stage._get_init_p2p_neighbors_ops = list
    pairs = []
    run = pair.run
    pair.run = lambda *arguments: pairs.append(1) or run(*arguments)
    words, labels = batch(chunks)
    losses = []
    if rank == 0:
        schedule.step(words, target=labels, losses=losses)
    else:
        schedule.step()
    gradients = [
        (i, small.gradients(module.stage)) for i, module in zip(mine, modules, strict=True)
    ]
    return [loss.detach() for loss in losses], gradients, len(pairs)


@needs_overlap
def test_torch_dualpipev(gloo_workers_2):
    chunks = 6
    results = gloo_workers_2.run(under_torch, chunks)
    expected_losses, expected = sequential(build_stages(4), chunks)
    assert torch.allclose(torch.stack(results[0][0]), torch.stack(expected_losses), atol=1e-12)
    for _, stages, pairs in results:
        assert pairs >= chunks
        for i, gradients in stages:
            assert_same(gradients, expected[i])


@needs_overlap
def test_torch_dualpipev_wants_our_stages():
    from dualpipe_ext.integrations.torch_pipelining import overlap_pairs

    stage = SimpleNamespace(submod=nn.Linear(2, 2), stage_index=0)
    with pytest.raises(TypeError, match="wrap a TransformerStage"):
        overlap_pairs(SimpleNamespace(_stages=[stage]))

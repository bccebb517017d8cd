"""The router's Hopper kernels without a GPU: emulated against fp64 arithmetic."""

from functools import cache

import pytest
import torch

from tests.support import ROOT, gluon_emulator
from tests.support.block_ops_cases import drawn
from tests.support.compare import relative_error
from tests.support.gluon_values import Tensor

BF16 = torch.bfloat16


class More:
    """What these kernels ask of the emulator beyond the others."""

    @staticmethod
    def load(pointer, mask=None, other=0.0, cache_modifier=""):
        assert cache_modifier in ("", ".cg")
        return gluon_emulator.load(pointer, mask, other)

    @staticmethod
    def atomic_add(pointer, value, sem):
        """Of one number that says who is the last, or of sums in which nothing else is told."""
        if not isinstance(value, Tensor):
            assert sem == "acq_rel", "what others have written before must be seen"
            return gluon_emulator.atomic_add(pointer, value)
        assert sem == "relaxed" and pointer.offset.unique().numel() == pointer.offset.numel()
        before = pointer.memory[pointer.offset]
        pointer.memory[pointer.offset] = before + value.data
        return Tensor(before)

    @staticmethod
    def inline_asm_elementwise(asm, constraints, arguments, dtype, is_pure, pack):
        """Here a kernel has ended before the next one starts."""
        assert asm.startswith("griddepcontrol.") and not arguments and not is_pure

    @staticmethod
    def gather(x, index, axis):
        return Tensor(x.data.gather(axis, index.data.long()))

    @staticmethod
    def join(x, y):
        return Tensor(torch.stack((x.data, y.data), -1))

    @staticmethod
    def exp(x):
        return Tensor(x.data.exp())

    @staticmethod
    def min(x, axis):
        return Tensor(x.data.amin(axis))


class Kernel(gluon_emulator.Kernel):
    def __getitem__(self, grid):
        launch = super().__getitem__(grid)
        return lambda *arguments, launch_pdl=False, **constants: launch(*arguments, **constants)


def jit(function=None, **options):
    return Kernel if function is None else Kernel(function)


@cache
def emulated():
    """The modules of logits, of gradients and of the choice."""
    language = gluon_emulator._language

    def with_more():
        gl = language()
        for name, function in vars(More).items():
            if isinstance(function, staticmethod):
                setattr(gl, name, function.__func__)
        return gl

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gluon_emulator, "_language", with_more)
        patch.setattr(gluon_emulator, "jit", jit)
        names = ("routing.logits_hopper", "routing.backward_hopper", "routing.choice")
        return gluon_emulator.emulate(ROOT / "triton_kernels", *names)


def run_logits(T, H, E, groups=1, num_sms=3, dtype=torch.float32):
    x, weight = drawn(1, T, H, dtype=BF16), drawn(2, E, H, dtype=dtype)
    parts = emulated()[0].logits_hopper(x, weight, n_groups=groups, num_sms=num_sms)
    assert not parts.isnan().any()
    return parts, x.double() @ weight.double().T


def run_gradients(T, H, E, num_sms=3):
    x, weight = drawn(1, T, H, dtype=BF16), drawn(2, E, H, dtype=BF16)
    d_logits = drawn(3, T, E, dtype=BF16)
    padded = torch.zeros(T, E + -E % 8, dtype=BF16)
    padded[:, :E] = d_logits
    got = emulated()[1].gradients_hopper(padded, x, weight, num_sms=num_sms)
    d_logits = d_logits.double()
    return got, (d_logits @ weight.double(), d_logits.T @ x.double())


@pytest.mark.parametrize(
    ("T", "H", "E", "groups", "num_sms"),
    [
        (5, 8, 3, 1, 1),
        (300, 200, 64, 1, 2),
        (513, 1800, 15, 3, 5),
        (260, 136, 100, 1, 3),
        (130, 200, 256, 8, 40),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_logits(T, H, E, groups, num_sms, dtype):
    parts, want = run_logits(T, H, E, groups, num_sms, dtype)
    assert parts.shape[0] <= -(-H // 64)
    # Groups of experts stand apart, where they are no power of two.
    logits = parts.sum(0).unflatten(1, (-1, parts.shape[2] // {3: 4}.get(groups, groups)))
    assert relative_error(logits[:, :groups, : E // groups].flatten(1), want) < 1e-5
    assert not logits[:, groups:].any() and not logits[:, :, E // groups :].any()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("E", [20, 100])
def test_sums_in_memory_go_on(E, dtype, monkeypatch):
    """H is not split: what follows 28 steps is added to what they left."""
    monkeypatch.setattr(emulated()[0], "even_splits", lambda *sizes: 1)
    parts, want = run_logits(300, 57 * 64, E, dtype=dtype)
    assert len(parts) == 1 and relative_error(parts[0, :, :E], want) < 1e-5


@pytest.mark.parametrize(
    ("T", "H", "E", "num_sms"),
    [
        (5, 8, 3, 1),
        (300, 200, 64, 2),
        (70, 392, 100, 5),
        (2113, 136, 15, 40),
        (700, 1000, 128, 3),
        (700, 392, 200, 2),
    ],
)
def test_gradients(T, H, E, num_sms):
    (dx, d_weight), want = run_gradients(T, H, E, num_sms)
    assert dx.dtype == BF16 and d_weight.dtype == torch.float32
    assert relative_error(dx, want[0]) < 2e-3  # rounded to bf16
    assert relative_error(d_weight, want[1]) < 1e-6


def test_sm_count_changes_no_bit():
    results = [(run_logits(600, 136, 20, num_sms=n)[0], *run_gradients(300, 264, 20, n)[0])
               for n in (1, 2, 100)]  # fmt: skip
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_counters_are_left_as_they_were_found(monkeypatch):
    """Two launches that share them give the same results, and zeros are left."""
    gradients = emulated()[1]
    shared = torch.zeros(1024, dtype=torch.int64)
    monkeypatch.setattr(gradients, "counters", lambda like, count: shared)
    first, second = (run_gradients(300, 264, 20)[0] for _ in range(2))
    assert all(map(torch.equal, first, second)) and not shared.any()


@pytest.mark.parametrize("strips", [1, 3, 56, 130])
@pytest.mark.parametrize("steps", [1, 3, 64, 65, 2048])
def test_items_have_every_step_once(strips, steps):
    """A strip's splits follow each other, none of more than 4,096 tokens: 32 steps of 128."""
    gradients = emulated()[1]
    splits = gradients.even_splits(strips, steps, -(-steps // gradients.DEEPEST))
    items = strips * splits
    spans = {}
    for item in range(items):
        left, split, begin, end = gradients.find_span(item, (None, strips, steps, splits, items))
        assert 0 < end - begin <= 32
        spans[left // 128, split] = begin, end
    assert len(spans) == items
    for strip in range(strips):
        begins, ends = zip(*(spans[strip, split] for split in range(splits)), strict=True)
        assert (*begins, steps) == (0, *ends)


def test_two_splits_of_8192_tokens(monkeypatch):
    """56 strips of 7,168 columns, 64 steps: 112 programs of at most 128."""
    gradients, launches = emulated()[1], []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *sizes, **constants: launches.append((grid, sizes[-5:]))

    monkeypatch.setattr(gradients, "gradients_hopper_kernel", Recorded())
    x, d_logits = torch.empty(8192, 7168, dtype=BF16), torch.empty(8192, 8, dtype=BF16)
    gradients.gradients_hopper(d_logits, x, torch.empty(8, 7168, dtype=BF16), num_sms=132)
    assert launches == [((112,), (7168 // 8, 56, 64, 2, 112))]


@pytest.mark.parametrize("stride", [1, 132])
def test_one_token_of_any_stride(stride):
    """torch calls it contiguous whatever its stride is, and TMA wants multiples of 16 bytes."""
    x, weight = drawn(1, 256, dtype=BF16).as_strided((1, 128), (stride, 1)), drawn(2, 8, 128)
    assert x.is_contiguous()
    parts = emulated()[0].logits_hopper(x, weight, n_groups=1, num_sms=2)
    assert relative_error(parts.sum(0)[:, :8], x.double() @ weight.double().T) < 1e-5

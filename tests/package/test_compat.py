"""What is private to torch and Triton, or moves between their releases: each name still does what
the package needs of it, by a test of that name; and nothing else in the package uses such names.
"""

import ast
import importlib
import re
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualpipe_ext import compat, environment
from dualpipe_ext.errors import KernelCompileError, MissingKernelsWarning, UncheckedVersionWarning
from dualpipe_ext.ops import operator as operators
from dualpipe_ext.triton_kernels.launch import available
from tests.support import ROOT

FILES = {*ROOT.glob("dualpipe_ext/**/*.py"), *ROOT.glob("triton_kernels/**/*.py")}
# integrations/: what belongs to one class of another library stays in its file.
PACKAGE = sorted(FILES - {*ROOT.glob("dualpipe_ext/integrations/*.py")})
MOVING = ("triton.runtime", "triton.backends", "triton.compiler", "triton.knobs", "triton.tools")


# ---- Nothing else uses private names ----


def own_names() -> set[str]:
    """Private names that the package itself defines."""
    found = set()
    for file in PACKAGE:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found | {"_C"}


def private_uses(source: str, own: set[str]) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
            text = ast.unparse(node)
            private = node.attr.startswith("_") and node.attr not in own
            if private or text.startswith("torch._"):
                found.append(text)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and node.level:
                continue
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            for name in names:
                top, *rest = name.split(".")
                private = any(part.startswith("_") for part in rest) and "__" not in name
                if top in ("torch", "triton") and (private or name.startswith(MOVING)):
                    found.append(name)
    return found


@pytest.mark.parametrize("file", PACKAGE, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_private_names_are_in_compat_only(file):
    if file.name != "compat.py":
        assert private_uses(file.read_text(), own_names()) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._dispatch()",
        "from torch.nn.modules.module import _has_any_global_hook",
        "import torch.distributed._symmetric_memory as memory",
        "from triton.runtime.jit import JITFunction",
        "from triton import knobs\ntensor._gone_tomorrow",
    ],
)
def test_a_private_name_would_be_seen(line):
    assert private_uses(line, own_names())


# ---- torch ----


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


def test_is_traced():
    assert not compat.is_traced()
    with Mode():
        assert compat.is_traced()
    seen = []
    torch.func.vmap(lambda x: seen.append(compat.is_traced()) or x)(torch.zeros(2))
    torch.jit.trace(lambda x: seen.append(compat.is_traced()) or x + 1, torch.zeros(2))
    assert seen[:2] == [True, True] and not compat.is_traced()  # trace then runs it once more


def test_takes_tangents():
    assert not compat.takes_tangents()
    with torch.autograd.forward_ad.dual_level():
        assert compat.takes_tangents()


def test_is_profiling():
    assert not compat.is_profiling()
    with torch.profiler.profile():
        assert compat.is_profiling()


def test_saves_tensors_elsewhere():
    assert not compat.saves_tensors_elsewhere()
    with torch.autograd.graph.save_on_cpu():
        assert compat.saves_tensors_elsewhere()


@pytest.mark.parametrize(
    "register",
    ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"],
)
def test_has_module_hooks(register):
    plain, hooked = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    assert not compat.has_module_hooks(plain, hooked)
    getattr(hooked, f"register_{register}")(lambda *arguments: None)
    assert compat.has_module_hooks(plain, hooked)


def test_has_module_hooks_of_all_modules():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    try:
        assert compat.has_module_hooks()
    finally:
        handle.remove()
    assert not compat.has_module_hooks()


def test_hooks_of_tensors():
    x = torch.nn.Parameter(torch.zeros(2))
    assert not compat.has_tensor_hooks(x)
    compat.call_post_accumulate_hooks(x)
    seen = []
    x.register_post_accumulate_grad_hook(seen.append)
    compat.call_post_accumulate_hooks(x)
    assert len(seen) == 1 and seen[0] is x
    x.register_hook(lambda gradient: None)
    assert compat.has_tensor_hooks(x)


def test_storage_key():
    x = torch.zeros(4)
    key = compat.storage_key(x)
    assert compat.storage_key(x.view(2, 2)) == key
    assert compat.storage_key(x[1:]) != key != compat.storage_key(torch.zeros(4))
    x.add_(1)
    assert compat.storage_key(x) != key
    held = compat.StorageWeakRef(x.untyped_storage())
    assert not held.expired()
    del x
    assert held.expired()


def test_is_view():
    x = torch.zeros(4, requires_grad=True)
    assert compat.is_view(x[1:]) and not compat.is_view(x) and not compat.is_view(x + 1)


def test_default_store(tmp_path):
    code = (
        "import torch.distributed as dist; from dualpipe_ext import compat;"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=0,"
        "world_size=1); compat.default_store().set('a', 'b');"
        "assert compat.default_store().get('a') == b'b'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_written_arguments():
    assert compat.written_arguments(torch.ops.aten.add_.Tensor) == (3, [0])
    assert compat.written_arguments(torch.ops.aten.add.Tensor) == (3, [])


def test_call_below_autograd():
    library = torch.library.Library("dualpipe_ext_test", "FRAGMENT")
    library.define("clear_(Tensor(a!) x) -> ()")
    library.impl("clear_", lambda x: None, "CPU")
    operator, seen = torch.ops.dualpipe_ext_test.clear_.default, []

    def count(keyset, *inputs):
        seen.append(keyset)
        return compat.call_below_autograd(operator, keyset, inputs)

    library.impl("clear_", count, "ADInplaceOrView", with_keyset=True)
    x = torch.ones(2)
    operator(x)
    assert len(seen) == 1 and "ADInplaceOrView" in str(seen[0])


def test_raise_in_backward():
    refuse = compat.raise_in_backward("no second derivative", 1)
    x = refuse(torch.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        x.sum().backward()


@pytest.mark.gpu
def test_current_raw_stream():
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        assert compat.current_raw_stream(0) == torch.cuda.current_stream().cuda_stream


@pytest.mark.gpu
def test_write_value():
    if not compat.can_write_value():
        pytest.skip("this torch cannot")
    word = torch.zeros(1, dtype=torch.int32, device="cuda")
    compat.write_value(word.view(torch.uint32), 7)
    assert word.item() == 7


# DDP and FSDP2: tests/test_pipeline.py compares a pipeline's gradients with theirs.

# ---- Triton ----


def triton_names() -> list[str]:
    """`__all__` of the kernels' compat.py, which imports Triton."""
    for node in ast.parse((ROOT / "triton_kernels" / "launch" / "compat.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError("compat.py has no __all__")


@pytest.mark.parametrize("name", triton_names())
def test_triton_has(name):
    """What they do: the kernels that are compiled for sm_90, and test_launch.py."""
    pytest.importorskip("triton")
    from dualpipe_ext.triton_kernels.launch import compat as ours

    value = getattr(ours, name)
    assert callable(value) or name == "TRITON_VERSION"


def test_constant_in_graphs():
    calls = []

    @compat.constant_in_graphs
    def choose():
        calls.append(len(calls))
        return len(calls)

    run = torch.compile(lambda x: x + choose(), backend="eager", fullgraph=True)
    assert run(torch.zeros(1)) == run(torch.zeros(1)) == 1 and calls == [0]


# ---- Releases that were not checked ----


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("2.11.0+cu130", None),
        ("2.14.1", None),
        ("2.12.0a0+git12", None),
        ("2.10.2", 'torch 2.10.2 is older than 2.11, .*: pip install "torch>=2.11,<2.15"'),
        ("2.15.0", 'torch 2.15.0 is newer than 2.14, .* or pip install "torch>=2.11,<2.15"'),
        ("3", "torch 3 is newer than 2.14"),
        (None, None),
    ],
)
def test_releases(version, problem):
    releases = compat.CheckedReleases("torch", (2, 11), (2, 14))
    if problem is None:
        assert releases.problem(version) is None
    else:
        assert re.match(problem, releases.problem(version))
        assert "\n" not in releases.problem(version)


def test_what_is_installed_was_checked():
    assert compat.TORCH.problem(torch.__version__) is None
    assert compat.TRITON.problem(compat.triton_version()) is None


def test_importing_beside_another_torch_says_so():
    code = "import torch; torch.__version__ = '2.99.0'; import dualpipe_ext; dualpipe_ext.MoELayer"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line for line in child.stderr.splitlines() if "UncheckedVersionWarning" in line]
    assert len(lines) == 1 and "torch 2.99.0 is newer than" in lines[0], child.stderr


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has used no kernel yet."""
    monkeypatch.setattr(available, "_reasons", {})
    monkeypatch.setattr(available, "_required_by", weakref.WeakSet())
    caches = (operators._fits, operators.triton_obstacle)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("version", "warning", "runs"),
    [
        (None, (MissingKernelsWarning, "Triton is not installed: .*Install triton"), False),
        ("3.5.1", (UncheckedVersionWarning, "triton 3.5.1 is older .*plain torch"), False),
        ("3.99.0", (UncheckedVersionWarning, "triton 3.99.0 is newer .*cost the host more"), True),
    ],
)
def test_first_use_of_another_triton(fresh, version, warning, runs):
    fresh.setattr(compat, "triton_version", lambda: version)
    with pytest.warns(warning[0], match=warning[1]) as seen:
        assert operators.has_triton() == operators.has_gluon() == runs
        assert operators.has_triton() == runs
    assert len(seen) == 1


def test_info_says_so(fresh):
    fresh.setattr(environment, "triton_version", lambda: "3.99.0")
    found = environment.describe_environment()
    (line,) = found["unchecked"]
    assert f"unchecked     {line}" in environment.format_environment(found).splitlines()


# ---- Kernels that do not compile ----


def kernels_of(fail: list[str]):
    """An operator of two families of kernels and plain torch; those in `fail` do not compile."""

    def implementation(x):
        for family, has in (("gluon", operators.has_gluon), ("triton", operators.has_triton)):
            if has():
                if family in fail:
                    raise KernelCompileError(f"kernel {family}: no", is_gluon=family == "gluon")
                return family
        return "torch"

    return operators.without_missing_kernels(implementation)


@pytest.mark.parametrize(
    ("fail", "runs"),
    [([], "gluon"), (["gluon"], "triton"), (["triton"], "gluon"), (["gluon", "triton"], "torch")],
)
def test_what_runs_where_kernels_do_not_compile(fresh, fail, runs):
    fresh.setattr(compat, "triton_version", lambda: "3.8.0")
    run = kernels_of(fail)
    if runs == "gluon":
        assert run(torch.zeros(1)) == runs
        return
    with pytest.warns(MissingKernelsWarning, match=r"kernel \w+: no.* replaced by") as seen:
        assert run(torch.zeros(1)) == runs
        assert run(torch.zeros(1)) == runs
    assert len(seen) == len(fail)


def test_kernels_that_were_asked_for_raise(fresh):
    fresh.setattr(compat, "triton_version", lambda: "3.8.0")

    class Exchange:
        pass

    exchange = Exchange()
    available.require(exchange)
    run = kernels_of(["gluon"])
    with pytest.raises(KernelCompileError, match="kernel gluon: no"):
        run(torch.zeros(1))
    del exchange
    with pytest.warns(MissingKernelsWarning):
        assert run(torch.zeros(1)) == "triton"


def test_an_error_that_is_not_the_compilers_goes_through(fresh):
    def implementation(x):
        raise ValueError("too wide")

    with pytest.raises(ValueError, match="too wide"):
        operators.without_missing_kernels(implementation)(torch.zeros(1))
    assert available.compiles("gluon")


def test_a_name_that_triton_lost_is_an_import_error(fresh):
    fresh.setattr(compat, "triton_version", lambda: "3.8.0")

    def implementation(x):
        if operators.has_triton():
            raise ImportError("Triton 3.99: triton.experimental.gluon has none of ('barrier',)")
        return "torch"

    with pytest.warns(
        MissingKernelsWarning, match=r"none of \('barrier',\).*replaced by plain torch"
    ):
        assert operators.without_missing_kernels(implementation)(torch.zeros(1)) == "torch"


def test_one_that_wants_its_kernels_by_name_raises(fresh):
    calls = []

    def implementation(x):
        calls.append(x)
        raise KernelCompileError("kernel named: no", is_gluon=True)

    with pytest.warns(MissingKernelsWarning), pytest.raises(KernelCompileError, match="named"):
        operators.without_missing_kernels(implementation)(torch.zeros(1))
    assert len(calls) == 2


def test_operators_that_write_in_place_launch_one_kernel():
    """So that none is half done when a kernel does not compile."""
    for module in ("ops.cross_entropy", "ops.grouped_fp8", "blocks.pair"):
        importlib.import_module(f"dualpipe_ext.{module}")
    names = torch._C._dispatch_get_all_op_names()
    names = {name.partition("::")[2] for name in names if name.startswith("dualpipe_ext::")}
    operators = (getattr(torch.ops.dualpipe_ext, name).default for name in names)
    writing = {x.name().partition("::")[2] for x in operators if compat.written_arguments(x)[1]}
    assert writing == {"rotary_", "cross_entropy_", "scale_rows_", "grouped_wgrad_"}, (
        "look whether it launches one kernel, then add it here"
    )


@pytest.mark.parametrize(
    ("error", "is_compilers"),
    [
        (AttributeError("module has no attribute 'thread_barrier'"), True),
        (RuntimeError("PassManager::run failed"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access"), False),
        (KeyError("Keyword argument FOO was specified but unrecognised"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_a_compile_error_is(error, is_compilers):
    pytest.importorskip("triton")
    from dualpipe_ext.triton_kernels.launch.compat import is_compile_error

    assert is_compile_error(error) == is_compilers


def agree(rank, group, broken_rank, backend, form):
    """What an exchange on GPUs would say if Triton compiled nothing on one rank."""
    from dualpipe_ext.exchange import options as agreement

    options = agreement.ExchangeOptions(
        hidden=8, num_experts=4, topk=1, max_tokens=4, dtype=torch.bfloat16, backend=backend,
        form=form or "unique", form_is_free=form is None, max_rows=None, timeout=1.0,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "choose_backend", lambda *arguments: ("nvlink", "pretended"))
        patch.setattr(agreement, "_check_device", lambda device: None)
        obstacle = "kernel x: no" if rank == broken_rank else None
        patch.setattr(agreement, "triton_obstacle", lambda device: obstacle)
        try:
            return agreement.agree_on_backend(options, group, torch.device("cuda", 0))
        except KernelCompileError as error:
            return str(error)


def test_ranks_agree_where_one_compiles_nothing(gloo_workers_2):
    for answer in gloo_workers_2.run(agree, None, "auto", None):
        assert answer == ("nvlink", "pretended", "unique")
    for answer in gloo_workers_2.run(agree, 1, "auto", None):
        assert answer[::2] == ("nvlink", "expert") and "rank 1: kernel x: no" in answer[1]
    for backend, form in (("nvlink", None), ("auto", "unique")):
        for answer in gloo_workers_2.run(agree, 1, backend, form):
            assert answer.startswith("rank 1: kernel x: no"), answer


def train(layer, x):
    """y and all gradients of one step."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    torch.autograd.backward([y, layer.aux_loss], [x.sin(), None])
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.gpu
@pytest.mark.parametrize("only_gluon", [True, False])
def test_a_layer_whose_kernels_do_not_compile(fresh, only_gluon):
    from dualpipe_ext import MoELayer
    from dualpipe_ext.triton_kernels.launch import cached as launch

    sizes = dict(hidden=256, expert_hidden=256, num_experts=8, topk=2, max_tokens=300)
    options = dict(dtype=torch.bfloat16, device="cuda")
    layer = MoELayer(**sizes, **options)
    x = torch.randn(300, 256, **options)
    want = train(layer, x)
    assert layer.exchange.backend == "nvlink" and layer.exchange.form == "unique"
    state = layer.state_dict()
    call = launch._CachedLaunches.__call__

    def fail(self, *arguments, **constants):
        if self._kernel.is_gluon() or not only_gluon:
            raise launch.compile_error(self._kernel, RuntimeError("no such instruction"))
        return call(self, *arguments, **constants)

    fresh.setattr(launch._CachedLaunches, "__call__", fail)
    operators.triton_obstacle.cache_clear()
    with pytest.warns(MissingKernelsWarning, match="no such instruction"):
        other = MoELayer(**sizes, **options)
        other.load_state_dict(state)
        got = train(other, x)
    assert other.exchange.form == ("unique" if only_gluon else "expert")
    for a, b in zip(got, want, strict=True):
        assert (a.float() - b.float()).norm() < 1e-2 * b.float().norm()
    refused = MoELayer(**sizes, **options, backend="nvlink", form="expert")
    available._required_by.discard(refused)
    with pytest.raises(KernelCompileError, match='no such instruction.*backend="auto" runs'):
        train(refused, x)
    available._reasons.clear()
    strict = MoELayer(**sizes, **options, backend="nvlink", form="expert")
    with pytest.raises(KernelCompileError, match="no such instruction"):
        train(strict, x)
    other.close()
    layer.close()

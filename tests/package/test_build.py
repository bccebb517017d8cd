"""setup.py: what it built here, what it says without a compiler, what it puts into a wheel."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from dualpipe_ext.build_record import read_build_record

ROOT = Path(__file__).resolve().parents[2]
NO_TOOLS = {"PATH": "/nonexistent", "CUDA_HOME": "", "CUDA_PATH": "", "CXX": ""}


def load_setup():
    spec = importlib.util.spec_from_file_location("dualpipe_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


setup = load_setup()


@pytest.fixture(scope="module")
def record() -> dict:
    found = read_build_record()
    if not found["built"]:
        pytest.skip(f"no CUDA extension in this installation: {found['reason']}")
    return found


@pytest.fixture
def copy(tmp_path) -> Path:
    """The sources without anything built, and a setup.py that knows no standard place for CUDA."""
    for name in ("csrc", "dualpipe_ext", "triton_kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "triton_kernels")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    text = (ROOT / "setup.py").read_text()
    assert text.count('Path("/usr/local/cuda")') == 1
    text = text.replace('Path("/usr/local/cuda")', 'Path("/nonexistent/cuda")')
    (tmp_path / "setup.py").write_text(text)
    return tmp_path


def run_python(*arguments, cwd, **environment) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if key != "DUALPIPE_BUILD_CUDA"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def build_distribution(copy: Path, kind: str) -> Path:
    """`kind` is "wheel", "editable" or "sdist"; without CUDA, which takes half a second."""
    call = f"import setuptools.build_meta as b; b.build_{kind}('out')"
    done = run_python("-c", call, cwd=copy, DUALPIPE_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "out").iterdir()
    return built


def test_every_source_is_in_the_extension(record):
    sources = {path.name for path in (ROOT / "csrc").rglob("*.c[up]*") if path.suffix != ".cuh"}
    assert "bindings.cpp" in sources
    assert len(sources) > 1
    assert set(record["sources"]) == sources


def test_extension_imports_without_torch_and_exports_what_bindings_define(record):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    library = importlib.util.find_spec("dualpipe_ext._C").origin
    assert library.endswith(suffix)
    script = (
        "import sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('_C', {library!r})\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "names = set(dir(module))\n"
        "names |= {n for v in vars(module).values() if isinstance(v, type) for n in dir(v)}\n"
        "print(*names)"
    )
    done = run_python("-c", script, cwd="/")
    assert done.returncode == 0, done.stderr
    bindings = (ROOT / "csrc" / "bindings.cpp").read_text()
    defined = set(re.findall(r'\.def(?:_\w+)?\(\s*"(\w+)"', bindings))
    assert defined
    assert defined <= set(done.stdout.split())


def test_stub_of_the_extension_names_what_bindings_define():
    bindings = (ROOT / "csrc" / "bindings.cpp").read_text()
    found = re.findall(r'(?:\.def\w*|class_<\w+>)\((?:m, )?\s*"(\w+)"|m\.attr\("(\w+)"', bindings)
    stub = ast.parse((ROOT / "dualpipe_ext" / "_C.pyi").read_text())
    named = [
        node.name for node in ast.walk(stub) if isinstance(node, ast.ClassDef | ast.FunctionDef)
    ]
    named += [node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)]
    assert sorted({*named} - {"__init__"}) == sorted({a or b for a, b in found})


def test_extension_holds_code_for_every_arch_of_the_record(record):
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump on PATH, in the CUDA toolkit or in Triton")
    library = importlib.util.find_spec("dualpipe_ext._C").origin
    shown = subprocess.run([cuobjdump, library], capture_output=True, text=True, check=True).stdout
    per_file: dict[str, set[str]] = {}
    for arch, file in re.findall(r"^arch = (\w+)$.*?^identifier = (\S+)$", shown, re.M | re.S):
        per_file.setdefault(Path(file).name, set()).add(arch)
    kernels = {name for name in record["sources"] if name.endswith(".cu")}
    assert per_file == {name: set(record["archs"]) for name in kernels}


def find_cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if triton is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def test_extension_needs_no_cuda_library_at_run_time(record):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf (binutils) on PATH")
    library = importlib.util.find_spec("dualpipe_ext._C").origin
    shown = subprocess.run([readelf, "-d", library], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", shown.stdout)
    assert needed
    assert not [name for name in needed if re.match(r"lib(cuda|cudart|torch|c10)\b", name)]


def test_without_nvcc_the_build_succeeds_and_says_what_is_missing(copy):
    stale = copy / "dualpipe_ext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.touch()
    done = run_python("setup.py", "build_ext", "--inplace", cwd=copy, **NO_TOOLS)
    assert done.returncode == 0, done.stderr
    assert "WITHOUT its CUDA kernels" in done.stderr
    assert "nvcc was not found" in done.stderr
    assert "Install NVIDIA's CUDA toolkit" in done.stderr
    written = json.loads((copy / "dualpipe_ext" / "_build.json").read_text())
    assert not written["built"]
    assert "nvcc was not found" in written["reason"]
    assert not stale.exists()  # one from an earlier build may not fit the sources


def test_without_nvcc_build_cuda_1_is_an_error(copy):
    wish = NO_TOOLS | {"DUALPIPE_BUILD_CUDA": "1"}
    done = run_python("setup.py", "build_ext", "--inplace", cwd=copy, **wish)
    assert done.returncode != 0
    assert "DUALPIPE_BUILD_CUDA=1, but nvcc was not found" in done.stderr


def test_build_cuda_0_never_builds(copy):
    done = run_python("setup.py", "build_ext", "--inplace", cwd=copy, DUALPIPE_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert not list((copy / "dualpipe_ext").glob("_C*.so"))


def test_build_cuda_rejects_other_values(copy):
    done = run_python("setup.py", "build_ext", "--inplace", cwd=copy, DUALPIPE_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert "DUALPIPE_BUILD_CUDA='yes'" in done.stderr


def test_host_compiler_and_old_nvcc_are_named(monkeypatch):
    monkeypatch.delenv("DUALPIPE_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(setup.MissingToolError, match=r"no host C\+\+ compiler"):
        setup.find_host_compiler()
    with pytest.raises(setup.MissingToolError, match=r"nvcc 11\.8\.89 cannot compile for sm_90a"):
        setup.choose_archs("11.8.89")


def test_archs_follow_nvcc_and_the_environment(monkeypatch):
    monkeypatch.delenv("DUALPIPE_CUDA_ARCHS", raising=False)
    assert setup.choose_archs("13.0.88") == ("90a", "100a")
    assert setup.choose_archs("12.4.131") == ("90a",)
    monkeypatch.setenv("DUALPIPE_CUDA_ARCHS", "90a;120a")
    assert setup.choose_archs("13.0.88") == ("90a", "120a")


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "sequential"])
def test_steps_run_in_order(tmp_path, monkeypatch, ninja):
    if not ninja:
        monkeypatch.setattr(setup, "find_ninja", lambda: None)
    elif setup.find_ninja() is None:
        pytest.skip("no ninja on this machine")
    folder = tmp_path / "a folder: $odd"
    folder.mkdir()
    source, middle, result = (folder / name for name in ("source", "middle", "result"))
    source.write_text("one\n")
    steps = [
        setup.Step(command=("cp", str(source), str(middle)), inputs=(source,), output=middle),
        setup.Step(command=("cp", str(middle), str(result)), inputs=(middle,), output=result),
    ]
    setup.run_steps(steps, folder)
    assert result.read_text() == "one\n"
    source.write_text("two\n")
    later = source.stat().st_mtime + 5
    os.utime(source, (later, later))
    setup.run_steps(steps, folder)
    assert result.read_text() == "two\n"


def test_changed_header_recompiles_only_what_includes_it(tmp_path):
    ninja, compiler = setup.find_ninja(), shutil.which("g++")
    if ninja is None or compiler is None:
        pytest.skip("needs ninja and g++")
    header, a, b = (tmp_path / name for name in ("value.h", "a.cpp", "b.cpp"))
    header.write_text("#define VALUE 1\n")
    a.write_text('#include "value.h"\nint a() { return VALUE; }\n')
    b.write_text("int b() { return 0; }\n")
    tools = setup.Toolchain(
        nvcc=Path("nvcc"),
        nvcc_version="13.0.88",
        archs=("90a",),
        host_compiler=compiler,
        includes=(tmp_path,),
        cuda_runtime=tmp_path / "libcudart_static.a",
    )
    subprocess.run(["ar", "cr", str(tools.cuda_runtime)], check=True)
    steps = setup.plan_steps(tools, [a, b], tmp_path, tmp_path / "lib.so")
    setup.run_steps(steps, tmp_path)
    before = [step.output.stat().st_mtime_ns for step in steps]
    later = header.stat().st_mtime + 5
    header.write_text("#define VALUE 2\n")
    os.utime(header, (later, later))
    setup.run_steps(steps, tmp_path)
    after = [step.output.stat().st_mtime_ns for step in steps]
    assert [new > old for new, old in zip(after, before, strict=True)] == [True, False, True]


def test_wheel_holds_the_package_and_nothing_beside_it(copy):
    wheel = zipfile.ZipFile(build_distribution(copy, "wheel"))
    names = wheel.namelist()
    assert {"dualpipe_ext/_build.json", "dualpipe_ext/py.typed", "dualpipe_ext/_C.pyi"} <= set(
        names
    )
    kernels = {f"dualpipe_ext/{p.relative_to(ROOT)}" for p in ROOT.glob("triton_kernels/**/*.py")}
    assert kernels
    assert kernels <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"dualpipe_ext"}
    (scripts,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    assert "dualpipe-ext = dualpipe_ext.cli:main" in wheel.read(scripts).decode()


def test_sdist_holds_everything_that_the_build_reads(copy):
    with tarfile.open(build_distribution(copy, "sdist")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    read = [path for name in ("csrc", "triton_kernels") for path in (copy / name).rglob("*.*")]
    assert {str(path.relative_to(copy)) for path in read} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "dualpipe_ext/__init__.py"} <= names


def test_editable_install_finds_the_kernels_under_their_installed_name(copy):
    zipfile.ZipFile(build_distribution(copy, "editable")).extractall(copy / "site")
    (copy / "dualpipe_ext" / "__init__.py").write_text("")  # -S hides torch, and other installs
    script = (
        f"import site; site.addsitedir({str(copy / 'site')!r})\n"
        "from importlib.util import find_spec\n"
        "print(find_spec('dualpipe_ext.triton_kernels').origin, find_spec('triton_kernels'))"
    )
    done = run_python("-S", "-c", script, cwd="/", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    # The second: Triton's own triton_kernels keeps its name.
    assert done.stdout.split() == [str(copy / "triton_kernels" / "__init__.py"), "None"]

"""The compiled kernels are found if they were compiled, and give the same bits on every processor."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from normfree.models.layers import WSConv2d
from normfree.native import library as library_file
from normfree.native.library import library
from normfree.ops import winograd
from normfree.ops.gelu import gelu_tanh, silu
from normfree.ops.standardize import standardize_all
from normfree.ops.winograd import filter_planes
from normfree.optim.clipping import clip_grad_
from normfree.optim.ema import Ema
from normfree.optim.fused import FusedUpdate
from normfree.optim.groups import parameter_groups
from normfree.optim.sgd import SGD

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(
    library() is None, reason="no C compiler was found when the package was installed"
)


@pytest.fixture
def searched_again() -> Iterator[None]:
    """Search for the library again, now and after the test."""
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_the_kernels_exist_if_a_compiler_does() -> None:
    assert library() is not None


@compiled
def test_a_library_of_another_version_is_an_error(
    monkeypatch: pytest.MonkeyPatch, searched_again: None
) -> None:
    message = f"was compiled from version {library_file.VERSION} of its source. Allowed: version 99. "
    monkeypatch.setattr(library_file, "VERSION", 99)
    message += "Fix: delete this file and install the package again"
    with pytest.raises(ImportError, match=re.escape(message)):
        library()


def test_the_library_is_none_if_it_was_not_compiled(
    monkeypatch: pytest.MonkeyPatch, searched_again: None
) -> None:
    monkeypatch.setattr(library_file.importlib.util, "find_spec", lambda name: None)
    assert library() is None


def all_results() -> list[Tensor]:
    """Return the results of every kernel, on numbers of all magnitudes and units of odd lengths."""
    torch.manual_seed(3)
    sizes = [(9, 40, 3), (5, 40, 1), (37, 70, 1)]
    net = nn.ModuleList(WSConv2d(i, o, kernel_size=k, bias=False) for i, o, k in sizes)
    made = standardize_all([c.weight for c in net], [c.gain for c in net], [1.0, 2.0, 0.5])
    maps = [act(30.0 * weight) for weight, act in zip(made, (gelu_tanh, silu, gelu_tanh), strict=True)]
    ups = [torch.randn(m.shape) * torch.logspace(-5, 0, len(m)).view(-1, 1, 1, 1) for m in maps]
    torch.autograd.backward(maps, ups)
    optimizer = SGD(parameter_groups(net, weight_decay=0.02, clipping=0.3), 0.1)
    ema, found = Ema(net), [*made, *maps, *(p.grad.clone() for p in net.parameters())]
    update = FusedUpdate.create(optimizer, model=net, ema=ema)
    assert isinstance(update, FusedUpdate)
    found += [update.step().grad_norm for _ in range(2)]
    report = clip_grad_(optimizer.param_groups, mode="agc", clipping=0.3)
    assert 0.0 < float(report) < 1.0
    weight = torch.randn(32, 48, 3, 3)
    x, grad = torch.randn(2, 96, 11, 9), torch.randn(2, 32, 11, 9)
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    for side in (2, 4):
        found += [filter_planes(weight, groups=2, side=side, rotated=rotated) for rotated in (False, True)]
        found.append(winograd.conv2d(x, weight, None, groups=2, side=side))
        found.append(winograd.input_gradient(grad, weight, groups=2, side=side))
        found.append(winograd.weight_gradient(x, grad, groups=2, side=side))
    found += [report.grad_norm, *(p.grad for p in net.parameters()), *net.parameters()]
    found += [*optimizer.named_state().values(), *ema.module.state_dict().values()]
    return [t.detach().clone() for t in found]


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")], ids=str
)
def test_no_kernel_depends_on_the_default_type_and_device(compiled, dtype, device) -> None:
    """Libraries change them while they load a model; memory of another type would be too small."""
    torch.manual_seed(3)
    net = WSConv2d(64, 64, kernel_size=3, bias=False)
    x, grad = (torch.randn(2, 64, 12, 12).contiguous(memory_format=torch.channels_last) for _ in range(2))
    optimizer = SGD(parameter_groups(net, weight_decay=0.02, clipping=0.3), 0.1)
    averages = [Ema(net) for _ in range(2)]
    updates = [FusedUpdate.create(optimizer, model=net, ema=ema) for ema in averages]
    start = {name: value.clone() for name, value in net.state_dict().items()}

    def results(update: FusedUpdate) -> list[Tensor]:
        winograd._SCRATCH.kept.clear()
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(start[name])
        optimizer.state.clear()
        found = standardize_all([net.weight], [net.gain], [1.5])
        gradients = torch.autograd.grad(found[0], [net.weight, net.gain], net.weight.detach())
        for p, made in zip((net.weight, net.gain), gradients, strict=True):
            p.grad = made.clone()
        found += gradients
        for side in (2, 4):
            found.append(winograd.conv2d(x, start["weight"], None, groups=1, side=side))
            found.append(winograd.input_gradient(grad, start["weight"], groups=1, side=side))
            found.append(winograd.weight_gradient(x, grad, groups=1, side=side))
        found += [update.step().grad_norm, *(p.detach().clone() for p in net.parameters())]
        clip_grad_(optimizer.param_groups, mode="agc", clipping=0.3)
        return [*found, *(p.grad.clone() for p in net.parameters())]

    wanted, before = results(updates[0]), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            found = results(updates[1])
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def compile_again(compiler: str, flags: list[str], to: Path) -> None:
    """Compile the sources with the flags of setup.py and these."""
    if not (ROOT / "normfree" / "native" / "share.h").exists():
        pytest.skip("tests of an installed package: no sources")
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
    }
    sources = sorted((ROOT / "normfree" / "native").glob("*.c"))
    command = [compiler, *values["FLAGS"]["unix"], *flags, "-shared", "-fPIC", "-o", str(to)]
    subprocess.run([*command, *sources, *values["LIBRARIES"]["unix"]], check=True)


@compiled
@pytest.mark.parametrize(
    ("compiler", "flags"),
    [("gcc", ["-DNARROW"]), ("gcc", ["-DNARROW", "-DPLAIN", "-std=c11", "-pedantic-errors"]), ("clang", [])],
    ids=["narrow", "plain", "clang"],
)
def test_bits_do_not_depend_on_registers_and_compilers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, searched_again: None, compiler: str, flags: list[str]
) -> None:
    """The same sources with the same flags: for the narrowest registers, in standard C, and by another compiler."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    expected = all_results()
    other = tmp_path / "other.so"
    compile_again(compiler, flags, other)
    with monkeypatch.context() as patch:
        patch.setattr(
            library_file.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(other))
        )
        library.cache_clear()
        assert library()._name == str(other)
        found = all_results()
    assert len(expected) == len(found) > 30
    assert all(map(torch.equal, expected, found))


@compiled
def test_kernels_use_the_threads_of_pytorch() -> None:
    assert torch.backends.openmp.is_available()
    assert [library().native_threads(n) for n in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_without_an_openmp_library_one_thread_does_the_work(tmp_path: Path) -> None:
    compile_again("gcc", ["-O0"], tmp_path / "alone.so")
    code = f"import ctypes; assert ctypes.CDLL({str(tmp_path / 'alone.so')!r}).native_threads(4) == 1"
    subprocess.run([sys.executable, "-c", code], check=True)

"""The compiled kernels are found if they were compiled, and give the same bits on every x86 processor."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
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
from normfree.optim.fused_native import NativeUpdate
from normfree.optim.groups import parameter_groups
from normfree.optim.sgd import SGD

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
    message += "Fix: install the package again"
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
    update = NativeUpdate.create(optimizer, model=net, ema=ema)
    assert isinstance(update, NativeUpdate)
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


@compiled
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_bits_do_not_depend_on_the_width_of_registers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, searched_again: None
) -> None:
    """The same sources are compiled with the same flags, but only for the narrowest registers."""
    wide = all_results()
    root = Path(library_file.__file__).parents[2]
    calls = [
        node for node in ast.walk(ast.parse((root / "setup.py").read_text())) if isinstance(node, ast.Call)
    ]
    (extension,) = [call for call in calls if getattr(call.func, "id", "") == "Extension"]
    module = {keyword.arg: ast.literal_eval(keyword.value) for keyword in extension.keywords}
    other = tmp_path / "other.so"
    flags = [*module["extra_compile_args"], "-DNARROW", "-shared", "-fPIC", "-o", str(other)]
    subprocess.run(["gcc", *flags, *(root / source for source in module["sources"])], check=True)
    with monkeypatch.context() as patch:
        patch.setattr(
            library_file.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(other))
        )
        library.cache_clear()
        assert library()._name == str(other)
        narrow = all_results()
    assert len(wide) == len(narrow) > 30
    assert all(map(torch.equal, wide, narrow))

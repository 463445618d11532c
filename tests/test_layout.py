"""The structure of the package: imports point down, no cycles, short files and functions, unique names."""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import normfree

ROOT = Path(normfree.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
#: A part of the package imports only parts with a lower number, and itself.
LEVELS = {
    "suggest": 0, "files": 0, "native": 0, "uncertainty": 1,
    "device": 1, "multilabel_scores": 1, "scores": 2, "ops": 1, "weights": 1, "data": 1,
    "optim": 2, "models": 2,
    "exported_net": 1, "onnx_net": 3, "openvino_net": 3, "opacus": 3, "diagnose": 3, "preprocessing": 3,
    "pretrained": 4, "timm": 4, "surgery": 5, "inference": 5, "prediction": 5, "embeddings": 6, "deploy": 6,
    "training": 7, "serve": 7, "tools": 8, "commands": 9, "cli": 10,
}  # fmt: skip
PUBLIC = {
    "ClipReport", "Config", "Ema", "NonFiniteGradientError", "SAM", "SGD", "VARIANTS", "WSConv2d", "__version__",
    "adaptive_clip_grad_", "attach_agc", "batch_dependence", "cached_backward", "clip_grad_", "contrastive_loss",
    "convert_batchnorm", "create_model", "evaluate", "export", "fold",
    "fold_with_report", "from_pretrained", "gain_of", "grad_cam", "gradient_report", "keep_freed_memory",
    "list_models", "load_weights", "nt_xent", "open_source", "parameter_groups", "per_example_gradients",
    "predict", "push_to_hub", "quantize", "save_pretrained", "scaled_activation", "signal_propagation",
    "standardize", "standardized_once", "train", "train_folds", "triplet_loss", "warmup_cosine",
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> frozenset[str]:
    """Return our modules that a file imports, at any depth and also for type checking only."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
    return frozenset(name for name in found if name == "normfree" or name.startswith("normfree."))


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("name", sorted({part(m) for m in MODULES} - {"", "_version", "__main__"}))
def test_imports_point_down_to_the_module_that_defines_the_name(name):
    for path in (f for f in FILES if part(module_name(f)) == name):
        for target in imports(path):
            file = ROOT.parent / Path(*target.split("."))
            assert not (file / "__init__.py").exists(), f"{path} imports a package, not a module: {target}"
            if part(target) not in ("_version", name):
                assert LEVELS[part(target)] < LEVELS[name], f"{path} imports {target}"


def test_no_import_cycles():
    arrows = {module_name(f): imports(f) for f in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for target in arrows.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in arrows:
        visit(module, ())


def test_files_and_functions_are_short():
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, path
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 75, (path, node.name)


def test_no_two_modules_and_no_two_public_classes_share_a_name():
    stems = Counter(path.stem for path in FILES if path.stem != "__init__")
    classes = Counter(
        node.name
        for path in FILES
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in (stems + classes).items() if count > 1] == []


def test_the_public_api_is_pinned_and_every_name_resolves():
    assert set(normfree.__all__) == PUBLIC
    for name in normfree.__all__:
        owner = getattr(normfree, name)
        assert name in ("__version__", "VARIANTS") or owner.__name__ == name
        assert name == "__version__" or owner.__doc__, name
    with pytest.raises(AttributeError, match="No normfree attribute nothing"):
        normfree.nothing  # noqa: B018


def test_torchvision_is_not_needed_to_build_and_load_networks():
    code = "import sys; sys.modules['torchvision'] = None\nimport normfree\nnormfree.create_model('nf_resnet_nano')"
    subprocess.run([sys.executable, "-c", code], check=True)

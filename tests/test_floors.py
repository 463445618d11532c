"""The house stands: imports point down, no circles, small rooms, a pinned face."""

import ast
import importlib
from pathlib import Path

import pytest

import normfree

ROOT = Path(normfree.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FLOORS = {
    "native": 0,
    "models": 1,
    "optim": 1,
    "data": 1,
    "exported": 1,
    "diagnose": 2,
    "pretrained": 2,
    "surgery": 3,
    "inference": 3,
    "serve": 4,
    "train": 4,
    "commands": 5,
    "cli": 6,
}
GROUND = ("models", "optim", "data")
FACE = {
    "SGD", "VARIANTS", "Ema", "WSConv2d", "__version__", "adaptive_clip_grad_", "batch_dependence",
    "convert_batchnorm", "create_model", "evaluate", "from_pretrained", "gain_of", "gradient_report", "list_models",
    "load_weights", "parameter_groups", "predict", "push_to_hub", "save_pretrained", "scaled_activation",
    "signal_propagation",
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, at any depth, except for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            known = {module_name(f) for f in FILES}
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else str(node.module)
                for a in node.names
            }
    return {name for name in found if name == "normfree" or name.startswith("normfree.")}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


INNER = [f for f in FILES if f.parent != ROOT or f.stem in FLOORS]


@pytest.mark.parametrize("path", INNER, ids=module_name)
def test_imports_point_down_to_the_file_that_owns_the_name(path):
    mine = room(module_name(path))
    for target in imports(path):
        assert not (ROOT.parent / Path(*target.split(".")) / "__init__.py").exists(), (
            f"{path} imports a face: {target}"
        )
        theirs = room(target)
        if theirs == "_version" or theirs == mine:
            continue
        assert FLOORS[theirs] < FLOORS[mine] or (mine, theirs) == ("diagnose", "optim"), (
            f"{path} imports {target}"
        )
        assert not (mine in GROUND and theirs in GROUND)


def test_no_circles():
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


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_rooms_are_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 75, node.name


def test_the_face_is_pinned_and_every_name_resolves():
    assert set(normfree.__all__) == FACE
    for name in normfree.__all__:
        owner = getattr(normfree, name)
        assert name in ("__version__", "VARIANTS") or owner.__name__ == name
    with pytest.raises(AttributeError, match="module 'normfree' has no attribute 'nothing'"):
        normfree.nothing  # noqa: B018


def test_torchvision_is_not_needed_to_build_and_load_networks():
    code = "import sys; sys.modules['torchvision'] = None\nimport normfree\nnormfree.create_model('nf_resnet_nano')"
    importlib.import_module("subprocess").run(
        [importlib.import_module("sys").executable, "-c", code], check=True
    )

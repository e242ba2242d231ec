"""The order of dependencies, read from the imports, and what importing repnet brings with it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import repnet

PACKAGE = Path(repnet.__file__).parent
ROOT = PACKAGE.parent

# Which modules of repnet each may import.
ORDER = {
    "errors": set(),
    "files": {"errors"},
    "terminal": set(),
    "kernel": {"symbolic"},  # lazily: the rules are written in terms of the kernel
    "images": set(),
    "meta_device": set(),
    "precision": {"meta_device"},
    "symbolic": {"kernel", "precision"},
    "convolution": {"kernel", "symbolic"},
    "equivalence": {"symbolic"},
    "surroundings": {"kernel", "symbolic"},
    "health": set(),
    "fold": {
        "fold",
        "kernel",
        "symbolic",
        "precision",
        "convolution",
        "equivalence",
        "surroundings",
        "health",
        "meta_device",
    },
    "complexity": set(),
    "processes": set(),
    "spec": {"errors"},
    "config": {"errors", "spec"},
    "outline": {"errors", "spec"},
    "kernel_transfer": {"kernel", "symbolic", "equivalence"},
    "block_insertion": {"kernel", "symbolic", "kernel_transfer", "fold", "spec", "blocks"},
    "weights": {"weights", "models", "spec", "errors", "files", "terminal"},
    "layers": set(),
    "blocks": {"blocks", "layers"},
    "models": {"models", "blocks", "layers", "spec", "errors"},
    "checkpoint": {"errors", "files", "outline", "spec"},
}


def sources(path: Path) -> list[Path]:
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files
    return files


def imports(nodes: list[ast.stmt] | ast.Module) -> Iterator[str]:
    """Yield the absolute names that statements import, also those inside functions of a module."""
    walk = ast.walk(nodes) if isinstance(nodes, ast.Module) else nodes
    for node in walk:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def own(names: Iterator[str]) -> set[str]:
    """Return the modules of repnet among imported names, without `repnet.`."""
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "repnet"}


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_what_stands_below_it(module: str) -> None:
    for path in sources(PACKAGE / module):
        assert own(imports(parse(path))) <= ORDER[module], path


def test_the_kernel_stands_on_its_own() -> None:
    top = {name.partition(".")[0] for name in imports(parse(PACKAGE / "kernel.py").body)}
    assert top - sys.stdlib_module_names == {"torch"}


def test_the_order_has_no_cycle() -> None:
    below = {module: set(names) - {module} for module, names in ORDER.items()}
    below["kernel"] -= {"symbolic"}
    while below:
        free = {module for module, names in below.items() if not names}
        assert free, f"these import each other: {sorted(below)}"
        below = {m: names - free for m, names in below.items() if m not in free}


def test_only_the_commands_know_hydra() -> None:
    files = [*sources(PACKAGE), *ROOT.glob("*.py")]
    users = {
        path.relative_to(ROOT)
        for path in files
        if {name.partition(".")[0] for name in imports(parse(path))} & {"hydra", "omegaconf"}
    }
    assert users
    assert {path.parts[:2] for path in users} <= {("repnet", "cli"), ("train.py",), ("deploy.py",)}


@pytest.mark.parametrize("module", [*ORDER, "deploy"])
def test_what_needs_no_training_knows_no_lightning(module: str) -> None:
    for path in sources(PACKAGE / module):
        names = {name.partition(".")[0] for name in imports(parse(path))}
        assert not names & {"pytorch_lightning", "lightning", "lightning_fabric"}, path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("repnet", "torch pytorch_lightning hydra omegaconf yaml"),
        ("repnet.errors", "torch pytorch_lightning hydra"),
        ("repnet.spec", "torch pytorch_lightning hydra"),
        ("repnet.cli.train", "torch pytorch_lightning"),
        ("repnet.cli.deploy", "torch pytorch_lightning"),
        ("repnet.kernel, repnet.fold", "pytorch_lightning hydra torchvision"),
        ("repnet.models, repnet.blocks", "pytorch_lightning hydra"),
        (
            "repnet.predict, repnet.serve.__main__",
            "torch pytorch_lightning hydra sklearn matplotlib",
        ),
        (
            "repnet.deploy.formats.onnx, repnet.deploy.formats.openvino",
            "torch onnxruntime openvino",
        ),
        ("repnet.deploy.artifact, repnet.checkpoint", "pytorch_lightning hydra repnet.training"),
    ],
)
def test_an_import_brings_only_what_it_needs(module: str, absent: str) -> None:
    code = f"import sys, {module}; print(sorted(set({absent.split()!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", repnet.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(repnet, name) is not None
    assert name in dir(repnet)


def test_the_public_names_of_the_contract_are_there() -> None:
    assert set(repnet.__all__) >= {
        "ConvKernel",
        "FoldMismatchError",
        "NotFoldableError",
        "compare",
        "create_model",
        "kernel_of",
        "list_models",
        "load_checkpoint",
        "convert_weights",
        "load_deployed",
        "load_weights",
        "overparameterize",
        "reparameterize",
        "reparameterize_graph",
        "save_deployed",
    }
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        repnet.nothing  # noqa: B018

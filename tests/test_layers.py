"""The layers of the house: one table in pyproject.toml, which these tests, mypy and docs/architecture.md share."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "medlora"
TABLE: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["medlora"]
LAYERS = [name for names in TABLE.values() for name in names]
"""Modules and packages at the top of medlora, in the order in which imports may go: to earlier ones alone."""

HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors"}
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] in LAYERS or path.stem in LAYERS
)
MOST_MODULES = 9
MOST_UNTYPED = 238
"""Uses of `Any`: half of what there was before the packages, in half the code."""


def name_layer(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_module(path: Path) -> str:
    return ".".join(("medlora", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def list_imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, as a dotted name; `from medlora import x` is `medlora.x`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = Path(*f"{node.module}.{alias.name}".split("."))
                is_module = (ROOT / inner).with_suffix(".py").is_file() or (ROOT / inner).is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def test_every_module_has_a_layer() -> None:
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert found - {"__init__", "__main__", "compare"} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=name_module)
def test_imports_go_to_earlier_layers_alone(path: Path) -> None:
    layer = LAYERS.index(name_layer(path))
    for name in list_imports(path):
        top, _, rest = name.partition(".")
        if top == "medlora" and rest:
            assert LAYERS.index(rest.split(".")[0]) <= layer, f"{name_module(path)} imports {name}, which is above it"


@pytest.mark.parametrize("path", MODULES, ids=name_module)
def test_torch_and_ray_are_imported_in_their_layers_alone(path: Path) -> None:
    used = {name.split(".")[0] for name in list_imports(path)}
    layer = name_layer(path)
    if layer in TABLE["words"] + TABLE["plain"]:
        assert not used & (HEAVY | {"ray"})
    elif layer in TABLE["torch"]:
        assert "ray" not in used
    elif layer != "on_ray":
        assert not used & (HEAVY | {"ray"})


def test_words_import_nothing_else_of_medlora() -> None:
    for path in MODULES:
        if name_layer(path) in TABLE["words"]:
            ours = {name for name in list_imports(path) if name.startswith("medlora.")}
            assert ours <= {"medlora.records", "medlora.errors", "medlora.bounds"}, path


def test_kernels_import_nothing_of_medlora_but_each_other() -> None:
    for path in (PACKAGE / "kernels").glob("*.py"):
        assert all(name.startswith("medlora.kernels") for name in list_imports(path) if name.startswith("medlora")), (
            path
        )


def test_there_is_no_cycle() -> None:
    """Also none that is closed by an import inside a function."""
    edges = {name_module(path): {name for name in list_imports(path)} for path in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(edges[module] & edges.keys() - {module}):
                visit(target, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_no_package_has_more_modules_than_one_can_remember() -> None:
    for folder in {path.parent for path in MODULES} - {PACKAGE}:
        modules = [path for path in folder.glob("*.py") if path.stem != "__init__"]
        assert len(modules) <= MOST_MODULES, f"{folder}: {len(modules)} modules"


def test_functions_are_short_and_have_few_parameters() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            where = f"{path}:{node.lineno} {node.name}"
            assert len([name for name in given if name not in ("self", "cls", "ctx")]) <= 8, where
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 60, where


def test_values_without_a_type_stay_few() -> None:
    names = [node for path in MODULES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    assert sum(isinstance(node, ast.Name) and node.id == "Any" for node in names) <= MOST_UNTYPED


@pytest.mark.parametrize("word", ["from_pretrained(", "BitsAndBytesConfig(", "PeftModel."])
def test_models_are_loaded_in_one_package(word: str) -> None:
    users = {name_layer(path) for path in MODULES if word in path.read_text(encoding="utf-8")}
    assert users <= {"model"}


def test_the_plain_layers_bring_neither_torch_nor_ray_along() -> None:
    plain = [name_module(path) for path in MODULES if name_layer(path) in TABLE["words"] + TABLE["plain"]]
    code = f"import sys, importlib\nfor name in {plain!r}: importlib.import_module(name)\n"
    code += (
        "print(sorted({'torch', 'transformers', 'ray', 'peft', 'datasets', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", [name for name in TABLE["torch"] if name != "kernels"])
def test_kernels_are_imported_before_the_libraries_that_they_spare_a_worker(package: str) -> None:
    assert next(list_imports(PACKAGE / package / "__init__.py")) == "medlora.kernels"


def test_a_worker_does_not_load_what_it_never_uses() -> None:
    """bitsandbytes asks for compiled functions at import: they are compiled at their first call, as they would have been.

    That an actor's process loads none of it is asked in tests/model/test_chain.py, which has one.
    """
    code = """
import torch
asked = []
def compile(function, **options): asked.append(options); return function
torch.compile = compile
import medlora.kernels, transformers.utils
assert asked == [] and torch.compile is compile
assert transformers.utils.is_scipy_available()
from bitsandbytes.backends.default.ops import _dequantize_blockwise_compute as scale
for _ in range(2):
    said = scale(torch.arange(4, dtype=torch.uint8), torch.tensor([2.0, 3.0]), torch.arange(4.0), 2, torch.float32).tolist()
print(said, asked)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[0.0, 2.0, 6.0, 9.0] [{'dynamic': False}]", done.stderr


@pytest.mark.parametrize("readme", sorted(PACKAGE.rglob("README.md")), ids=lambda path: path.parent.name)
def test_a_package_s_readme_names_every_module(readme: Path) -> None:
    """In its table, where a folder that is named once holds for the rest of its cell."""
    named = []
    for cell in re.findall(r"^\| (`[^|]*\.py`) \|", readme.read_text(encoding="utf-8"), flags=re.M):
        folder = Path()
        for module in map(Path, re.findall(r"`([\w/]+\.py)`", cell)):
            folder = module.parent if len(module.parts) > 1 else folder
            named.append(folder / module.name)
    modules = [path.relative_to(readme.parent) for path in readme.parent.rglob("*.py") if path.stem != "__init__"]
    assert sorted(named) == sorted(modules)


def test_contributing_lists_where_an_upgrade_of_ray_must_look() -> None:
    trap = (
        (ROOT / "CONTRIBUTING.md")
        .read_text(encoding="utf-8")
        .partition("**Ray's private API.**")[2]
        .partition("\n5.")[0]
    )
    private = re.compile(r"\b_(?:private|raylet|internal)\b|ray\.train\.v2|ray\.tune\.execution")
    users = {path for path in (PACKAGE / "on_ray").rglob("*.py") if private.search(path.read_text(encoding="utf-8"))}
    assert set(re.findall(r"`([\w/]+)`", trap)) == {str(path.relative_to(PACKAGE).with_suffix("")) for path in users}


def test_importing_medlora_changes_nothing() -> None:
    code = "import os, logging\nbefore = dict(os.environ), set(logging.root.manager.loggerDict)\nimport medlora\n"
    code += "print((dict(os.environ), set(logging.root.manager.loggerDict)) == before)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "True"
    )


def test_the_docs_show_the_table() -> None:
    """docs/architecture.md lists every package in the table's order, and mypy checks them all."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = [name for name in LAYERS if (PACKAGE / name).is_dir()]
    shown = re.findall(r"^\s*(\w+)/ ", text, flags=re.M)
    assert [name for name in shown if name in packages] == packages
    inner = {path.name for path in PACKAGE.glob("*/*/") if (path / "__init__.py").is_file()}
    assert inner <= set(re.findall(r"(\w+)/", text))
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert "medlora" in mypy["files"]

"""The layers of the house: imports go down only, and the pure ones bring neither torch nor ray along."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "medlora"

WORDS = {"torch", "transformers", "ray", "datasets", "peft", "accelerate"}
LAYERS = {
    0: (
        {
            "__init__",
            "errors",
            "disk_errors",
            "checksums",
            "endings",
            "records",
            "config",
            "config_file",
            "config_sources",
            "config_places",
            "config_words",
            "config_jobs",
            "bounds",
            "option_text",
            "answer_shapes",
            "answer_denials",
            "answer_questions",
            "answer_rules",
            "answers",
            "scores",
            "pulse",
            "runs",
            "storage",
            "run_lock",
            "object_store",
            "mixture",
            "overlap",
            "personal",
            "result_logs",
        },
        WORDS,
    ),
    1: (
        {
            "prompts",
            "turns",
            "readers",
            "streams",
            "encodings",
            "row_formats",
            "tables",
            "columnar",
            "spreadsheets",
            "exam_columns",
            "option_marks",
            "option_lists",
            "gold",
            "schemas",
            "conversion",
            "quarantine",
            "sources",
            "lineage",
            "model_files",
            "name_patterns",
            "adapter_checks",
            "adapter_origin",
            "base_checks",
            "chat_templates",
            "data_card",
            "report",
            "page",
            "plots",
            "evaluation",
            "display",
            "compare",
            "sweep",
            "sweep_checks",
            "sweep_space",
            "sweep_ledger",
            "sweep_search",
            "sweep_population",
            "sweep_logs",
            "sweep_report",
            "sweep_page",
            "sweep_plots",
            "sweep_display",
            "miniature",
        },
        {"torch", "transformers", "ray", "peft"},
    ),
    2: (
        {
            "encoding",
            "attention",
            "flat",
            "fitting",
            "head",
            "kept",
            "lean",
            "memory",
            "elementwise",
            "preparation",
            "inspection",
            "models",
            "chains",
            "targets",
            "adapter_files",
            "batching",
            "prefix",
            "generation",
            "option_scores",
            "answering",
            "evaluator",
            "predictions",
            "stages",
            "validation",
            "callbacks",
            "divergence",
            "training",
        },
        {"ray"},
    ),
    3: ({"phases", "phase_rows"}, {"ray"}),
    4: ({"on_ray"}, set()),
}
BUILDS_A_MODEL = {"build", "network", "pretraining", "tokenizer", "lessons"}
"""Modules of the miniature that make its base; they stand with layer 2."""
PROMPTS_FOR_ALL = {"prompts"}
"""Layer 1 by what it is about, yet words alone: config and lower layers may name its styles."""


def layer_of(path: Path) -> int:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] == "miniature" and parts[-1] in BUILDS_A_MODEL:
        return 2
    return next(layer for layer, (names, _) in LAYERS.items() if parts[0] in names)


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names if node.module == "medlora")}
    return found


def top_imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = ast.Module(
        body=[node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], type_ignores=[]
    )
    found: set[str] = set()
    for node in module.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down_only(path: Path) -> None:
    layer = layer_of(path)
    forbidden = LAYERS[layer][1] if layer != 2 else {"ray"}
    used = {name.split(".")[0] for name in imports_of(path)}
    if path.stem == "readers":
        used -= {"datasets"}
    assert not used & forbidden
    for name in imports_of(path):
        if name.startswith("medlora."):
            target = PACKAGE / Path(*name.split(".")[1:])
            target = target.with_suffix(".py") if target.with_suffix(".py").is_file() else target / "__init__.py"
            # Lazily, a driver may reach down to what builds the miniature or up to Ray's edge; at import time nobody may.
            if target.is_file() and name in top_imports_of(path) and target.stem not in PROMPTS_FOR_ALL:
                assert layer_of(target) <= layer, f"{path.name} imports {name} from a higher layer"


def test_ray_is_imported_in_one_folder_alone() -> None:
    users = {
        path
        for path in [*MODULES, *(ROOT / "jobs").glob("*.py")]
        if "ray" in {name.split(".")[0] for name in imports_of(path)}
    }
    assert users and all(path.parent.name == "on_ray" for path in users)


@pytest.mark.parametrize("word", ["from_pretrained(", "BitsAndBytesConfig(", "PeftModel."])
def test_models_are_loaded_in_one_place(word: str) -> None:
    users = {
        path.stem for path in MODULES if word in path.read_text(encoding="utf-8") and path.parent.name != "miniature"
    }
    assert users <= {"models", "chains", "targets"}


def test_the_pure_layers_bring_neither_torch_nor_ray_along() -> None:
    names = [
        f"medlora.{path.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')}".removesuffix(".__init__")
        for path in MODULES
        if layer_of(path) <= 1
    ]
    code = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n"
    code += (
        "print(sorted({'torch', 'transformers', 'ray', 'peft', 'datasets', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )

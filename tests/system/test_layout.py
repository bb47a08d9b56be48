"""What each file may import, and how long a function may be; without fused.py everything works."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
METHOD = ("scores", "budget", "adalora", "vilora", "ivon", "fused")
HARNESS = sorted(path.stem for path in (REPO / "harness").glob("*.py") if path.stem != "__init__")
TOOLS = sorted(path.stem for path in (REPO / "tools").glob("*.py") if path.stem != "__init__")
# The harness from the ground up. Between the ground and settings.py stand files.py, glue.py and any other
# task's module; those of TOP import none of each other.
GROUND, TOP = {"task", "metrics", "processes"}, {"encoder", "batches", "prediction", "run_folder"}
CODE = [REPO / "run_glue.py", *(REPO / f"{name}.py" for name in METHOD)]
CODE += [
    path for folder in ("harness", "tools", "benchmarks", "demo") for path in (REPO / folder).rglob("*.py")
]


def imports(path: Path) -> Iterator[str]:
    """Every import in a file, those in functions too: `from harness import task` is "harness.task"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def from_harness(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("harness.")}


@pytest.mark.parametrize("name", METHOD)
def test_the_method_imports_torch_the_standard_library_and_itself_alone(name: str):
    allowed = {"torch", *sys.stdlib_module_names, *METHOD}
    assert packages(REPO / f"{name}.py") <= allowed


@pytest.mark.parametrize("name", METHOD)
def test_the_method_works_without_its_fast_forms(name: str):
    assert "fused" not in packages(REPO / f"{name}.py")


@pytest.mark.parametrize("name", HARNESS)
def test_the_harness_imports_no_script_and_of_the_method_only_names(name: str):
    path = REPO / f"harness/{name}.py"
    assert not packages(path) & {"run_glue", "tools", "budget", "vilora", "fused", "ivon"}
    if name != "encoder":
        assert "adalora.inject" not in imports(path)


@pytest.mark.parametrize("name", HARNESS)
def test_the_harness_stands_on_what_is_below(name: str):
    below = set(HARNESS) - TOP if name in TOP else set(HARNESS) - TOP - {"settings"}
    assert from_harness(REPO / f"harness/{name}.py") <= (set() if name in GROUND else below)


def test_no_tool_imports_the_training_script():
    for name in TOOLS:
        assert "run_glue" not in packages(REPO / f"tools/{name}.py")


def test_no_imports_go_round_in_a_circle():
    known = {path.relative_to(REPO).with_suffix("").as_posix().replace("/", "."): path for path in CODE}
    graph = {}
    for name, path in known.items():
        found = set(imports(path)) | {found.rpartition(".")[0] for found in imports(path)}
        graph[name] = found & known.keys()
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("adalora") < order.index("fused") < order.index("run_glue")
    assert order.index("harness.task") < order.index("harness.settings") < order.index("run_glue")


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(REPO).as_posix())
def test_no_function_is_longer_than_60_lines(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.slow
def test_without_fused_and_its_block_the_program_works(tmp_path: Path):
    for name in METHOD:
        shutil.copy(REPO / f"{name}.py", tmp_path)
    for folder in ("harness", "demo"):
        shutil.copytree(REPO / folder, tmp_path / folder)
    (tmp_path / "fused.py").unlink()
    script = (REPO / "run_glue.py").read_text(encoding="utf-8")
    script, imported = re.subn(r"^import fused\n", "", script, flags=re.MULTILINE)
    script, block = re.subn(
        r"^    if not settings\.plain:\n(?:        .*\n)+", "", script, flags=re.MULTILINE
    )
    assert (imported, block) == (1, 1)
    assert "fused." not in script
    (tmp_path / "run_glue.py").write_text(script, encoding="utf-8")
    argv = [sys.executable, "run_glue.py", "--demo", "--max_steps", "10", "--output_dir", "run"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/results.json").exists()

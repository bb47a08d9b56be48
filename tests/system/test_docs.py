"""What the README and docs/ promise about themselves."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
METHOD = (ROOT / "docs/method.md").read_text()
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
REFERENCES = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", METHOD)))


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1500


@pytest.mark.parametrize(("file", "name"), REFERENCES)
def test_each_function_and_test_that_the_method_page_names_is_there(file: str, name: str):
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_method_page_names_functions_and_tests():
    assert len(REFERENCES) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_to_a_file_leads_to_one(page: Path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_walkthrough_prunes_to_the_two_triplets_of_its_target(tmp_path: Path):
    command = [sys.executable, ROOT / "docs/walkthrough.py", tmp_path]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(re.search(r"kept 2 of 6 triplets; relative error of the map ([\d.]+)", printed)[1]) < 0.1
    assert len(list(tmp_path.glob("*.png"))) == 2

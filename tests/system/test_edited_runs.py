"""Finished runs whose files were edited: every tool reads them, leaves them out, or says so in a line."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import write_glue
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import run_glue
from harness.settings import Settings, exit_status
from tools import evaluate, export, reproduce

FILES = ("config.json", "results.json", "evaluation.json", "metrics.jsonl", "score_agreement.jsonl")
FIGURES = ("curves", "agreement", "calibration", "temperature", "ranks")


@pytest.fixture(scope="module")
def finished(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run that has been evaluated, from draws too."""
    root = tmp_path_factory.mktemp("finished")
    where = ["--model", str(bert), "--data_dir", str(write_glue(root / "glue", "cola"))]
    steps = ["--max_steps", "8", "--eval_every", "4", "--max_length", "16", "--batch_size", "8"]
    schedule = ["--tinit", "2", "--tfinal", "2", "--delta_t", "1", "--track_scores"]
    run_glue.main(["--task", "cola", *where, *steps, *schedule, "--output_dir", str(root / "runs/a")])
    evaluate.main([str(root / "runs/a"), "--eval_samples", "2", "--temperature", "0.5", "1"])
    return root / "runs"


def tools(runs: Path) -> dict[str, Callable[[], None]]:
    out = runs.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    found = {"table": lambda: reproduce.main(["table", str(runs)])}
    for verb in FIGURES:
        found[verb] = lambda verb=verb: reproduce.main([verb, str(runs), "-o", str(runs.parent / "x.png")])
    found["compare"] = lambda: reproduce.main(["compare", f"{runs}/a", f"{runs}/a:tau=1"])
    found["evaluate"] = lambda: evaluate.main([str(runs / "a"), "--eval_samples", "1"])
    found["export"] = lambda: export.main(["peft", str(runs / "a"), str(out)])
    return found


def check_all(runs: Path, verbs: list[str], capsys: pytest.CaptureFixture) -> dict[str, int]:
    """Each tool's exit status. A tool that raises fails the test."""
    found = {}
    for verb in verbs:
        capsys.readouterr()
        found[verb] = exit_status(tools(runs)[verb], verb)
        said = capsys.readouterr().err.splitlines()
        assert found[verb] in (0, 2)
        assert all(line.startswith(("skipped ", f"{verb}: error: ")) for line in said if line), said
    return found


def edited(value: Any, path: list, new: Any) -> Any:
    """A JSON value with one of its parts replaced, or taken away; `path` are indices, from the outside in."""
    if not isinstance(value, (dict, list)) or not value or not path:
        return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new == "TAKEN AWAY" and (len(path) == 1 or not isinstance(value[key], (dict, list))):
        del copy[key]
    else:
        copy[key] = edited(value[key], path[1:], new)
    return copy


def rewrite(path: Path, where: list, new: Any) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(edited(json.loads(path.read_text()), where, new)))
    else:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in edited(lines, where, new) or []))


NESTED = json.loads("[" * 60 + "]" * 60)
ODD = [None, True, 0, 1, -1, 1.5, 10**40, 1e308, float("nan"), float("-inf"), "", "x", [], {}, ["x"], NESTED]
ODD += [{"x": 1}, [1, 2], "TAKEN AWAY"]
edits = st.tuples(
    st.sampled_from(FILES), st.lists(st.integers(0, 99), min_size=1, max_size=4), st.sampled_from(ODD)
)
LIGHT = ["table", "ranks", "compare"]
VERBS = ["table", *FIGURES, "compare", "evaluate", "export"]


def copy_of(finished: Path, tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    shutil.copytree(finished, runs)
    return runs


def test_the_tools_work_on_the_run_as_it_is(finished: Path, tmp_path: Path, capsys):
    runs = copy_of(finished, tmp_path)
    assert set(check_all(runs, list(tools(runs)), capsys).values()) <= {0, 2}
    assert check_all(runs, ["table", "evaluate", "export"], capsys) == {
        "table": 0,
        "evaluate": 0,
        "export": 0,
    }


@pytest.mark.slow
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edit=edits, verbs=st.lists(st.sampled_from(VERBS), min_size=2, max_size=2, unique=True))
def test_an_edited_run_is_read_left_out_or_refused(
    edit: tuple, verbs: list[str], finished: Path, tmp_path: Path, capsys
):
    name, where, new = edit
    runs = copy_of(finished, tmp_path)
    rewrite(runs / "a" / name, where, new)
    check_all(runs, verbs, capsys)
    plt.close("all")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null\n", b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_file_with_something_else_in_it_is_refused(
    name: str, content: bytes, finished: Path, tmp_path: Path, capsys
):
    runs = copy_of(finished, tmp_path)
    (runs / "a" / name).write_bytes(content)
    check_all(runs, [*LIGHT, "evaluate"], capsys)


@pytest.mark.parametrize("field", [f.name for f in fields(Settings)])
def test_a_setting_of_another_type_makes_a_damaged_run(field: str, finished: Path, tmp_path: Path, capsys):
    runs = copy_of(finished, tmp_path)
    config = json.loads((runs / "a/config.json").read_text())
    (runs / "a/config.json").write_text(json.dumps(config | {field: {"of": "another type"}}))
    expected = 0 if field == "temperature" else 2  # a list in earlier runs
    assert check_all(runs, ["table"], capsys) == {"table": expected}


@pytest.mark.parametrize("file", ["adapter", "posterior"])
@pytest.mark.parametrize("damage", ["nan", "shape", "name", "type", "cut"])
def test_an_adapter_or_posterior_that_does_not_fit_is_refused(
    file: str, damage: str, finished: Path, tmp_path: Path, capsys
):
    runs = copy_of(finished, tmp_path)
    path = runs / f"a/adapter/{file}.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    match damage:
        case "nan":
            tensors[name][0] = torch.nan
        case "shape":
            tensors[name] = torch.cat([tensors[name], tensors[name]])
        case "name":
            tensors["another"] = tensors.pop(name)
        case "type":
            tensors[name] = tensors[name].to(torch.int64)
    scaling = json.loads((runs / "a/config.json").read_text())
    save_file(tensors, path, {"scaling": f"{scaling['alpha']} / {scaling['init_rank']}"})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    assert check_all(runs, ["evaluate", "export"], capsys) == {"evaluate": 2, "export": 2}

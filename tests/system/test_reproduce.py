"""tools.reproduce: the grid, the table's arithmetic, the figures, and runs that cannot be used."""

import contextlib
import csv
import importlib
import io
import json
import math
import re
import shlex
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from conftest import write_glue
from safetensors.torch import save_file

import run_glue
import tools
from harness.encoder import TARGETS
from harness.glue import TASKS
from harness.metrics import calibration, reliability
from harness.settings import Settings, exit_status, task_of
from scores import SCORES
from tools import reproduce

HERE = Path(run_glue.__file__).parent
SMALL = ["--model", "tiny", "--max_steps", "100"]
MODULES = [f"bert.encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "key")]


def parsed(argv: list[str]) -> Settings:
    return Settings.from_command_line(argv, "")


def resolved(argv: list[str]) -> dict:
    """What a run of this command line has in its config.json."""
    settings = parsed(argv)
    settings = settings.resolve(task_of(settings).train_size, TARGETS["bert"])
    return json.loads(json.dumps(vars(settings), default=str))


def write_run(
    folder: Path, flags: list[str], best: float, ranks: list[int] | dict | None = None, **config
) -> Path:
    """A finished run with the settings of a command line and a score of our choosing."""
    settings = resolved(flags) | {"output_dir": str(folder), "versions": {"python": "3"}} | config
    metric = TASKS[settings["task"]].metric
    shared = {key: settings[key] for key in ("task", "method", "optimizer", "score", "seed", "demo")}
    if not isinstance(ranks, dict):
        ranks = dict(zip(MODULES, ranks or [2, 2, 2, 2], strict=True))
    patterns = {} if shared["method"] == "full" else ranks
    kept = {"b0": 12, "bT": 8, "kept": sum(patterns.values())}
    record = {"step": 50, metric: best}
    results = shared | {"metric": metric, "best": record, "last": record, "ranks": patterns, "budget": kept}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def output(capsys: pytest.CaptureFixture, *argv: object, status: int = 0) -> tuple[str, str]:
    words = [str(part) for part in argv]
    assert exit_status(lambda: reproduce.main(words), "tools.reproduce") == status
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A function of a command line: the figure that it draws."""

    def draw(*argv: object) -> object:
        figures, save = [], reproduce.figures.save

        def saving(figure: object, path: Path) -> None:
            figures.append(figure)
            save(figure, path)

        picture = tmp_path / "drawn.png"
        with monkeypatch.context() as patch:
            patch.setattr(reproduce.figures, "save", saving)
            reproduce.main([*map(str, argv), "-o", str(picture)])
        assert picture.read_bytes().startswith(b"\x89PNG")
        (figure,) = figures
        return figure

    yield draw
    reproduce.figures.plt.close("all")


def cells(markdown: str) -> dict[str, list[str]]:
    """Of a Markdown table, the cells of each row by its label; the header's is ""."""
    rows = [line[2:-2].split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {row[0].strip(): row[1:] for row in rows if row[0] != "---"}


# --- the grid -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_grid() -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        reproduce.main(["commands"])
    return out.getvalue().splitlines()


def test_the_whole_grid_is_15_rows_of_8_tasks_and_5_seeds_and_every_line_parses(whole_grid: list[str]):
    assert len(whole_grid) == len(set(whole_grid)) == 600
    runs = set()
    for line in whole_grid:
        python, script, *argv = shlex.split(line)
        assert (python, script) == ("python", "run_glue.py")
        args = parsed(argv)
        runs.add((args.task, args.method, args.optimizer, args.score, args.target_rank, args.seed))
    assert len(runs) == 600
    rows = {run[1:5] for run in runs}
    assert len(rows) == 15
    with (HERE / "results/paper_table1.csv").open() as file:
        for row in csv.DictReader(file):
            rank = float(row["rank"]) if row["rank"] else None
            assert (row["method"], row["optimizer"], row["score"] or None, rank) in rows
    assert {run[0] for run in runs} == set(TASKS)
    assert {run[5] for run in runs} == {2021, 2022, 2023, 2024, 2025}


def test_no_two_commands_of_the_grid_share_an_output_folder(whole_grid: list[str]):
    folders = {parsed(shlex.split(line)[2:]).output_dir for line in whole_grid}
    assert len(folders) == 600


def test_the_grid_can_be_narrowed_and_every_line_given_more_flags(capsys: pytest.CaptureFixture):
    narrow = (
        "commands",
        "--tasks",
        "rte",
        "cola",
        "--seeds",
        1,
        "--ranks",
        2,
        "--methods",
        "lora",
        "adalora",
    )
    out, _ = output(capsys, *narrow, "--", "--model", "my model", "--max_steps", 50)
    lines = [parsed(shlex.split(line)[2:]) for line in out.splitlines()]
    assert len(lines) == 2 * (1 + 6)
    assert {(args.model, args.max_steps, args.seed) for args in lines} == {("my model", 50, 1)}


def test_finished_runs_are_missing_from_the_grid_and_others_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    rte = ["--task", "rte", "--method", "lora", "--optimizer", "adamw", "--target_rank", "2"]
    write_run(tmp_path / "rte-lora-adamw-r2-s1", [*rte, "--seed", "1"], 0.8)
    (write_run(tmp_path / "rte-lora-adamw-r2-s3", [*rte, "--seed", "3"], 0.8) / "results.json").unlink()
    which = ("commands", "--tasks", "rte", "--seeds", 1, 2, 3, "--ranks", 2, "--methods", "lora")
    out, _ = output(capsys, *which, "--missing", tmp_path)
    left = [parsed(shlex.split(line)[2:]) for line in out.splitlines()]
    assert [(args.seed, args.resume) for args in left] == [(2, True), (3, True)]
    assert [args.output_dir for args in left] == [tmp_path / f"rte-lora-adamw-r2-s{seed}" for seed in (2, 3)]


def test_a_runs_folder_that_is_not_there_yet_leaves_the_whole_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    out, _ = output(capsys, "commands", "--tasks", "rte", "--missing", tmp_path / "runs")
    assert len(out.splitlines()) == 75
    assert not (tmp_path / "runs").exists()


def test_a_finished_grid_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    which = ("commands", "--tasks", "rte", "--seeds", 1, "--ranks", 2, "--methods", "lora")
    (line,) = output(capsys, *which)[0].splitlines()
    argv = shlex.split(line)[2:]
    write_run(tmp_path / parsed(argv).output_dir.name, argv, 0.8)
    assert output(capsys, *which, "--missing", tmp_path) == ("", "")


@pytest.mark.parametrize(
    "flags",
    [
        ["--tasks", "snli"],
        ["--seeds", "-1"],
        ["--ranks", "x"],
        ["--methods", "ia3"],
        ["--ranks", "0.5"],  # LoRA has no half rank
        ["--", "--score", "mu"],
        ["--", "--seed=5"],
        ["--", "--output_dir", "x"],
        ["--", "--lr", "fast"],
        ["--", "--epochs"],
    ],
)
def test_a_grid_of_commands_that_would_not_run_is_refused(flags: list[str], capsys: pytest.CaptureFixture):
    out, err = output(capsys, "commands", *flags, status=2)
    assert err.startswith("tools.reproduce: error: ")
    assert err.count("\n") == 1
    assert not out


# --- the table ----------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two rows, two tasks; seeds 1 to 3 of cola, of stsb 1 and 2."""
    adamw = [*SMALL, "--optimizer", "adamw", "--score", "sensitivity"]
    ivon = [*SMALL, "--optimizer", "ivon", "--score", "mu"]
    scores = {"cola": ((0.50, 0.52, 0.57), (0.60, 0.60, 0.66)), "stsb": ((0.90, 0.92), (0.80, 0.84))}
    for task, both in scores.items():
        for flags, of_seeds in zip((adamw, ivon), both, strict=True):
            for seed, score in enumerate(of_seeds, start=1):
                folder = tmp_path / f"runs/{task}-{flags[-1]}-{seed}"
                write_run(folder, ["--task", task, *flags, "--seed", str(seed)], score)
    return tmp_path / "runs"


def test_the_table_has_mean_deviation_and_seeds_worked_by_hand(runs: Path, capsys: pytest.CaptureFixture):
    out, err = output(capsys, "table", runs)
    assert err == ""
    # 50, 52, 57: mean 53, squared deviations 9 + 1 + 16 = 26, √(26/2) = 3.606. 60, 60, 66: 62, √(24/2).
    # 90, 92: 91, √(2/1). 80, 84: 82, √(8/1). Averages of the means: (53 + 91)/2 and (62 + 82)/2, both 72.
    assert cells(out) == {
        "": ["CoLA", "STS-B", "average"],
        "AdaLoRA AdamW sensitivity r=2": ["53.00 ± 3.61 (3)", "91.00 ± 1.41 (2)", "72.00"],
        "AdaLoRA IVON mu r=2": ["62.00 ± 3.46 (3)", "82.00 ± 2.83 (2)", "72.00"],
    }
    assert "- CoLA: matthews correlation; 100 updates of 32 examples, at most 64 tokens" in out
    assert "- STS-B: pearson spearman; 100 updates of 32 examples, at most 128 tokens" in out


def test_the_average_is_over_the_tasks_of_the_table_where_a_row_has_them_all(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    whole, part = {"qnli": 0.90, "sst2": 0.94, "cola": 0.60, "rte": 0.70}, ("qnli", "sst2", "cola")
    for task, score in whole.items():
        write_run(tmp_path / task, ["--task", task, *SMALL], score)
        if task in part:
            write_run(tmp_path / f"snr-{task}", ["--task", task, *SMALL, "--score", "snr"], score - 0.01)
    found = cells(output(capsys, "table", tmp_path)[0])
    assert found[""] == ["CoLA", "SST-2", "QNLI", "RTE", "average"]
    assert found["AdaLoRA IVON mu r=2"][-1] == "78.50"
    assert found["AdaLoRA IVON snr r=2"][-2:] == ["", ""]


def test_a_single_task_has_no_average(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_run(tmp_path / "cola", ["--task", "cola", *SMALL], 0.6)
    assert cells(output(capsys, "table", tmp_path)[0])[""] == ["CoLA"]


@pytest.mark.parametrize(
    "other",
    [
        ["--lr", "0.1"],
        ["--hess_init", "0.5"],
        ["--ess", "100"],
        ["--orth", "0.2"],
        ["--squared_orth"],
        ["--tinit", "7"],
        ["--init_rank", "4"],
        ["--alpha", "16"],
        ["--targets", "query"],
        ["--max_steps", "101"],
        ["--batch_size", "16"],
        ["--max_length", "32"],
        ["--eval_every", "10"],
        ["--group_by_length"],
        ["--mc_samples", "2"],
    ],
)
def test_runs_that_differ_in_a_setting_are_never_averaged_together(
    other: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    for seed in (1, 2, 3):
        more = other if seed == 3 else []
        write_run(tmp_path / f"{seed}", ["--task", "cola", *SMALL, *more, "--seed", str(seed)], seed / 10)
    out, _ = output(capsys, "table", tmp_path)
    label = other[0].removeprefix("--").replace("max_steps", "total_steps")
    departing = [(name, row) for name, row in cells(out).items() if "30.00 (1)" in row]
    assert ["15.00 ± 7.07 (2)"] in cells(out).values()
    assert [(label in name, row) for name, row in departing] == [(True, ["30.00 (1)"])]


def test_settings_that_are_almost_the_same_are_still_different(tmp_path: Path, capsys: pytest.CaptureFixture):
    for seed, lr in ((1, 0.1), (2, 0.10000001)):
        flags = ["--task", "cola", *SMALL, "--lr", str(lr), "--seed", str(seed)]
        write_run(tmp_path / f"{seed}", flags, 0.5)
    out, _ = output(capsys, "table", tmp_path)
    assert [row for label, row in cells(out).items() if label] == [["50.00 (1)"], ["50.00 (1)"]]


def test_runs_that_differ_in_where_they_ran_are_one_row(tmp_path: Path, capsys: pytest.CaptureFixture):
    flags = ["--task", "cola", *SMALL]
    write_run(tmp_path / "1", [*flags, "--seed", "1", "--device", "cuda:1"], 0.5, git_commit="a", threads=8)
    write_run(tmp_path / "2", [*flags, "--seed", "2", "--track_scores"], 0.6, git_commit="b", threads=1)
    out, _ = output(capsys, "table", tmp_path)
    assert [row for label, row in cells(out).items() if label] == [["55.00 ± 7.07 (2)"]]


def test_each_model_has_its_own_table(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name in ("one", "two"):
        write_run(tmp_path / name, ["--task", "cola", "--model", name, "--max_steps", "100"], 0.5)
    out, _ = output(capsys, "table", tmp_path)
    assert out.count("| AdaLoRA IVON mu r=2 | 50.00 (1) |") == 2
    assert "`one`" in out
    assert "`two`" in out


def test_runs_of_another_number_of_processes_are_not_averaged(tmp_path: Path, capsys: pytest.CaptureFixture):
    for seed, processes in ((1, 1), (2, 1), (3, 2)):
        write_run(tmp_path / str(seed), ["--task", "cola", "--seed", str(seed)], 0.5, processes=processes)
    out, _ = output(capsys, "table", tmp_path)
    assert "50.00 ± 0.00 (2)" in out
    assert "(processes 2)" in out


# --- named settings -----------------------------------------------------------------------------------------

GROUP = ["--hess_init", "1e-4", "--beta2", "0.999"]
NAMED = ["--name", "fast", "hess_init=1e-4", "beta2=0.999", "lr=*"]


def test_a_group_of_settings_can_be_named_whatever_the_value_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    write_run(tmp_path / "cola", ["--task", "cola", *SMALL, *GROUP, "--lr", "8000"], 0.5)
    write_run(tmp_path / "stsb", ["--task", "stsb", *SMALL, *GROUP, "--lr", "22000"], 0.7)
    write_run(tmp_path / "usual", ["--task", "stsb", *SMALL], 0.6)
    out, _ = output(capsys, "table", tmp_path, *NAMED)
    assert cells(out) == {
        "": ["CoLA", "STS-B", "average"],
        "AdaLoRA IVON mu r=2": ["", "60.00 (1)", ""],
        "AdaLoRA IVON mu r=2 (fast)": ["50.00 (1)", "70.00 (1)", "60.00"],
    }


def test_what_is_not_in_the_named_group_stays_in_the_label(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_run(tmp_path / "a", ["--task", "cola", *SMALL, *GROUP, "--lr", "8000", "--orth", "0.7"], 0.5)
    write_run(tmp_path / "b", ["--task", "cola", *SMALL], 0.5)
    out, _ = output(capsys, "table", tmp_path, *NAMED)
    assert "AdaLoRA IVON mu r=2 (fast, orth 0.7)" in cells(out)


@pytest.mark.parametrize("flags", [["--hess_init", "2e-4", "--beta2", "0.999", "--lr", "1"], GROUP])
def test_a_name_is_only_for_runs_with_all_its_settings(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    write_run(tmp_path / "a", ["--task", "cola", *SMALL, *flags], 0.5)
    write_run(tmp_path / "b", ["--task", "cola", *SMALL], 0.5)
    assert "fast" not in output(capsys, "table", tmp_path, *NAMED)[0]


def test_several_groups_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    for i, flags in enumerate(([*GROUP, "--lr", "1"], ["--squared_orth"], [])):
        write_run(tmp_path / str(i), ["--task", "cola", *SMALL, *flags], 0.5)
    out, _ = output(capsys, "table", tmp_path, *NAMED, "--name", "[A] eq. 4", "squared_orth=True")
    assert set(cells(out)) == {
        "", "AdaLoRA IVON mu r=2", "AdaLoRA IVON mu r=2 (fast)", "AdaLoRA IVON mu r=2 ([A] eq. 4)"
    }  # fmt: skip


@pytest.mark.parametrize("name", [["label"], ["label", "lr"], []])
def test_a_name_without_settings_is_refused(name: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    write_run(tmp_path / "run", ["--task", "cola", *SMALL], 0.5)
    _, err = output(capsys, "table", tmp_path, "--name", *name, status=2)
    assert err.startswith("tools.reproduce: error: ")
    assert "--name" in err
    assert err.count("\n") == 1


def test_settings_that_all_rows_share_are_in_the_caption_and_in_no_label(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    shared = ["--hess_init", "0.25", "--orth", "0.5"]
    write_run(tmp_path / "a", ["--task", "cola", *SMALL, *shared], 0.5)
    write_run(tmp_path / "b", ["--task", "cola", *SMALL, *shared, "--beta2", "0.9"], 0.5)
    out, _ = output(capsys, "table", tmp_path)
    assert set(cells(out)) == {"", "AdaLoRA IVON mu r=2", "AdaLoRA IVON mu r=2 (beta2 0.9)"}
    (line,) = [line for line in out.splitlines() if line.startswith("All rows: ")]
    assert set(line.removeprefix("All rows: ").rstrip(".").split(", ")) == {"hess_init 0.25", "orth 0.5"}


def test_a_caption_without_shared_settings_has_no_word_of_them(runs: Path, capsys: pytest.CaptureFixture):
    assert "All rows" not in output(capsys, "table", runs)[0]


def test_names_are_for_figures_too(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_run(tmp_path / "a", ["--task", "cola", *SMALL, *GROUP, "--lr", "1"], 0.5)
    out, _ = output(capsys, "ranks", tmp_path, *NAMED)
    assert out.splitlines()[0] == "CoLA, AdaLoRA IVON mu r=2 (fast), 1 seed"


# --- what is left out ---------------------------------------------------------------------------------------


def test_demo_runs_and_unfinished_runs_stay_out_of_the_table_by_name(
    runs: Path, capsys: pytest.CaptureFixture
):
    expected, _ = output(capsys, "table", runs)
    write_run(runs / "demo", ["--demo"], 0.99)
    (write_run(runs / "stopped", ["--task", "cola", *SMALL, "--seed", "9"], 0.99) / "results.json").unlink()
    out, err = output(capsys, "table", runs)
    assert out == expected
    assert "demo: a demo run" in err
    assert "stopped: not finished" in err


BROKEN = {
    "half": '{"task": "cola", "method": "ada',
    "empty": "",
    "list": "[1, 2]",
    "number": "3",
    "foreign": '{"name": "my-package", "version": 1}',
    "deep": "[" * 100_000,
    "binary": "\x00\x01",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", ["config.json", "results.json"])
@pytest.mark.parametrize("verb", ["table", "ranks", "curves", "agreement"])
def test_a_broken_or_foreign_file_is_skipped_by_name_whoever_reads_it(
    verb: str, name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = write_run(tmp_path / "runs/broken", ["--task", "cola", *SMALL], 0.5)
    (folder / name).write_text(content)
    _, err = output(capsys, verb, tmp_path / "runs", status=2)
    skipped, error = err.splitlines()
    assert skipped.startswith(f"skipped {folder}: ")
    assert error.startswith("tools.reproduce: error: there is no run for this in ")


@pytest.mark.parametrize(
    "change",
    [
        {"best": None},
        {"best": {"matthews_correlation": math.nan}},
        {"best": {"matthews_correlation": "0.5"}},
        {"best": {"accuracy": 0.5}},
        {"metric": ["matthews_correlation"]},
        {"ranks": None},
        {"ranks": {"a": "2"}},
        {"seed": 7},
        {"task": "rte"},
    ],
)
def test_results_that_make_no_sense_are_skipped_by_name(
    change: dict, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = write_run(tmp_path / "run", ["--task", "cola", *SMALL], 0.5)
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | change))
    _, err = output(capsys, "table", tmp_path, status=2)
    assert err.splitlines()[0].startswith(f"skipped {folder}: ")


@pytest.mark.parametrize(
    "change",
    [
        {"task": ["cola"]},
        {"score": "nonsense"},
        {"batch_size": [32]},
        {"batch_size": 0},
        {"model": None},
        {"total_steps": "many"},
        {"target_rank": {}},
        {"seed": None},
        {"method": 3},
        {"max_length": [64]},
        {"eval_every": {}},
        {"target_rank": "2"},
        {"budget": 3},
    ],
)
def test_settings_that_make_no_sense_are_skipped_by_name(
    change: dict, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = write_run(tmp_path / "run", ["--task", "cola", *SMALL], 0.5)
    for file in (folder / "config.json", folder / "results.json"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {key: new for key, new in change.items() if key in content}))
    _, err = output(capsys, "table", tmp_path, status=2)
    assert err.splitlines()[0].startswith(f"skipped {folder}: ")


def test_a_run_that_is_there_twice_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name in ("a", "copy of a"):
        write_run(tmp_path / name, ["--task", "cola", *SMALL], 0.5)
    out, err = output(capsys, "table", tmp_path)
    assert "| 50.00 (1) |" in out
    assert "skipped" in err
    assert "copy of a: the same settings and seed as" in err
    again, err = output(capsys, "table", tmp_path / "a", tmp_path / "a")
    assert again == out
    assert err == ""


def test_a_folder_with_no_runs_is_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    for verb in ("table", "ranks", "curves", "agreement"):
        for folder in (tmp_path, tmp_path / "absent"):
            _, err = output(capsys, verb, folder, status=2)
            assert err.startswith("tools.reproduce: error: ")
            assert err.count("\n") == 1


def test_the_table_in_the_docs_is_what_its_command_gives(capsys: pytest.CaptureFixture, monkeypatch):
    page = HERE / "docs/results.md"
    if not page.exists():
        pytest.skip("there is no docs/results.md")
    text = page.read_text()
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)]
    lines = [line for block in blocks for line in block.splitlines()]
    command = next(line for line in lines if line.startswith("python -m tools.reproduce table"))
    monkeypatch.chdir(HERE)
    out, err = output(capsys, *shlex.split(command, comments=True)[3:])
    assert err == ""
    assert out in text


# --- figures ------------------------------------------------------------------------------------------------


@pytest.fixture
def patterns(tmp_path: Path) -> Path:
    mu, snr = (["--task", "cola", *SMALL, "--score", score] for score in ("mu", "snr"))
    write_run(tmp_path / "runs/a1", [*mu, "--seed", "1"], 0.5, [3, 0, 2, 3])
    write_run(tmp_path / "runs/a2", [*mu, "--seed", "2"], 0.5, [2, 1, 2, 3])
    write_run(tmp_path / "runs/b", [*snr, "--seed", "1"], 0.5, [1, 1, 3, 3])
    return tmp_path / "runs"


def test_ranks_are_a_grid_of_text_averaged_over_seeds(patterns: Path, capsys: pytest.CaptureFixture):
    out, _ = output(capsys, "ranks", patterns)
    snr, mu = (block.splitlines() for block in out.strip().split("\n\n"))
    assert snr[0] == "CoLA, AdaLoRA IVON snr r=2, 1 seed"
    assert mu[0] == "CoLA, AdaLoRA IVON mu r=2, 2 seeds"
    assert [line.split() for line in mu[1:]] == [
        ["layer", "attention.self.query", "attention.self.key"],
        ["0", "2.5", "0.5"],
        ["1", "2", "3"],
    ]
    assert snr[2].split() == ["0", "1", "1"]


def test_the_heat_maps_show_the_ranks_on_one_colour_scale(patterns: Path, drawn):
    figure = drawn("ranks", patterns)
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert [image.get_array().tolist() for image in images] == [
        [[1, 3], [1, 3]],  # modules down, layers across
        [[2.5, 2], [0.5, 3]],
    ]
    assert {image.get_clim() for image in images} == {(0, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("scores", [["snr"], ["snr", "mu"], ["snr", "mu", "inv_sigma"], list(SCORES)[:5]])
@pytest.mark.parametrize("verb", ["ranks", "curves"])
def test_long_names_overlap_nothing_in_the_figures(verb: str, scores: list[str], tmp_path: Path, drawn):
    flags = (
        "--task cola --hess_init 0.0001 --beta2 0.999 --ess 10000000 --clip_radius 0.002 --lr 8000".split()
    )
    for score in scores:
        run = write_run(tmp_path / score, [*flags, "--score", score], best=0.5)
        lines = [{"step": 50, "split": "validation", "matthews_correlation": 0.5}, {"step": 1, "budget": 12}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = drawn(verb, tmp_path)
    figure.canvas.draw()
    panels = [axis for axis in figure.axes if axis.images or axis.lines]
    boxes = [axis.get_window_extent() for axis in panels]
    texts = [axis.title for axis in panels if axis.get_title()]
    texts += [axis.get_legend() for axis in panels if axis.get_legend()]
    texts += figure.legends
    assert texts
    extents = [text.get_window_extent() for text in texts]
    width, height = figure.canvas.get_width_height()
    for i, extent in enumerate(extents):
        assert not any(extent.overlaps(other) for other in [*boxes, *extents[:i], *extents[i + 1 :]])
        assert 0 <= extent.x0 < extent.x1 <= width
        assert 0 <= extent.y0 < extent.y1 <= height


OTHER_MAPS = {  # ranks, and how many modules and layers they are
    "no layer numbers": ({"query": 3, "key": 0, "projection": 2}, (3, 1)),
    "one map": ({"net.0.linear": 3}, (1, 1)),
    "maps that not all layers have": (
        {
            **{f"h.{i}.{part}": i + 1 for i in range(3) for part in ("q", "k", "v", "o", "up", "down")},
            "h.0.gate": 5,
            "shared.projection": 4,
        },
        (8, 4),
    ),
}


@pytest.mark.parametrize("maps", OTHER_MAPS)
def test_ranks_of_any_maps_are_a_table_and_a_figure(
    maps: str, tmp_path: Path, drawn, capsys: pytest.CaptureFixture
):
    ranks, shape = OTHER_MAPS[maps]
    write_run(tmp_path / "run", ["--task", "cola", *SMALL], 0.5, ranks)
    out, _ = output(capsys, "ranks", tmp_path / "run")
    numbers = [int(word) for line in out.splitlines()[2:] for word in line[5:].split()]
    assert sorted(numbers) == sorted(ranks.values())
    (image,) = [axis.images[0] for axis in drawn("ranks", tmp_path / "run").axes if axis.images]
    grid = np.ma.filled(image.get_array().astype(float), np.nan)
    assert grid.shape == shape
    assert sorted(grid[~np.isnan(grid)]) == sorted(ranks.values())


@pytest.mark.parametrize("n", [1, 3, 5])
def test_any_number_of_heat_maps_makes_a_figure(n: int, tmp_path: Path, drawn):
    for score in list(SCORES)[:n]:
        write_run(tmp_path / score, ["--task", "cola", *SMALL, "--score", score], 0.5)
    assert sum(bool(axis.images) for axis in drawn("ranks", tmp_path).axes) == n


def test_ranks_of_different_adapters_cannot_share_a_figure(patterns: Path, capsys: pytest.CaptureFixture):
    results = json.loads((patterns / "b/results.json").read_text())
    results["ranks"] = {"bert.encoder.layer.7.attention.self.query": 2}
    (patterns / "b/results.json").write_text(json.dumps(results))
    _, err = output(capsys, "ranks", patterns / "a1", patterns / "b", status=2)
    assert err.count("\n") == 1
    assert "different adapters" in err


def test_full_fine_tuning_has_no_ranks_to_draw(patterns: Path, capsys: pytest.CaptureFixture):
    full = ["--task", "cola", "--method", "full", "--optimizer", "adamw", *SMALL]
    folder = write_run(patterns.parent / "full", full, 0.5)
    expected, _ = output(capsys, "ranks", patterns)
    out, err = output(capsys, "ranks", patterns, folder)
    assert out == expected
    assert f"skipped {folder}" in err
    _, err = output(capsys, "ranks", folder, status=2)
    assert "error: there is no run for this in" in err


def test_the_curves_are_the_mean_over_seeds_with_their_range_and_the_budget_under_it(tmp_path: Path, drawn):
    for seed, shift in ((1, 0.0), (2, 0.2)):
        folder = write_run(tmp_path / f"runs/{seed}", ["--task", "cola", *SMALL, "--seed", str(seed)], 0.5)
        lines = [{"step": t, "loss": 1.0, "lr": 0.1, "budget": 12 - t} for t in range(1, 5)]
        lines += [{"step": t, "split": "validation", "matthews_correlation": t / 10 + shift} for t in (2, 4)]
        (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    figure = drawn("curves", tmp_path / "runs")
    score, budget = figure.axes
    assert score.lines[0].get_xydata().ravel().tolist() == pytest.approx([2, 0.3, 4, 0.5])
    assert budget.lines[0].get_xydata().tolist() == [[1, 11], [2, 10], [3, 9], [4, 8]]
    low, high = score.collections[0].get_paths()[0].vertices[:, 1].min(), 0.6
    assert (low, score.collections[0].get_paths()[0].vertices[:, 1].max()) == pytest.approx((0.2, high))


def test_curves_can_be_of_what_ivon_was_doing(bert: Path, tmp_path: Path, drawn):
    data = ["--data_dir", str(write_glue(tmp_path / "glue", "cola")), "--model", str(bert)]
    shape = ["--max_steps", "8", "--eval_every", "4", "--max_length", "16", "--batch_size", "8"]
    run_glue.main(["--task", "cola", *data, *shape, "--output_dir", str(tmp_path / "run")])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = [line["optimizer"] for line in lines if "optimizer" in line]
    assert set(found[0]) == set(reproduce.DIAGNOSTICS)
    for name in ("clipped", "sigma"):
        score, _ = drawn("curves", tmp_path / "run", "--of", name).axes
        assert score.lines[0].get_ydata().tolist() == [values[name] for values in found]


def test_a_demo_run_is_never_averaged_with_another(tmp_path: Path, capsys: pytest.CaptureFixture):
    demo = ["--demo", "--seed", "1"]
    write_run(tmp_path / "a", demo, 0.5)
    like_it = {**resolved(demo), "demo": False, "seed": 2}
    write_run(tmp_path / "b", ["--demo", "--seed", "2"], 0.5, **like_it)
    out, _ = output(capsys, "ranks", tmp_path)
    assert sum("1 seed" in line for line in out.splitlines()) == 2


def test_encoders_of_one_name_and_other_weights_are_never_averaged(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    for seed, encoder in ((1, "aa"), (2, "aa"), (3, "bb")):
        write_run(tmp_path / f"{seed}", ["--task", "cola", *SMALL, "--seed", str(seed)], 0.5, encoder=encoder)
    out, _ = output(capsys, "table", tmp_path)
    assert [row for label, row in cells(out).items() if label] == [["50.00 ± 0.00 (2)"], ["50.00 (1)"]]
    assert "(encoder bb)" in out


def test_runs_on_other_data_are_never_averaged(tmp_path: Path, capsys: pytest.CaptureFixture):
    for seed, data in ((1, "aa"), (2, "aa"), (3, "bb")):
        write_run(tmp_path / f"{seed}", ["--task", "cola", *SMALL, "--seed", str(seed)], 0.5, data=data)
    out, _ = output(capsys, "table", tmp_path)
    assert [row for label, row in cells(out).items() if label] == [["50.00 ± 0.00 (2)"], ["50.00 (1)"]]
    assert "(data bb)" in out


def test_two_models_have_two_names_and_their_chance_is_worked_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    for model in ("one", "two"):
        folder = write_run(tmp_path / model, ["--task", "cola", "--model", model, "--max_steps", "100"], 0.5)
        pairs = {"mu/snr": 0.5}
        line = {"step": 1, "budget": 8, "sigma_cv": 0.1, "spearman": pairs, "jaccard": pairs}
        (folder / "score_agreement.jsonl").write_text(json.dumps(line) + "\n")
    out, _ = output(capsys, "agreement", tmp_path)
    blocks = out.strip().split("\n\n")
    assert [block.splitlines()[0].split(", ")[-2].split(":")[0] for block in blocks] == ["one", "two"]
    assert all("chance): 0.500" in block for block in blocks)  # 8 of 12: 8/(24 − 8)


def test_a_half_written_journal_is_skipped_by_name(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = write_run(tmp_path / "run", ["--task", "cola", *SMALL], 0.5)
    for verb, name in (("curves", "metrics.jsonl"), ("agreement", "score_agreement.jsonl")):
        odd = (
            '{"step": 1, "split": "validation"}\n',
            '{"step": 1, "budget": null, "spearman": 3}\n',
            '{"step": 1, "budget": 3}\n',
            "[" * 9999,
        )
        for content in (None, "", '{"step": 1}\n{"st', "[1]\n", '{"loss": 3}\n', *odd):
            if content is not None:
                (folder / name).write_text(content)
            _, err = output(capsys, verb, tmp_path, "-o", tmp_path / "x.png", status=2)
            skipped, error = err.splitlines()
            assert skipped.startswith(f"skipped {folder}: ")
            assert error.startswith("tools.reproduce: error: there is no run for this in ")
    assert not (tmp_path / "x.png").exists()


def test_agreement_is_that_of_the_last_allocation_averaged_over_seeds_with_its_course(
    tmp_path: Path, drawn, capsys: pytest.CaptureFixture
):
    numbers = {1: (0.2, 0.4), 2: (0.6, 1.0)}
    for seed, values in numbers.items():
        flags = ["--task", "cola", *SMALL, "--seed", str(seed), "--track_scores"]
        folder = write_run(tmp_path / f"runs/{seed}", flags, 0.5)
        with (folder / "score_agreement.jsonl").open("w") as file:
            for t, value in enumerate(values, start=1):
                pairs = {"mu/snr": value, "mu/lambda": None, "snr/lambda": -0.5}
                line = {"step": t, "budget": 8, "sigma_cv": value * t, "spearman": pairs}
                line["jaccard"] = {"mu/snr": 0.25, "mu/lambda": 0.5, "snr/lambda": 1.0}
                file.write(json.dumps(line) + "\n")
    out, _ = output(capsys, "agreement", tmp_path / "runs")
    lines = [line.split() for line in out.splitlines()]
    assert out.splitlines()[0] == "CoLA, AdaLoRA IVON mu r=2, 2 seeds: at the last allocation, step 2"
    # Spearman above the diagonal, Jaccard below it; nothing where a correlation is not defined.
    mean = statistics.fmean([0.4, 1.0])
    assert lines[1:5] == [
        ["mu", "snr", "lambda"],
        ["mu", f"{mean:.3f}"],
        ["snr", "0.250", "-0.500"],
        ["lambda", "0.500", "1.000"],
    ]
    assert "coefficient of variation of σ at the last allocation: 1.4" in out
    assert "chance): 0.500" in out
    assert "Spearman of mu and snr, from step 1 to 2: 0.400, 0.700" in out
    figure = drawn("agreement", tmp_path / "runs")
    shown = np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)
    assert shown == pytest.approx(
        np.array([[np.nan, mean, np.nan], [0.25, np.nan, -0.5], [0.5, 1.0, np.nan]]), nan_ok=True
    )
    _, course, variation = figure.axes
    assert course.lines[0].get_xydata() == pytest.approx(np.array([[1, 0.4], [2, 0.7]]))
    assert variation.lines[0].get_xydata() == pytest.approx(np.array([[1, 0.4], [2, 1.4]]))


def test_agreement_of_a_run_without_a_posterior_has_no_variation_of_sigma(
    tmp_path: Path, drawn, capsys: pytest.CaptureFixture
):
    flags = ["--task", "cola", *SMALL, "--optimizer", "adamw", "--score", "sensitivity", "--track_scores"]
    pairs = {"mu/sensitivity": 0.5}
    line = {"step": 1, "budget": 0, "sigma_cv": None, "spearman": pairs, "jaccard": pairs}
    (write_run(tmp_path / "run", flags, 0.5) / "score_agreement.jsonl").write_text(json.dumps(line) + "\n")
    out, _ = output(capsys, "agreement", tmp_path / "run")
    assert "variation" not in out
    assert "chance): 1.000" in out  # all sets of no triplets are the same
    assert not drawn("agreement", tmp_path / "run").axes[-1].lines


@pytest.mark.parametrize("target", ["absent/ranks.png", "ranks.docx", "runs"])
def test_a_picture_that_cannot_be_written_is_an_error_in_one_line(
    target: str, patterns: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    before = sorted(tmp_path.rglob("*"))
    _, err = output(capsys, "ranks", patterns, "-o", tmp_path / target, status=2)
    assert err.startswith("tools.reproduce: error: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["", ".", "/dev/null"])
def test_a_picture_needs_a_files_name(target: str, patterns: Path, capsys: pytest.CaptureFixture):
    _, err = output(capsys, "ranks", patterns, "-o", target, status=2)
    assert err.count("\n") == 1
    assert Path("/dev/null").is_char_device()


def test_without_matplotlib_tables_work_and_pictures_say_what_is_missing(
    patterns: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    for name in ("figures", "reproduce"):
        monkeypatch.delitem(sys.modules, f"tools.{name}")
        monkeypatch.setattr(tools, name, getattr(tools, name))
    without = importlib.import_module("tools.reproduce")
    delattr(tools, "figures")
    monkeypatch.setattr(without, "figures", importlib.import_module("tools.figures"))
    picture = ["-o", str(tmp_path / "x.png")]
    for argv, status in ((["table"], 0), (["ranks"], 0), (["ranks", *picture], 2), (["curves"], 2)):
        words = [argv[0], str(patterns), *argv[1:]]
        assert exit_status(lambda words=words: without.main(words), "tools.reproduce") == status
        err = capsys.readouterr().err
        assert ("pictures need matplotlib: pip install matplotlib" in err) == (status == 2)


# --- prediction ---------------------------------------------------------------------------------------------


def evaluate(folder: Path, nll: dict[tuple[int, float], float], p: dict[str, list] | None = None) -> None:
    """What tools.evaluate leaves."""
    where = {"model": "tiny", "data_dir": None, "seed": 1, "seconds": 2.5}
    rows = [
        {"split": "validation", "samples": n, "temperature": tau, "matthews_correlation": 0.5}
        | {"accuracy": 0.75, "nll": value, "ece": 0.1, "brier": 0.4}
        | where
        for (n, tau), value in nll.items()
    ]
    rows = [rows[0] | {"split": "train", "nll": 99.0}, *rows]
    (folder / "evaluation.json").write_text(json.dumps({"evaluations": rows}))
    if p:
        tensors = {f"validation.{name}": torch.tensor(values) for name, values in p.items()}
        save_file(tensors, folder / "predictions.safetensors", metadata={"evaluations": json.dumps(rows)})


P = {"labels": [1, 0, 1], "mean": [[0.35, 0.65], [0.05, 0.95], [0.38, 0.62]], "tau=1": [[0.5, 0.5]] * 3}


@pytest.fixture
def evaluations(tmp_path: Path) -> Path:
    for seed, shift in ((1, 0.0), (2, 0.2)):
        folder = write_run(tmp_path / f"runs/{seed}", ["--task", "cola", *SMALL, "--seed", str(seed)], 0.5)
        nll = {(0, 0.0): 0.5 + shift, (10, 0.0): 0.5 + shift, (10, 0.5): 0.4 + shift, (10, 1.0): 0.3 + shift}
        evaluate(folder, nll, P)
    return tmp_path / "runs"


def test_the_calibration_table_has_means_and_deviations_of_mean_and_draws(
    evaluations: Path, capsys: pytest.CaptureFixture
):
    out, _ = output(capsys, "calibration", evaluations)
    lines = [line.strip("| ").split(" | ") for line in out.splitlines()]
    assert lines[0][-7:] == ["prediction", "seeds", "score", "accuracy", "NLL", "ECE", "Brier"]
    name = "CoLA, AdaLoRA IVON mu r=2"
    same = ["50.00 ± 0.00", "75.00 ± 0.00"], ["10.00 ± 0.00", "0.4000 ± 0.0000"]
    # Two numbers 0.2 apart: their deviation is 0.2/√2.
    assert lines[2:] == [
        [name, how, "2", *same[0], f"{mean} ± 0.1414", *same[1]]
        for how, mean in (
            ("mean", "0.6000"),
            ("10 draws, τ = 0", "0.6000"),
            ("10 draws, τ = 0.5", "0.5000"),
            ("10 draws, τ = 1", "0.4000"),
        )
    ]


def test_a_task_judged_by_accuracy_has_it_as_its_score_too(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = write_run(tmp_path / "run", ["--task", "sst2", *SMALL], 0.5)
    evaluate(folder, {(0, 0.0): 0.5})
    (line,) = output(capsys, "calibration", tmp_path)[0].splitlines()[2:]
    assert line.split(" | ")[2:] == ["1", "75.00", "75.00", "0.5000", "10.00", "0.4000 |"]


def test_the_reliability_diagram_has_the_bins_of_all_seeds_together(evaluations: Path, drawn):
    p = np.array([[0.35, 0.65], [0.05, 0.95], [0.3, 0.7], [0.0, 1.0]])
    counts, confidence, accuracy = reliability(p, np.array([1, 0, 0, 1]))
    assert counts.tolist() == [0, 0, 0, 0, 0, 0, 2, 0, 0, 2]
    assert (confidence[6], accuracy[6], confidence[9], accuracy[9]) == (0.675, 0.5, 0.975, 0.5)
    assert np.isnan(accuracy[0])
    gap = (counts * abs(accuracy - confidence))[counts > 0].sum() / 4
    assert gap == pytest.approx(calibration(p, [1, 0, 0, 1])["ece"])
    figure = drawn("calibration", evaluations)
    diagram, histogram = figure.axes
    mean = diagram.lines[1].get_xydata()
    drawn = mean[~np.isnan(mean).any(1)]
    assert drawn == pytest.approx(np.array([[0.635, 1.0], [0.95, 0.0]]))  # [0.65, 0.62] right, 0.95 wrong
    heights = [bar.get_height() for bar in histogram.patches]
    assert heights == [
        0,
        0,
        0,
        0,
        0,
        0,
        4,
        0,
        0,
        2,
        *[0, 0, 0, 0, 6, 0, 0, 0, 0, 0],
    ]  # two runs; then the draws


def test_error_and_nll_are_drawn_against_the_temperature(
    evaluations: Path, drawn, capsys: pytest.CaptureFixture
):
    figure = drawn("temperature", evaluations)
    error, nll = (axis.lines[0].get_xydata() for axis in figure.axes)
    assert error == pytest.approx(np.array([[0, 50], [0.5, 50], [1, 50]]))
    assert nll == pytest.approx(np.array([[0, 0.6], [0.5, 0.5], [1, 0.4]]))
    assert "10 draws, τ = 0.5" in output(capsys, "temperature", evaluations)[0]


def test_without_draws_there_is_no_picture_of_the_temperature(tmp_path: Path, capsys: pytest.CaptureFixture):
    evaluate(write_run(tmp_path / "run", ["--task", "cola", *SMALL], 0.5), {(0, 0.0): 0.5})
    _, err = output(capsys, "temperature", tmp_path, "-o", tmp_path / "x.png", status=2)
    assert "nothing to plot" in err
    assert not (tmp_path / "x.png").exists()


def test_an_evaluation_with_model_and_data_in_another_place_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = write_run(tmp_path / "run", ["--task", "cola", *SMALL], 0.5)
    evaluate(folder, {(0, 0.0): 0.5})
    path = folder / "evaluation.json"
    path.write_text(path.read_text().replace('"tiny"', '"elsewhere"'))
    path.write_text(path.read_text().replace('"data_dir": null', '"data_dir": "moved"'))
    assert "0.5000" in output(capsys, "calibration", tmp_path)[0]


def test_the_table_says_where_runs_are_judged_on_a_share_of_train(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    write_run(tmp_path / "run", ["--task", "cola", *SMALL, "--holdout", "0.1"], 0.5)
    assert " on 0.1 of train" in output(capsys, "table", tmp_path)[0]


@pytest.mark.parametrize("verb", ["calibration", "temperature"])
@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        "{}",
        '{"evaluations": 3}',
        '{"evaluations": [{"split": "validation"}]}',
        '{"evaluations": []}',
    ],
)
def test_runs_without_an_evaluation_are_skipped_by_name(
    verb: str, content: str | None, evaluations: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    expected, _ = output(capsys, verb, evaluations)
    folder = write_run(tmp_path / "more/x", ["--task", "cola", *SMALL, "--score", "snr"], 0.5)
    if content is not None:
        (folder / "evaluation.json").write_text(content)
    out, err = output(capsys, verb, evaluations, tmp_path / "more")
    assert out == expected
    assert f"skipped {folder}" in err
    _, err = output(capsys, verb, tmp_path / "more", status=2)
    assert "error: there is no run for this in" in err.splitlines()[-1]


@pytest.mark.parametrize("change", [{"nll": math.nan}, {"matthews_correlation": "high"}])
def test_an_evaluation_that_is_damaged_is_skipped_by_name(
    change: dict, evaluations: Path, capsys: pytest.CaptureFixture
):
    path = evaluations / "1/evaluation.json"
    rows = json.loads(path.read_text())["evaluations"]
    path.write_text(json.dumps({"evaluations": [row | change for row in rows]}))
    out, err = output(capsys, "calibration", evaluations)
    assert f"skipped {path.parent}" in err
    assert "| 1 | 50.00 | 75.00 | 0.7000 |" in out


def test_draws_that_only_some_runs_have_are_counted(evaluations: Path, capsys: pytest.CaptureFixture):
    evaluate(evaluations / "2", {(0, 0.0): 0.7, (20, 1.0): 0.5})
    out, _ = output(capsys, "calibration", evaluations)
    counts = {line.split(" | ")[1]: line.split(" | ")[2] for line in out.splitlines()[2:]}
    some = ("10 draws, τ = 0", "10 draws, τ = 0.5", "10 draws, τ = 1", "20 draws, τ = 1")
    assert counts == {"mean": "2", **dict.fromkeys(some, "1")}


@pytest.mark.parametrize("damage", ["gone", "half", "another's"])
def test_damaged_predictions_are_an_error_in_one_line(
    damage: str, evaluations: Path, capsys: pytest.CaptureFixture
):
    path = evaluations / "1/predictions.safetensors"
    if damage == "gone":
        path.unlink()
    elif damage == "half":
        path.write_bytes(path.read_bytes()[:40])
    else:
        save_file({"test.mean": torch.zeros(2, 2)}, path)
    _, err = output(capsys, "calibration", evaluations, "-o", evaluations / "r.png", status=2)
    assert "predictions.safetensors" in err
    assert err.count("\n") == 1
    assert not (evaluations / "r.png").exists()


# --- the study ----------------------------------------------------------------------------------------------


def study_lines(capsys: pytest.CaptureFixture, out: Path) -> list[list[str]]:
    lines = output(capsys, "study", out, "--", "--model", "tiny", "--data_dir", "glue")[0].splitlines()
    return [shlex.split(line)[1:] for line in lines]


def finish(argv: list[str], last: float) -> None:
    folder = Path(argv[argv.index("--output_dir") + 1])
    write_run(folder, [word for word in argv if word not in ("tiny", "--model")], last)


def test_the_study_searches_first_and_then_runs_fresh_seeds_at_what_it_chose(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    lines = study_lines(capsys, tmp_path)
    settings = [parsed(argv[1:]) for argv in lines]
    assert len(settings) == 3 * 4 * 6
    assert {(s.seed, s.holdout, s.max_steps, s.eval_every) for s in settings} == {(1, 0.1, 600, 600)}
    cola = [argv for argv, s in zip(lines, settings, strict=True) if s.task == "cola"]
    for i, argv in enumerate(cola):  # of each row's six trials the fourth is the best
        finish(argv[1:], 0.5 if i % 6 == 3 else 0.1)
    lines = study_lines(capsys, tmp_path)
    chosen = [parsed(argv[1:]) for argv in lines if argv[argv.index("--task") + 1] == "cola"]
    assert len(chosen) == 8 * 8 + 4 * 5 + 2 * 3
    assert {s.seed for s in chosen} == set(range(11, 19))
    assert {s.lr for s in chosen if s.optimizer == "adamw"} == {2e-3}
    mu = next(s for s in chosen if s.optimizer == "ivon" and s.method == "adalora")
    held, noiseless = (
        next(s for s in chosen if f"adalora-ivon-{name}" in str(s.output_dir))
        for name in ("held", "noiseless")
    )
    assert (held.beta2, held.ess, held.lr) == (1, mu.ess, mu.lr)
    assert (noiseless.beta2, noiseless.ess, noiseless.lr) == (1, 1e30, mu.lr)
    finish(next(argv for argv in lines if "lora-ivon-s11" in " ".join(argv))[1:], 0.4)
    evaluations = [argv for argv in study_lines(capsys, tmp_path) if argv[0] == "-m"]
    what = ["--split", "validation", "--eval_samples", "10", "--fit", "holdout"]
    assert evaluations == [["-m", "tools.evaluate", str(tmp_path / "cola/lora-ivon-s11"), *what]]
    out, _ = output(capsys, "report", tmp_path)
    assert out.count("(chosen)") == 4
    assert "| adalora-adamw | `--lr 2e-3` (chosen) | 50.00 |" in out


def two_rows(runs: Path) -> None:
    """Rows "lora" and "adalora", whose NLL differ by 0.1, 0.13 and 0.11."""
    for row, nll in (("lora", 0.5), ("adalora", 0.4)):
        for seed, shift in ((1, 0.0), (2, 0.03), (3, 0.01)):
            folder = runs / f"cola/{row}-s{seed}"
            write_run(folder, ["--task", "cola", *SMALL, "--seed", str(seed)], 0.5)
            evaluate(folder, {(0, 0.0): nll + shift * (2 if row == "lora" else 1)})


def test_the_picture_of_a_comparison_has_differences_with_their_intervals(tmp_path: Path, drawn):
    two_rows(tmp_path)
    score, nll, *_ = drawn("compare", tmp_path / "adalora", tmp_path / "lora").axes
    d = np.array([-0.1, -0.13, -0.11])
    half = scipy.stats.t.ppf(0.975, 2) * d.std(ddof=1) / np.sqrt(3)
    interval, mean, zero = nll.lines
    assert interval.get_xdata() == pytest.approx([d.mean() - half, d.mean() + half])
    assert (mean.get_xdata()[0], zero.get_xdata()[0]) == (pytest.approx(d.mean()), 0)
    assert mean.get_markerfacecolor() == mean.get_color()  # better, p = 0.006 of four
    assert score.lines[1].get_markerfacecolor() == "white"  # the same
    assert [axis.get_title() for axis in (score, nll)] == [
        "score, points (better: right)",
        "NLL (better: left)",
    ]
    (label,) = score.get_yticklabels()
    assert label.get_text() == "adalora\n− lora"


def test_the_picture_of_a_study_needs_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture):
    _, err = output(capsys, "report", tmp_path, "-o", tmp_path / "x.png", status=2)
    assert "no comparison is finished" in err
    assert not (tmp_path / "x.png").exists()


def test_compare_prints_paired_differences_over_the_evaluated_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    two_rows(tmp_path)
    trial = tmp_path / "cola/search/lora-0"  # judged on something else, and no row
    write_run(trial, ["--task", "cola", *SMALL], 0.5)
    (trial / "evaluation.json").write_text('{"evaluations": [{"split": "holdout"}]}')
    out, err = output(capsys, "compare", tmp_path / "adalora", tmp_path / "lora")
    assert err == ""
    (line,) = [line for line in out.splitlines() if "| nll |" in line]
    d = np.array([-0.1, -0.13, -0.11])
    assert f"{d.mean():+.4f} [" in line
    assert "| 3 |" in line
    _, err = output(capsys, "compare", tmp_path / "adalora", tmp_path / "full", status=2)
    assert "no evaluated row full; there are adalora, lora" in err
    shutil.copytree(tmp_path / "cola", tmp_path / "again/cola")
    damaged = tmp_path / "again/cola/lora-s1"
    (damaged / "evaluation.json").write_text("{}")
    out, err = output(capsys, "compare", tmp_path / "again/adalora", tmp_path / "again/lora")
    assert "| 2 |" in out
    assert err.startswith(f"skipped {damaged}: evaluation.json has no evaluation of validation")
    shutil.copy(tmp_path / "cola/lora-s1/evaluation.json", damaged)
    _, err = output(capsys, "compare", tmp_path / "adalora", tmp_path / "lora", status=2)
    assert "two of its runs have the same task and seed" in err
    out, _ = output(capsys, "compare", tmp_path / "again/lora", tmp_path / "again/cola/lora")
    assert f"| {tmp_path}/again/lora | {tmp_path}/again/cola/lora |" in out  # one name in two folders
    out, err = output(capsys, "compare", tmp_path / "adalora", status=2)
    assert "two rows" in err
    assert out == ""

"""reproduce.py: the grid, the table's arithmetic, the figures, and runs that cannot be used."""

import csv
import io
import json
import math
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import reproduce
from glue import TASKS
from metrics import calibration, reliability
from reproduce import SEEDS, averages, is_the_papers, main, resolved
from run_glue import HERE, parse_args

SMALL = ["--model", "tiny", "--max_steps", "100"]
MODULES = [f"bert.encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "key")]


def write_run(folder: Path, flags: list[str], best: float, ranks: list[int] | None = None, **config) -> Path:
    """A finished run with the settings of a command line and a score of our choosing."""
    settings = resolved(flags) | {"output_dir": str(folder), "versions": {"python": "3"}} | config
    metric = TASKS[settings["task"]].metric
    shared = {key: settings[key] for key in ("task", "method", "optimizer", "score", "seed", "demo")}
    patterns = dict(zip(MODULES, ranks or [2, 2, 2, 2], strict=True)) if shared["method"] != "full" else {}
    kept = {"b0": 12, "bT": 8, "kept": sum(patterns.values())}
    record = {"step": 50, metric: best}
    results = shared | {"metric": metric, "best": record, "last": record, "ranks": patterns, "budget": kept}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def output(capsys: pytest.CaptureFixture, *argv: object, status: int = 0) -> tuple[str, str]:
    assert main([str(part) for part in argv]) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def cells(markdown: str) -> dict[str, list[str]]:
    """Of a Markdown table, the cells of each row by its label; the header's is ""."""
    rows = [line[2:-2].split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {row[0].strip(): row[1:] for row in rows if row[0] != "---"}


# --- the grid -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_grid() -> list[str]:
    done = subprocess.run(
        [sys.executable, HERE / "reproduce.py", "commands"], capture_output=True, check=True
    )
    return done.stdout.decode().splitlines()


def test_the_whole_grid_is_15_rows_of_8_tasks_and_5_seeds_and_every_line_parses(whole_grid: list[str]):
    assert len(whole_grid) == len(set(whole_grid)) == 600
    runs = set()
    for line in whole_grid:
        python, script, *argv = shlex.split(line)
        assert (python, script) == ("python", "run_glue.py")
        args = parse_args(argv)
        runs.add((args.task, args.method, args.optimizer, args.score, args.target_rank, args.seed))
    assert len(runs) == 600
    rows = {run[1:5] for run in runs}
    assert len(rows) == 15
    with (HERE / "results/paper_table1.csv").open() as file:
        for row in csv.DictReader(file):
            rank = float(row["rank"]) if row["rank"] else None
            assert (row["method"], row["optimizer"], row["score"] or None, rank) in rows
    assert {run[0] for run in runs} == set(TASKS)
    assert {run[5] for run in runs} == set(SEEDS) == {2021, 2022, 2023, 2024, 2025}


def test_no_two_commands_of_the_grid_share_an_output_folder(whole_grid: list[str]):
    folders = {parse_args(shlex.split(line)[2:]).output_dir for line in whole_grid}
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
    lines = [parse_args(shlex.split(line)[2:]) for line in out.splitlines()]
    assert len(lines) == 2 * (1 + 6)
    assert {(args.model, args.max_steps, args.seed) for args in lines} == {("my model", 50, 1)}


def test_finished_runs_are_missing_from_the_grid_and_others_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    rte = ["--task", "rte", "--method", "lora", "--optimizer", "adamw", "--target_rank", "2"]
    write_run(tmp_path / "a", [*rte, "--seed", "1"], 0.8)
    write_run(tmp_path / "b", [*rte, "--seed", "2", "--max_steps", "9"], 0.8)  # not the paper's length
    (write_run(tmp_path / "c", [*rte, "--seed", "3"], 0.8) / "results.json").unlink()
    which = ("commands", "--tasks", "rte", "--seeds", 1, 2, 3, 4, "--ranks", 2, "--methods", "lora")
    out, _ = output(capsys, *which, "--missing", tmp_path)
    left = [parse_args(shlex.split(line)[2:]) for line in out.splitlines()]
    assert [args.seed for args in left] == [2, 3, 4]
    assert {args.output_dir.parent for args in left} == {tmp_path}
    out, _ = output(capsys, *which, "--missing", tmp_path, "--", "--max_steps", 9)
    assert [parse_args(shlex.split(line)[2:]).seed for line in out.splitlines()] == [1, 3, 4]


def test_a_runs_folder_that_is_not_there_yet_leaves_the_whole_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    out, _ = output(capsys, "commands", "--tasks", "rte", "--missing", tmp_path / "runs")
    assert len(out.splitlines()) == 75
    assert not (tmp_path / "runs").exists()


def test_a_finished_grid_leaves_nothing_and_every_command_is_there_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    which = ("commands", "--tasks", "rte", "--seeds", 1, 1, "--ranks", 2, "--methods", "lora")
    out, _ = output(capsys, *which)
    (line,) = out.splitlines()
    write_run(tmp_path / "x", shlex.split(line)[2:], 0.8)
    assert output(capsys, *which, "--missing", tmp_path) == ("", "")


def test_finished_runs_on_other_maps_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture):
    which = ("commands", "--tasks", "rte", "--seeds", 1, "--ranks", 2, "--methods", "lora")
    lora = ["--task", "rte", "--method", "lora", "--optimizer", "adamw", "--target_rank", "2", "--seed", "1"]
    write_run(tmp_path / "rte-lora-adamw-r2-s1", lora, 0.8, targets=["query_proj"])
    assert output(capsys, *which, "--missing", tmp_path)[0] == ""
    out, _ = output(capsys, *which, "--missing", tmp_path, "--", "--targets", "query_proj", "key_proj")
    assert (
        parse_args(shlex.split(out)[2:]).output_dir == tmp_path / "rte-lora-adamw-r2-s1-2"
    )  # the other's is taken


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
    assert err.startswith("reproduce.py: error: ")
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
        "": ["CoLA", "STS-B", "all avg"],
        "AdaLoRA AdamW sensitivity r=2": ["*53.00 ± 3.61 (3)*", "**91.00 ± 1.41 (2)**", "72.00"],
        "AdaLoRA IVON mu r=2": ["**62.00 ± 3.46 (3)**", "*82.00 ± 2.83 (2)*", "72.00"],
    }
    assert "- CoLA: matthews correlation; 100 updates of 32 examples, at most 64 tokens" in out
    assert "- STS-B: pearson spearman; 100 updates of 32 examples, at most 128 tokens" in out


def test_the_csv_has_the_same_numbers(runs: Path, capsys: pytest.CaptureFixture):
    out, _ = output(capsys, "table", runs, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["task"], row["score"], row["mean"], row["sd"], row["seeds"]) for row in rows] == [
        ("cola", "sensitivity", "53.0", "3.6056", "3"),
        ("stsb", "sensitivity", "91.0", "1.4142", "2"),
        ("cola", "mu", "62.0", "3.4641", "3"),
        ("stsb", "mu", "82.0", "2.8284", "2"),
    ]
    assert {(row["model"], row["method"], row["rank"], row["paper"]) for row in rows} == {
        ("tiny", "adalora", "2.0", "")
    }


def test_group_averages_are_over_the_tasks_of_the_table_and_only_where_a_row_has_them_all():
    def of(**means: float) -> dict:
        return {task: reproduce.Cell(mean, None, 1, None) for task, mean in means.items()}

    tasks = ["qnli", "sst2", "cola", "rte"]
    whole = averages(of(qnli=90, sst2=94, cola=60, rte=70), tasks)
    assert whole == {"large avg": 92, "small avg": 65, "all avg": 78.5}
    part = averages(of(qnli=90, sst2=94, cola=60), tasks)
    assert part == {"large avg": 92, "small avg": None, "all avg": None}
    assert averages(of(cola=60), ["cola"]) == {}


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
        ["--data_dir", "another"],
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
    usual, departing = (row for label, row in cells(out).items() if label)
    assert usual == ["*15.00 ± 7.07 (2)*"]
    assert departing == ["**30.00 (1)**"]
    label = [label for label in cells(out) if label][1]
    assert label.startswith("AdaLoRA IVON mu r=2 (")
    assert other[0].removeprefix("--").replace("max_steps", "total_steps") in label


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


def test_the_papers_number_stands_beside_runs_of_its_model_and_setting_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    write_run(tmp_path / "paper", ["--task", "cola", "--score", "snr"], 0.7)
    write_run(tmp_path / "accum", ["--task", "rte", "--batch_size", "16", "--grad_accum", "2"], 0.8)
    write_run(tmp_path / "short", ["--task", "cola", "--score", "inv_sigma", "--epochs", "3"], 0.7)
    write_run(tmp_path / "other", ["--task", "sst2", "--lr", "0.3"], 0.7)
    out, _ = output(capsys, "table", tmp_path)
    assert "70.00 (1) [70.63]" in out
    assert "80.00 (1) [87.87]" in out
    assert out.count("[") == 3  # those two and the legend


def test_runs_of_several_processes_are_the_papers_with_adamw_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    """With IVON each process draws for itself."""
    adamw = ["--task", "cola", "--optimizer", "adamw", "--score", "sensitivity", "--batch_size", "16"]
    steps = ["--max_steps", "6700"]  # as many as 32 examples an update make of 25 epochs
    write_run(tmp_path / "adamw", [*adamw, *steps], 0.7, processes=2)
    write_run(tmp_path / "ivon", ["--task", "cola", "--batch_size", "16", *steps], 0.6, processes=2)
    out, _ = output(capsys, "table", tmp_path)
    assert "**70.00 (1) [70.78]**" in out
    assert "*60.00 (1)* |" in out


def test_runs_of_another_number_of_processes_are_not_averaged(tmp_path: Path, capsys: pytest.CaptureFixture):
    for seed, processes in ((1, 1), (2, 1), (3, 2)):
        write_run(tmp_path / str(seed), ["--task", "cola", "--seed", str(seed)], 0.5, processes=processes)
    out, _ = output(capsys, "table", tmp_path)
    assert "50.00 ± 0.00 (2)" in out
    assert "(processes 2)" in out


def test_every_row_of_the_grid_is_the_papers_setting(whole_grid: list[str]):
    numbers = reproduce.paper_table()
    assert len(numbers) == 15 * 8
    for line in whole_grid[::5]:
        config = resolved(shlex.split(line)[2:])
        assert is_the_papers(config), line
        rank = config["target_rank"] or 0
        key = (config["method"], rank, config["optimizer"], config["score"] or "", config["task"])
        assert 69 < numbers[key] < 97


def test_demo_runs_and_unfinished_runs_stay_out_of_the_table_by_name(
    runs: Path, capsys: pytest.CaptureFixture
):
    expected, _ = output(capsys, "table", runs)
    write_run(runs / "demo", ["--demo"], 0.99)
    (write_run(runs / "stopped", ["--task", "cola", *SMALL, "--seed", "9"], 0.99) / "results.json").unlink()
    out, err = output(capsys, "table", runs)
    assert out == expected
    assert "demo: a demo run" in err
    assert "stopped: unfinished" in err


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
    assert skipped.startswith(f"reproduce.py: skipped {folder}: ")
    assert error.startswith("reproduce.py: error: there is no finished run in ")


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
    assert err.splitlines()[0].startswith(f"reproduce.py: skipped {folder}: ")


@pytest.mark.parametrize(
    "change",
    [
        {"task": ["cola"]},
        {"score": "nonsense"},
        {"batch_size": [32]},
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
    assert err.splitlines()[0].startswith(f"reproduce.py: skipped {folder}: ")


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
            assert err.startswith("reproduce.py: error: ")
            assert err.count("\n") == 1


def test_the_readmes_tables_are_what_the_results_folder_gives(capsys: pytest.CaptureFixture):
    out, err = output(capsys, "table", HERE / "results")
    assert err == ""
    assert out in (HERE / "README.md").read_text()


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


def test_the_heat_maps_show_the_ranks_on_one_colour_scale(patterns: Path, tmp_path: Path):
    picture = tmp_path / "ranks.png"
    assert main(["ranks", str(patterns), "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    figure = reproduce.ranks_figure(reproduce.mean_ranks(reproduce.parse(["ranks", str(patterns)])))
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert [image.get_array().tolist() for image in images] == [
        [[1, 3], [1, 3]],  # modules down, layers across
        [[2.5, 2], [0.5, 3]],
    ]
    assert {image.get_clim() for image in images} == {(0, 3)}


def test_long_names_overlap_nothing_in_the_figures(tmp_path: Path):
    flags = (
        "--task cola --hess_init 0.0001 --beta2 0.999 --ess 10000000 --clip_radius 0.002 --lr 8000".split()
    )
    for score in ("snr", "mu", "inv_sigma"):
        run = write_run(tmp_path / score, [*flags, "--score", score], best=0.5)
        lines = [{"step": 50, "split": "validation", "matthews_correlation": 0.5}, {"step": 1, "budget": 12}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for figure in (
        reproduce.ranks_figure(reproduce.mean_ranks(reproduce.parse(["ranks", str(tmp_path)]))),
        reproduce.curves_figure(reproduce.find_runs([tmp_path])),
    ):
        figure.canvas.draw()
        panels = [axis for axis in figure.axes if axis.images or axis.lines]
        boxes = [axis.get_window_extent() for axis in panels]
        texts = [axis.title for axis in panels if axis.get_title()]
        texts += [axis.get_legend() for axis in panels if axis.get_legend()]
        assert texts
        extents = [text.get_window_extent() for text in texts]
        width, height = figure.canvas.get_width_height()
        for i, extent in enumerate(extents):
            assert not any(extent.overlaps(other) for other in [*boxes, *extents[:i], *extents[i + 1 :]])
            assert 0 <= extent.x0 < extent.x1 <= width
            assert 0 <= extent.y0 < extent.y1 <= height


def test_ranks_of_different_models_cannot_share_a_figure(patterns: Path, capsys: pytest.CaptureFixture):
    flags = ["--task", "cola", "--model", "another", "--max_steps", "100"]
    write_run(patterns / "z", flags, 0.5)
    _, err = output(capsys, "ranks", patterns, status=2)
    assert err.count("\n") == 1
    assert "different models" in err
    results = json.loads((patterns / "b/results.json").read_text())
    results["ranks"] = {"bert.encoder.layer.7.attention.self.query": 2}
    (patterns / "b/results.json").write_text(json.dumps(results))
    _, err = output(capsys, "ranks", patterns / "a1", patterns / "b", status=2)
    assert "different models or adapters" in err


def test_full_fine_tuning_has_no_ranks_to_draw(patterns: Path, capsys: pytest.CaptureFixture):
    full = ["--task", "cola", "--method", "full", "--optimizer", "adamw", *SMALL]
    folder = write_run(patterns.parent / "full", full, 0.5)
    expected, _ = output(capsys, "ranks", patterns)
    out, err = output(capsys, "ranks", patterns, folder)
    assert out == expected
    assert f"skipped {folder}" in err
    _, err = output(capsys, "ranks", folder, status=2)
    assert "none of these runs has adapters" in err


def test_the_curves_are_the_mean_over_seeds_with_their_range_and_the_budget_under_it(tmp_path: Path):
    for seed, shift in ((1, 0.0), (2, 0.2)):
        folder = write_run(tmp_path / f"runs/{seed}", ["--task", "cola", *SMALL, "--seed", str(seed)], 0.5)
        lines = [{"step": t, "loss": 1.0, "lr": 0.1, "budget": 12 - t} for t in range(1, 5)]
        lines += [{"step": t, "split": "validation", "matthews_correlation": t / 10 + shift} for t in (2, 4)]
        (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    figure = reproduce.curves_figure(reproduce.find_runs([tmp_path / "runs"]))
    score, budget = figure.axes
    assert score.lines[0].get_xydata().ravel().tolist() == pytest.approx([2, 0.3, 4, 0.5])
    assert budget.lines[0].get_xydata().tolist() == [[1, 11], [2, 10], [3, 9], [4, 8]]
    low, high = score.collections[0].get_paths()[0].vertices[:, 1].min(), 0.6
    assert (low, score.collections[0].get_paths()[0].vertices[:, 1].max()) == pytest.approx((0.2, high))
    assert main(["curves", str(tmp_path / "runs"), "-o", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 5000


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
    for seed, encoder in ((1, "aa"), (2, "aa"), (3, "bb"), (4, None)):
        write_run(tmp_path / f"{seed}", ["--task", "cola", *SMALL, "--seed", str(seed)], 0.5, encoder=encoder)
    out, _ = output(capsys, "table", tmp_path)
    assert [row for label, row in cells(out).items() if label] == [["50.00 ± 0.00 (3)"], ["50.00 (1)"]]
    assert "(encoder bb)" in out


def test_two_models_have_two_names_in_a_figure(tmp_path: Path):
    for model in ("one", "two"):
        folder = write_run(tmp_path / model, ["--task", "cola", "--model", model, "--max_steps", "100"], 0.5)
        pairs = {"mu/snr": 0.5}
        line = {"step": 1, "budget": 8, "sigma_cv": 0.1, "spearman": pairs, "jaccard": pairs}
        (folder / "score_agreement.jsonl").write_text(json.dumps(line) + "\n")
    found = reproduce.agreements(reproduce.find_runs([tmp_path]))
    assert [name.split(", ")[-1] for name in found] == ["one", "two"]
    assert {one.chance for one in found.values()} == {0.5}  # 8 of 12: 8/(24 − 8)


def test_a_half_written_journal_is_skipped_by_name(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = write_run(tmp_path / "run", ["--task", "cola", *SMALL], 0.5)
    for verb, name in (("curves", "metrics.jsonl"), ("agreement", "score_agreement.jsonl")):
        odd = (
            '{"step": 1, "split": "validation"}\n',
            '{"step": 1, "budget": null, "spearman": 3}\n',
            "[" * 9999,
        )
        for content in (None, "", '{"step": 1}\n{"st', "[1]\n", '{"loss": 3}\n', *odd):
            if content is not None:
                (folder / name).write_text(content)
            _, err = output(capsys, verb, tmp_path, "-o", tmp_path / "x.png", status=2)
            skipped, error = err.splitlines()
            assert skipped.startswith(f"reproduce.py: skipped {folder}: ")
            assert error.startswith("reproduce.py: error: none of these runs")
    assert not (tmp_path / "x.png").exists()


def test_agreement_is_averaged_over_allocations_and_seeds(tmp_path: Path, capsys: pytest.CaptureFixture):
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
    ((name, found),) = reproduce.agreements(reproduce.find_runs([tmp_path / "runs"])).items()
    assert name == "CoLA, AdaLoRA IVON mu r=2, 2 seeds"
    assert found.names == ["mu", "snr", "lambda"]
    assert found.spearman[0, 1] == pytest.approx(statistics.fmean([0.2, 0.4, 0.6, 1.0]))
    assert math.isnan(found.spearman[0, 2])
    assert found.spearman[2, 1] == -0.5
    assert found.jaccard[1].tolist() == [0.25, 1, 1]
    assert found.sigma_cv == pytest.approx({1: 0.4, 2: 1.4})
    out, _ = output(capsys, "agreement", tmp_path / "runs", "-o", tmp_path / "agreement.png")
    assert [line.split() for line in out.splitlines()[1:5]] == [
        ["mu", "snr", "lambda"],
        ["mu", "0.550", "nan"],
        ["snr", "0.250", "-0.500"],
        ["lambda", "0.500", "1.000"],
    ]
    assert "coefficient of variation of σ at the last allocation: 1.4" in out
    assert "nothing in common: 0.500" in out
    assert (tmp_path / "agreement.png").read_bytes().startswith(b"\x89PNG")
    figure = reproduce.agreement_figure({name: found})
    shown = figure.axes[0].images[0].get_array()
    assert shown[0, 1] == pytest.approx(0.55)  # Spearman above the diagonal,
    assert shown[1, 0] == 0.25  # Jaccard below it


@pytest.mark.parametrize("target", ["absent/ranks.png", "ranks.docx", "runs"])
def test_a_picture_that_cannot_be_written_is_an_error_in_one_line(
    target: str, patterns: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    before = sorted(tmp_path.rglob("*"))
    _, err = output(capsys, "ranks", patterns, "-o", tmp_path / target, status=2)
    assert err.startswith("reproduce.py: error: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["", ".", "/dev/null"])
def test_a_picture_needs_a_files_name(target: str, patterns: Path, capsys: pytest.CaptureFixture):
    _, err = output(capsys, "ranks", patterns, "-o", target, status=2)
    assert err.count("\n") == 1
    assert Path("/dev/null").is_char_device()


def test_without_matplotlib_tables_work_and_pictures_say_what_is_missing(patterns: Path, tmp_path: Path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no matplotlib')")
    code = (
        f"import sys; sys.path[:0] = {[str(tmp_path), str(HERE)]}; import reproduce as r; sys.exit(r.main())"
    )
    for argv, status in ((["table"], 0), (["ranks"], 0), (["ranks", "-o", "x.png"], 2), (["curves"], 2)):
        (patterns / "a1/metrics.jsonl").write_text('{"step": 1, "budget": 3}\n')
        command = [sys.executable, "-c", code, argv[0], str(patterns), *argv[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        if status:
            assert "pictures need matplotlib: pip install matplotlib" in done.stderr.splitlines()[-1]


# --- prediction ---------------------------------------------------------------------------------------------


def evaluate(folder: Path, nll: dict[tuple[int, float], float], p: dict[str, list] | None = None) -> None:
    """What --eval_only leaves."""
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


def test_the_reliability_diagram_has_the_bins_of_all_seeds_together(evaluations: Path):
    p = np.array([[0.35, 0.65], [0.05, 0.95], [0.3, 0.7], [0.0, 1.0]])
    counts, confidence, accuracy = reliability(p, np.array([1, 0, 0, 1]))
    assert counts.tolist() == [0, 0, 0, 0, 0, 0, 2, 0, 0, 2]
    assert (confidence[6], accuracy[6], confidence[9], accuracy[9]) == (0.675, 0.5, 0.975, 0.5)
    assert np.isnan(accuracy[0])
    gap = (counts * abs(accuracy - confidence))[counts > 0].sum() / 4
    assert gap == pytest.approx(calibration(p, [1, 0, 0, 1])["ece"])
    figure = reproduce.reliability_figure(reproduce.evaluated([evaluations]))
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
    assert main(["calibration", str(evaluations), "-o", str(evaluations / "r.png")]) == 0
    assert (evaluations / "r.png").read_bytes().startswith(b"\x89PNG")


def test_error_and_nll_are_drawn_against_the_temperature(evaluations: Path, capsys: pytest.CaptureFixture):
    figure = reproduce.temperature_figure(reproduce.evaluated([evaluations]))
    error, nll = (axis.lines[0].get_xydata() for axis in figure.axes)
    assert error == pytest.approx(np.array([[0, 50], [0.5, 50], [1, 50]]))
    assert nll == pytest.approx(np.array([[0, 0.6], [0.5, 0.5], [1, 0.4]]))
    out, _ = output(capsys, "temperature", evaluations, "-o", evaluations / "t.png")
    assert "10 draws, τ = 0.5" in out
    assert (evaluations / "t.png").read_bytes().startswith(b"\x89PNG")


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
    assert "error: none of these runs" in err.splitlines()[-1]


@pytest.mark.parametrize("change", [{"model": "another"}, {"data_dir": "elsewhere"}, {"nll": math.nan}])
def test_an_evaluation_of_something_else_is_skipped_by_name(
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
    assert main(["calibration", str(evaluations), "-o", str(evaluations / "r.png")]) == 2
    err = capsys.readouterr().err
    assert "predictions.safetensors" in err
    assert err.count("\n") == 1
    assert not (evaluations / "r.png").exists()

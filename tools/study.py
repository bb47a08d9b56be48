"""The study of results/study.md as commands: an equal search, then fresh seeds at the chosen settings.

`python -m tools.reproduce study OUT` prints what is not finished in OUT. The commands of a task's second part
appear when all of its search is finished there.
"""

import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from harness.task import UsageError
from tools.compare import print_compare
from tools.finished import read_run

TASKS = ("cola", "stsb", "sst2")
UPDATES = 600
SHAPE = f"--max_steps {UPDATES} --eval_every {UPDATES} --batch_size 32 --group_by_length --holdout 0.1"
SEARCH_SEED, SEEDS, MORE_SEEDS = 1, range(11, 16), range(16, 19)  # the latter on CoLA alone

ADAMW = [f"--lr {lr}" for lr in ("2e-4", "5e-4", "1e-3", "2e-3", "4e-3", "8e-3")]
# IVON's largest step is lr·(h0 + δ)·ξ: at h0 1e-4 and ξ 1e-3, lr 1e4 makes it 1e-3.
WIDE = "--hess_init 1e-4 --beta2 0.999"
TRIALS = {
    "lora-adamw": ("--method lora --optimizer adamw", ADAMW),
    "lora-ivon": (
        "--method lora --optimizer ivon",
        [f"{WIDE} --ess 1e8 --lr {lr}" for lr in ("3e2", "1e3", "3e3", "1e4")]
        + [f"{WIDE} --ess {ess} --lr {lr}" for ess, lr in (("1e7", "1e3"), ("1e9", "3e3"))],
    ),
    "adalora-adamw": ("--optimizer adamw --score sensitivity", ADAMW),
    "adalora-ivon-mu": (
        "--optimizer ivon --score mu",
        [f"{WIDE} --ess 1e7 --lr {lr}" for lr in ("1e3", "3e3", "1e4", "3e4")]
        + [f"{WIDE} --ess 1e9 --lr 1e4", "--hess_init 1e-3 --beta2 0.9999 --ess 1e6 --lr 3e3"],
    ),
}
# Beside the searched rows, by what they add to the settings chosen for adalora-ivon-mu.
MORE_ROWS = {
    "adalora-ivon-sensitivity": "--score sensitivity",
    "adalora-ivon-snr": "--score snr",
    "adalora-ivon-held": "--beta2 1",  # h stays h0: the same σ for every entry
    "adalora-ivon-noiseless": "--beta2 1 --ess 1e30",  # σ is 0 to float32, and the rest the same
}
SPARSE = ("sensitivity", "snr", "mu", "inv_sigma")  # at rank 0.25, on CoLA
LONG_UPDATES, LONG_SEEDS = 6700, range(11, 14)  # [C]'s length, on CoLA


IVON, ADALORA = "adalora-ivon-mu", "adalora-adamw"
CLAIMS = {  # the first row against each of the others
    "AdaLoRA: IVON against AdamW, and against LoRA": [IVON, ADALORA, "lora-adamw", "lora-ivon"],
    "LoRA: IVON against AdamW": ["lora-ivon", "lora-adamw"],
    "Which part of IVON": [IVON, "adalora-ivon-held", "adalora-ivon-noiseless"],
    "Which score, at rank 2": [IVON, "adalora-ivon-sensitivity", "adalora-ivon-snr"],
    "Which score, at rank 0.25": ["rank-0.25-mu", *(f"rank-0.25-{s}" for s in SPARSE if s != "mu")],
    "Ten draws against what costs nothing": [
        *(f"{IVON}:{how}" for how in ("tau=1", "mean", "draws at the fitted τ", "temperature scaling")),
        *(f"{IVON}:{how}" for how in ("MC dropout", "TFB", "pruned")),
        *(f"{ADALORA}:{how}" for how in ("mean", "temperature scaling", "TFB")),
    ],
    "At [C]'s length": ["long-adalora-ivon-mu", "long-adalora-adamw"],
}


def search(task: str) -> Iterator[tuple[str, str]]:
    """The folder's name and the flags of each trial."""
    for row, (what, trials) in TRIALS.items():
        for i, trial in enumerate(trials):
            yield f"{task}/search/{row}-{i}", f"--task {task} {what} {trial} --seed {SEARCH_SEED} {SHAPE}"


def chosen(out: Path, task: str) -> dict[str, str] | None:
    """By row of TRIALS the flags whose trial is best on the held-out share; None before all are finished."""
    if not all((out / name / "results.json").exists() for name, _ in search(task)):
        return None
    best = {}
    for row, (what, trials) in TRIALS.items():
        runs = [read_run(out / f"{task}/search/{row}-{i}").results for i in range(len(trials))]
        scores = [run["last"][run["metric"]] for run in runs]
        best[row] = f"{what} {trials[scores.index(max(scores))]}"
    return best


def second_part(task: str, settings: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The runs that are judged; where a flag is given twice, the last one counts."""
    mu, fresh = settings[IVON], [*SEEDS, *(MORE_SEEDS if task == "cola" else ())]
    groups = [(fresh, settings | {row: f"{mu} {more}" for row, more in MORE_ROWS.items()})]
    if task == "cola":
        rank = "--target_rank 0.25 --init_rank 3"
        groups.append((SEEDS, {f"rank-0.25-{score}": f"{mu} --score {score} {rank}" for score in SPARSE}))
        length = f"--max_steps {LONG_UPDATES} --eval_every {LONG_UPDATES}"
        groups.append((LONG_SEEDS, {f"long-{row}": f"{settings[row]} {length}" for row in (ADALORA, IVON)}))
    for seeds, rows in groups:
        for seed, (row, flags) in itertools.product(seeds, rows.items()):
            yield f"{task}/{row}-s{seed}", f"--task {task} {SHAPE} {flags} --seed {seed}"


def print_commands(out: Path, more: list[str]) -> None:
    """Print run_glue.py's command for each unfinished run, tools.evaluate's for each judged run that has no
    evaluation yet."""
    for task in TASKS:
        settings = chosen(out, task)
        for name, flags in search(task) if settings is None else second_part(task, settings):
            if not (out / name / "results.json").exists():
                where = ["--output_dir", str(out / name), "--resume"]
                print(shlex.join(["python", "run_glue.py", *flags.split(), *where, *more]))
            elif settings and not (out / name / "evaluation.json").exists():
                draws = ["--eval_samples", "10"] if "--optimizer ivon" in flags else []
                searched = task != "stsb" and name.split("/")[1].rpartition("-s")[0] in TRIALS
                fit = ["--fit", "holdout"] if searched else []
                how = ["--split", "validation", *draws, *fit]
                print(shlex.join(["python", "-m", "tools.evaluate", str(out / name), *how]))


def print_report(out: Path) -> pd.DataFrame:
    """Print each task's trials and every claim's comparison, from what is finished, as Markdown.

    Returns the comparisons.
    """
    if not out.is_dir():
        raise UsageError(f"{out} is not a folder of runs")
    for task in TASKS:
        print(f"\n### {task}: the search\n\n| row | trial | held-out score in percent |\n| --- | --- | --- |")
        best = chosen(out, task) or {}
        for row, (what, trials) in TRIALS.items():
            for i, trial in enumerate(trials):
                if (out / f"{task}/search/{row}-{i}/results.json").exists():
                    run = read_run(out / f"{task}/search/{row}-{i}").results
                    mark = " (chosen)" * (best.get(row) == f"{what} {trial}")
                    print(f"| {row} | `{trial}`{mark} | {100 * run['last'][run['metric']]:.2f} |")
    tables = []
    for title, rows in CLAIMS.items():
        print(f"\n### {title}\n")
        try:
            tables.append(print_compare([str(out / row) for row in rows], "validation"))
        except UsageError as error:
            print(f"Not finished: {error}.")
    return pd.concat(tables) if tables else pd.DataFrame()

"""The papers' grid as commands; finished runs as the papers' table and figures.

    python reproduce.py commands > grid.txt                    # 15 rows × 8 tasks × 5 seeds, a command a line
    python reproduce.py commands --missing runs                # … those without a finished run in runs/
    python reproduce.py commands --tasks rte -- --model path/to/checkpoint     # flags that every line gets
    python reproduce.py table runs                             # Table I as Markdown, or with --csv
    python reproduce.py ranks runs/A runs/B -o ranks.png       # Figure 1; without -o as text
    python reproduce.py curves runs -o curves.png              # validation score and budget against step
    python reproduce.py agreement runs -o agreement.png        # of runs with --track_scores
    python reproduce.py calibration runs -o reliability.png    # of runs that --eval_only has evaluated
    python reproduce.py temperature runs -o temperature.png    # … at several --temperature: [V] figure 1

Wherever runs are asked for, a folder stands for every finished run in and under it. What cannot be used is
named on stderr and left out.

Exit status: 0 done; 2 a usage or input error.

[C] Chen and Garner, "A Bayesian Interpretation of Adaptive Low-Rank Adaptation", arXiv 2409.10673.
[V] Cong et al., "Variational Low-Rank Adaptation Using IVON", 2024.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shlex
import statistics
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from adalora import TARGETS
from glue import TASKS, task_of
from run_glue import (
    EVAL_ONLY_FLAGS,
    MODEL,
    OTHER_FLAGS,
    UsageError,
    number,
    parse_args,
    plan,
    rank_grid,
    rank_rows,
    read_tensors,
    whole,
)
from scores import SCORES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SEEDS = (2021, 2022, 2023, 2024, 2025)
PAPER_SCORES = ("sensitivity", "snr_abs", "snr", "mu", "inv_sigma")
GROUPS = {"large": ("mnli", "qqp", "qnli", "sst2"), "small": ("cola", "stsb", "mrpc", "rte")}  # columns
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "adalora": "AdaLoRA", "ivon": "IVON", "adamw": "AdamW"}
# Which row of a table a run belongs to is decided by its settings. Of those in config.json,
IDENTITY = (
    "task",
    "method",
    "optimizer",
    "score",
    "target_rank",
    "model",
    "demo",
)  # have a place of their own,
# the length of the run and its batches are its shape, which each task has for itself,
SHAPE = ("total_steps", "batch_size", "grad_accum", "max_length", "eval_every", "group_by_length")
# these cannot change a result, but for rounding, or follow from others,
IGNORED = (
    "seed",
    "epochs",
    "max_steps",
    "output_dir",
    "overwrite",
    "device",
    "eval_batch_size",
    "track_scores",
)
IGNORED += (
    "eval_samples",
    "temperature",
    *EVAL_ONLY_FLAGS,
    "versions",
    "git_commit",
    "device_name",
    "threads",
)
# and everything else counts where it is not what the task's settings make of the rest (`departures`).


class Run(NamedTuple):
    """A finished run: its folder, config.json and results.json."""

    folder: Path
    config: dict
    results: dict


# ---- the grid ------------------------------------------------------------------------------------------


def grid(
    tasks: Iterable[str], seeds: Iterable[int], ranks: Iterable[float], methods: Iterable[str]
) -> Iterator[list[str]]:
    """run_glue.py's arguments for every run of [C] table I, a task after the other."""
    rows = [["--method", "full", "--optimizer", "adamw"]] if "full" in methods else []
    for rank in ranks:
        rows += [["--method", "lora", "--optimizer", "adamw", "--target_rank", f"{rank:g}"]] * (
            "lora" in methods
        )
        pairs = [("adamw", "sensitivity"), *(("ivon", score) for score in PAPER_SCORES)]
        rows += [
            ["--method", "adalora", "--optimizer", optimizer, "--score", score, "--target_rank", f"{rank:g}"]
            for optimizer, score in pairs * ("adalora" in methods)
        ]
    for task in tasks:
        for row in rows:
            for seed in seeds:
                yield ["--task", task, *row, "--seed", str(seed)]


def resolved(argv: list[str]) -> dict:
    """Every setting that run_glue.py makes of a command line, as config.json has it."""
    args = parse_args(argv)
    task = task_of(args.task, args.method, args.demo)
    plan(args, task, task.train_size, modules=1)
    return json.loads(json.dumps(vars(args), default=str))


def print_commands(args: argparse.Namespace) -> None:
    exists = args.missing and args.missing.exists()
    finished = [run.config for run in find_runs([args.missing], at_least=0)] if exists else []
    compared = resolved(["--task", "cola"]).keys() - (set(IGNORED) - {"seed"}) - {"targets"}
    lines = []
    for argv in grid(args.tasks, args.seeds, args.ranks, args.methods):
        wanted = resolved([*argv, *args.flags])
        if any(all(config.get(key) == wanted[key] for key in compared) for config in finished):
            continue
        if args.missing and "--output_dir" not in args.flags:
            argv += ["--output_dir", str(args.missing / Path(wanted["output_dir"]).name)]
        lines.append(shlex.join(["python", "run_glue.py", *argv, *args.flags]))
    print(*lines, sep="\n")


# ---- finished runs ---------------------------------------------------------------------------------------


def find_runs(folders: list[Path], at_least: int = 1) -> list[Run]:
    """The finished runs in and under `folders`, in the order of their paths; others are named on stderr."""
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder of runs")
    names = ("config.json", "results.json")
    found = {file.parent.resolve(): file.parent for f in folders for name in names for file in f.rglob(name)}
    runs = []
    for folder in sorted(found.values()):
        try:
            run = Run(folder, *(read_json(folder / name) for name in names))
            check(run)
        except ValueError as error:
            skip(folder, str(error))
        else:
            runs.append(run)
    if len(runs) < at_least:
        raise UsageError(f"there is no finished run in {', '.join(map(str, folders))}")
    return runs


def read_json(path: Path) -> dict:
    """An object of a JSON file. ValueError says why there is none."""
    if not path.is_file():
        raise ValueError("unfinished, no results.json" if path.name == "results.json" else f"no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a run's")
    return content


def check(run: Run) -> None:
    """Raise ValueError unless what is used below is there, as a run writes it."""
    config, results = run.config, run.results
    shared = ("task", "method", "optimizer", "score", "seed", "demo")
    absent = [key for key in (*shared, "target_rank", "total_steps") if key not in config]
    absent += [key for key in (*shared, "metric", "best", "ranks") if key not in results]
    if absent:
        raise ValueError(f"not a run's, {absent[0]} is missing")
    if any(config[key] != results[key] for key in shared):
        raise ValueError("config.json and results.json are of two different runs")
    if type(config["seed"]) is not int:
        raise ValueError("its seed is not a number")
    best = results["best"].get(str(results["metric"])) if isinstance(results["best"], dict) else None
    if type(best) not in (int, float) or not math.isfinite(best):
        raise ValueError(f"results.json has no number for the best {results['metric']}")
    ranks = results["ranks"]
    if not isinstance(ranks, dict) or any(type(rank) is not int for rank in ranks.values()):
        raise ValueError("results.json has no ranks")
    try:
        departures(config)
    except UsageError as error:
        raise ValueError(f"its settings are not run_glue.py's: {error}") from None


def skip(folder: Path, why: str) -> None:
    print(f"reproduce.py: skipped {folder}: {' '.join(why.split())}", file=sys.stderr)


def departures(config: dict) -> dict:
    """A run's settings that are not what its task's settings make of its length and batches."""
    argv = ["--demo"] if config["demo"] else ["--task", str(config["task"])]
    given = {"method": config["method"], "optimizer": config["optimizer"], "score": config["score"]}
    given |= {"target_rank": config["target_rank"], "max_steps": config["total_steps"]}
    given |= {key: config.get(key) for key in ("batch_size", "grad_accum")}
    for key, value in given.items():
        argv += [] if value is None else [f"--{key}", str(value)]
    usual = resolved(argv)
    settings = {key: config[key] for key in sorted(config.keys() - {*IDENTITY, *SHAPE, *IGNORED, "data_dir"})}
    if "lr" in settings and settings["lr"] != usual["lr"]:
        usual = resolved([*argv, "--lr", str(settings["lr"])]) | {"lr": None}  # IVON: no first phase then
    if settings.get("targets") in [list(names) for names in TARGETS.values()]:
        usual["targets"] = settings["targets"]
    return {key: value for key, value in settings.items() if value != usual.get(key)}


def usual_shapes(runs: list[Run]) -> dict[tuple, tuple]:
    """By model, task and method, the shape and the data of most runs."""
    counts = defaultdict(Counter)
    for run in runs:
        c = run.config
        counts[str(c.get("model")), c["task"], c["method"]][
            tuple(map(c.get, SHAPE)), str(c.get("data_dir"))
        ] += 1
    return {key: count.most_common(1)[0][0] for key, count in counts.items()}


def is_the_papers(config: dict) -> bool:
    """Whether model, settings, length and batches are those behind the paper's number."""
    argv = ["--task", config["task"], "--method", config["method"], "--optimizer", config["optimizer"]]
    usual = resolved(argv)
    same = all(config.get(key) == usual[key] for key in SHAPE if key not in ("batch_size", "grad_accum"))
    return (
        config.get("model") == MODEL
        and not departures(config)
        and same
        and batch(config) == usual["batch_size"]
    )


def batch(config: dict) -> int | None:
    """Examples in an update."""
    sizes = config.get("batch_size"), config.get("grad_accum")
    return None if None in sizes else math.prod(sizes)


def settings_label(settings: dict) -> str:
    """Different settings have different labels."""
    return ", ".join(f"{key} {str(value).removesuffix('.0')}" for key, value in settings.items())


class Row(NamedTuple):
    """What runs have in common that differ in task and seed alone."""

    model: str
    method: str
    rank: float | None
    optimizer: str
    score: str | None
    settings: str  # what is not as usual

    def label(self) -> str:
        parts = [
            NAMES[self.method],
            NAMES[self.optimizer],
            self.score,
            self.rank is not None and f"r={self.rank:g}",
        ]
        return " ".join(part for part in [*parts, self.settings and f"({self.settings})"] if part)

    def order(self) -> tuple:
        """As in [C] table I: full fine-tuning, then rank by rank LoRA and AdaLoRA."""
        scores = [None, *SCORES]
        methods, optimizers = ("full", "lora", "adalora"), ("adamw", "ivon")
        return (
            self.model, self.rank or 0, methods.index(self.method), optimizers.index(self.optimizer),
            scores.index(self.score) if self.score in scores else len(scores), self.settings,
        )  # fmt: skip


def rows_of(runs: list[Run]) -> dict[Row, dict[str, list[Run]]]:
    """Runs by row and task, rows and tasks in the paper's order; within a cell only the seed differs.

    A run of another shape than most of its task and method, or of other data, has that among its row's
    settings. A second run with the same seed in a cell is left out by name.
    """
    usual, cells = usual_shapes(runs), defaultdict(lambda: defaultdict(dict))
    for run in runs:
        c = run.config
        most, data = usual[str(c.get("model")), c["task"], c["method"]]
        settings = departures(c)
        settings |= {key: c.get(key) for key, other in zip(SHAPE, most, strict=True) if c.get(key) != other}
        settings |= {} if str(c.get("data_dir")) == data else {"data_dir": c.get("data_dir")}
        label = settings_label(settings)
        row = Row(str(c.get("model")), c["method"], c["target_rank"], c["optimizer"], c["score"], label)
        seeds = cells[row][c["task"]]
        if c["seed"] in seeds:
            skip(run.folder, f"the same settings and seed as {seeds[c['seed']].folder}")
        else:
            seeds[c["seed"]] = run
    columns = [task for group in GROUPS.values() for task in group]
    return {
        row: {task: list(cells[row][task].values()) for task in columns if task in cells[row]}
        for row in sorted(cells, key=Row.order)
    }


# ---- the table -------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A task's best validation scores in percent over seeds, and the paper's if the runs are the paper's."""

    mean: float
    sd: float | None  # with n − 1; None for one seed
    seeds: int
    paper: float | None

    def __str__(self) -> str:
        deviation = "" if self.sd is None else f" ± {self.sd:.2f}"
        paper = "" if self.paper is None else f" [{self.paper:.2f}]"
        return f"{self.mean:.2f}{deviation} ({self.seeds}){paper}"


def paper_table() -> dict[tuple, float]:
    """[C] table I: percent by (method, rank, optimizer, score, task)."""
    with (HERE / "results/paper_table1.csv").open(newline="") as file:
        return {
            (r["method"], float(r["rank"] or 0), r["optimizer"], r["score"], task): float(r[task])
            for r in csv.DictReader(file)
            for task in TASKS
        }


def cell(runs: list[Run], paper: dict[tuple, float]) -> Cell:
    scores = [100 * run.results["best"][run.results["metric"]] for run in runs]
    c = runs[0].config
    key = (c["method"], c["target_rank"] or 0, c["optimizer"], c["score"] or "", c["task"])
    known = paper.get(key) if is_the_papers(c) else None
    sd = statistics.stdev(scores) if len(scores) > 1 else None
    return Cell(statistics.fmean(scores), sd, len(scores), known)


def averages(cells: dict[str, Cell], tasks: list[str]) -> dict[str, float | None]:
    """Means over the table's large tasks, its small ones and all; None where the row lacks one of them."""
    groups = {name: [task for task in group if task in tasks] for name, group in GROUPS.items()}
    if not all(groups.values()):
        groups = {}
    groups = {f"{name} avg": group for name, group in (groups | {"all": tasks}).items() if len(group) > 1}
    return {
        name: statistics.fmean(cells[task].mean for task in group) if all(t in cells for t in group) else None
        for name, group in groups.items()
    }


def marked(texts: list[str], values: list[float | None]) -> list[str]:
    """The best in bold and the second best in italics, as far as the two decimals tell."""
    ranking = sorted({round(value, 2) for value in values if value is not None}, reverse=True)
    marks = dict(zip(ranking, ("**", "*"), strict=False)) if len(ranking) > 1 else {}
    marks = [marks.get(round(value, 2), "") if value is not None else "" for value in values]
    return [f"{mark}{text}{mark}" for mark, text in zip(marks, texts, strict=True)]


def print_table(args: argparse.Namespace) -> None:
    runs = []
    for run in find_runs(args.runs):
        if run.config["demo"]:
            skip(run.folder, "a demo run")
        else:
            runs.append(run)
    if not runs:
        raise UsageError(f"there are only demo runs in {', '.join(map(str, args.runs))}")
    paper, table = paper_table(), {}
    for row, tasks in rows_of(runs).items():
        table[row] = {task: cell(same_but_seed, paper) for task, same_but_seed in tasks.items()}
    if args.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow([*Row._fields, "task", "metric", *Cell._fields])
        for row, cells in table.items():
            for task, c in cells.items():
                rounded = (round(c.mean, 4), None if c.sd is None else round(c.sd, 4), c.seeds, c.paper)
                writer.writerow([*row, task, TASKS[task].metric, *rounded])
        return
    models = dict.fromkeys(row.model for row in table)
    sections = [
        markdown({row: cells for row, cells in table.items() if row.model == model})
        + "\n\n"
        + "\n".join(conditions([run for run in runs if str(run.config.get("model")) == model]))
        for model in models
    ]
    print("\n\n".join(sections))


def markdown(table: dict[Row, dict[str, Cell]]) -> str:
    """The rows of one model, a column a task."""
    tasks = [t for group in GROUPS.values() for t in group if any(t in cells for cells in table.values())]
    means = [averages(cells, tasks) for cells in table.values()]
    columns = {"": [row.label() for row in table]}
    for task in tasks:
        cells = [cells.get(task) for cells in table.values()]
        texts = ["" if c is None else str(c) for c in cells]
        columns[TASKS[task].folder] = marked(texts, [c and c.mean for c in cells])
    for name in means[0]:
        values = [mean[name] for mean in means]
        columns[name] = marked(["" if value is None else f"{value:.2f}" for value in values], values)
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conditions(runs: list[Run]) -> Iterator[str]:
    """What the rows of one model have in common, as a Markdown list."""
    paper = any(is_the_papers(run.config) for run in runs)
    yield (
        f"Encoder `{runs[0].config.get('model')}`. Best validation score in percent: mean ± standard "
        f"deviation (number of seeds){' [the paper, five seeds]' * paper}; the best in bold, the second in "
        "italics."
    )
    yield ""
    methods = defaultdict(list)
    for (_, task, method), (most, _) in usual_shapes(runs).items():
        methods[task, most].append(NAMES[method])
    for (task, most), those in methods.items():
        c = dict(zip(SHAPE, most, strict=True))
        which = f" ({', '.join(those)})" if sum(other == task for other, _ in methods) > 1 else ""
        grouped = " of like length" if c["group_by_length"] else ""
        yield (
            f"- {TASKS[task].folder}{which}: {TASKS[task].metric.replace('_', ' ')}; {c['total_steps']} "
            f"updates of {batch(c)} examples{grouped}, at most {c['max_length']} tokens, evaluated every "
            f"{c['eval_every']}"
        )


# ---- figures ---------------------------------------------------------------------------------------------


def pyplot():
    """matplotlib.pyplot without a screen. UsageError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Figure, path: Path) -> None:
    """All of it or nothing: written beside and renamed."""
    beside = path.with_name(f".{path.name}.new")
    try:
        figure.savefig(beside, dpi=150, format=path.suffix.removeprefix(".") or "png")
        os.replace(beside, path)
    except (OSError, ValueError) as error:
        beside.unlink(missing_ok=True)
        raise UsageError(f"-o {path} cannot be written: {error}") from None
    print(path)


def title(row: Row, task: str, runs: list[Run]) -> str:
    return f"{TASKS[task].folder}, {row.label()}, {len(runs)} seed{'s' * (len(runs) != 1)}"


def mean_ranks(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By title, each adapter's rank, averaged over seeds. UsageError if the runs are of several models."""
    runs = []
    for run in find_runs(args.runs):
        if run.results["ranks"]:
            runs.append(run)
        else:
            skip(run.folder, "there are no adapters, so no ranks")
    if not runs:
        raise UsageError("none of these runs has adapters")
    for run in runs:
        first = runs[0]
        if (
            run.config.get("model") != first.config.get("model")
            or run.results["ranks"].keys() != first.results["ranks"].keys()
        ):
            raise UsageError(
                f"{first.folder} and {run.folder} are of different models or adapters "
                f"({first.config.get('model')}, {run.config.get('model')}): draw them one by one"
            )
    return {
        title(row, task, same): {
            name: statistics.fmean(run.results["ranks"][name] for run in same)
            for name in same[0].results["ranks"]
        }
        for row, tasks in rows_of(runs).items()
        for task, same in tasks.items()
    }


def ranks_figure(patterns: dict[str, dict[str, float]]) -> Figure:
    """[C] figure 1: for each method a heat map of layers and modules, one colour scale."""
    plt = pyplot()
    across = min(len(patterns), 2)
    down = math.ceil(len(patterns) / across)
    example = rank_rows(next(iter(patterns.values())))
    modules = list(dict.fromkeys(module for row in example.values() for module in row))
    size = (2.2 + across * (0.4 * len(example) + 0.6), 0.6 + down * (0.32 * len(modules) + 0.7))
    figure, axes = plt.subplots(
        down, across, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    top = max(max(ranks.values()) for ranks in patterns.values())
    for axis in axes.flat[len(patterns) :]:
        axis.remove()
    for axis, (name, ranks) in zip(axes.flat, patterns.items(), strict=False):
        rows = rank_rows(ranks)
        grid = np.array([[row.get(module, math.nan) for row in rows.values()] for module in modules])
        image = axis.imshow(grid, vmin=0, vmax=max(top, 1), cmap="viridis", aspect="auto")
        for (y, x), rank in np.ndenumerate(grid):
            colour = "black" if rank > 0.6 * top else "white"
            axis.text(x, y, f"{rank:.2g}", ha="center", va="center", color=colour, fontsize=7)
        axis.set_title(name, fontsize=8)
        axis.set_xticks(range(len(rows)), rows, fontsize=7)
        axis.set_yticks(range(len(modules)), modules, fontsize=7)
    figure.supxlabel("layer", fontsize=8)
    figure.colorbar(image, ax=axes, label="rank", shrink=0.8)
    return figure


def print_ranks(args: argparse.Namespace) -> None:
    patterns = mean_ranks(args)
    if args.o:
        save(ranks_figure(patterns), args.o)
        return
    texts = [
        f"{name}\n{rank_grid({m: round(r, 2) for m, r in ranks.items()})}" for name, ranks in patterns.items()
    ]
    print("\n\n".join(texts))


def read_lines(run: Run, name: str) -> list[dict]:
    """The objects of one of the run's .jsonl files; [] and a line on stderr where that cannot be had."""
    try:
        lines = [json.loads(line) for line in (run.folder / name).read_text(encoding="utf-8").splitlines()]
        if not lines or not all(isinstance(line, dict) and "step" in line for line in lines):
            raise ValueError("nothing of a run's in it")
    except FileNotFoundError:
        skip(run.folder, f"no {name}{' (it takes --track_scores)' * (name == 'score_agreement.jsonl')}")
    except (OSError, ValueError) as error:
        skip(run.folder, f"{name} cannot be read: {error}")
    else:
        return lines
    return []


def mean_over_seeds(series: list[dict[int, float]]) -> tuple[list[int], np.ndarray]:
    """Steps that all series have, and the values there: (series, steps)."""
    steps = sorted(set.intersection(*(set(one) for one in series)))
    return steps, np.array([[one[step] for step in steps] for one in series])


def curves_figure(runs: list[Run]) -> Figure:
    """For each task, the validation score against the step and the budget under it, a line a row."""
    journals = {run.folder: lines for run in runs if (lines := read_lines(run, "metrics.jsonl"))}
    rows = rows_of([run for run in runs if run.folder in journals])
    tasks = list(dict.fromkeys(task for cells in rows.values() for task in cells))
    if not tasks:
        raise UsageError("none of these runs has a metrics.jsonl that can be read")
    plt = pyplot()
    size = (1 + 5 * len(tasks), 5.5)
    figure, axes = plt.subplots(
        2, len(tasks), figsize=size, squeeze=False, sharex="col", height_ratios=(3, 1), layout="constrained"
    )
    for i, (row, cells) in enumerate(rows.items()):
        for task, same in cells.items():
            score, budget = axes[:, tasks.index(task)]
            split, metric = TASKS[task].validation[0], TASKS[task].metric
            evaluations, budgets = [], []
            for run in same:
                lines = journals[run.folder]
                evaluations.append({e["step"]: e[metric] for e in lines if e.get("split") == split})
                budgets.append({e["step"]: e["budget"] for e in lines if "budget" in e})
            steps, values = mean_over_seeds(evaluations)
            label = f"{row.label()}, {len(same)} seed{'s' * (len(same) != 1)}"
            score.plot(steps, values.mean(0), label=label, color=f"C{i}")
            score.fill_between(steps, values.min(0), values.max(0), alpha=0.15, color=f"C{i}", linewidth=0)
            steps, values = mean_over_seeds(budgets)
            budget.plot(steps, values.mean(0), color=f"C{i}")
            score.set(title=TASKS[task].folder, ylabel=metric.replace("_", " "))
            budget.set(xlabel="step", ylabel="triplets")
    for axis in axes[0]:
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    return figure


def draw_curves(args: argparse.Namespace) -> None:
    save(curves_figure(find_runs(args.runs)), args.o or Path("curves.png"))


class Agreement(NamedTuple):
    """How far scores agree in runs that differ in the seed alone: means over allocations and seeds."""

    names: list[str]
    spearman: np.ndarray  # (names, names), NaN where it is not defined
    jaccard: np.ndarray
    sigma_cv: dict[int, float]  # by step, mean over seeds; {} without a posterior


def agreements(runs: list[Run]) -> dict[str, Agreement]:
    tracked = {run.folder: lines for run in runs if (lines := read_lines(run, "score_agreement.jsonl"))}
    if not tracked:
        raise UsageError("none of these runs has a score_agreement.jsonl: train with --track_scores")
    found = {}
    for row, tasks in rows_of([run for run in runs if run.folder in tracked]).items():
        for task, same in tasks.items():
            lines = [tracked[run.folder] for run in same]
            pairs = [pair.split("/") for pair in lines[0][0]["spearman"]]
            names = list(dict.fromkeys(name for pair in pairs for name in pair))
            matrices = []
            for measure in ("spearman", "jaccard"):
                matrix = np.eye(len(names))
                for a, b in pairs:
                    values = [line[measure][f"{a}/{b}"] for of_run in lines for line in of_run]
                    values = [value for value in values if value is not None]
                    i, j = names.index(a), names.index(b)
                    matrix[i, j] = matrix[j, i] = statistics.fmean(values) if values else math.nan
                matrices.append(matrix)
            series = [
                {e["step"]: e["sigma_cv"] for e in of_run if e["sigma_cv"] is not None} for of_run in lines
            ]
            steps, values = mean_over_seeds(series)
            cv = dict(zip(steps, values.mean(0), strict=True))
            found[title(row, task, same)] = Agreement(names, *matrices, cv)
    return found


def agreement_text(name: str, agreement: Agreement) -> str:
    """Spearman above the diagonal, Jaccard below it."""
    width = max(map(len, agreement.names))
    lines = [name, " " * width + "  " + "  ".join(agreement.names)]
    both = np.where(np.triu(np.ones_like(agreement.spearman)), agreement.spearman, agreement.jaccard)
    for i, own in enumerate(agreement.names):
        cells = ["" if i == j else f"{both[i, j]:.3f}" for j in range(len(agreement.names))]
        cells = [cell.rjust(len(other)) for cell, other in zip(cells, agreement.names, strict=True)]
        lines.append(f"{own:>{width}}  " + "  ".join(cells))
    if agreement.sigma_cv:
        last = max(agreement.sigma_cv)
        lines.append(f"coefficient of variation of σ at the last allocation: {agreement.sigma_cv[last]:.2g}")
    return "\n".join(lines)


def agreement_figure(found: dict[str, Agreement]) -> Figure:
    """A matrix for each setting, Spearman above the diagonal and Jaccard below; σ's variation under them."""
    plt = pyplot()
    posterior = any(agreement.sigma_cv for agreement in found.values())
    across = min(len(found), 3)
    down = math.ceil(len(found) / across)
    figure = plt.figure(figsize=(0.5 + 3.6 * across, 3.6 * down + 2.4 * posterior), layout="constrained")
    grid = figure.add_gridspec(down + posterior, across, height_ratios=[3.6] * down + [2.0] * posterior)
    for i, (name, agreement) in enumerate(found.items()):
        axis = figure.add_subplot(grid[i // across, i % across])
        upper = np.triu(np.ones_like(agreement.spearman, dtype=bool))
        both = np.where(upper, agreement.spearman, agreement.jaccard)
        np.fill_diagonal(both, math.nan)
        axis.imshow(both, vmin=0, vmax=1, cmap="viridis")
        for (y, x), value in np.ndenumerate(both):
            if math.isfinite(value):
                colour = "black" if value > 0.6 else "white"
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
        ticks = range(len(agreement.names))
        axis.set_xticks(ticks, agreement.names, fontsize=7, rotation=40, ha="right")
        axis.set_yticks(ticks, agreement.names, fontsize=7)
        axis.set_title("\n".join(textwrap.wrap(f"{chr(97 + i)}) {name}", 46)), fontsize=8)
    if posterior:
        axis = figure.add_subplot(grid[down, :])
        for i, agreement in enumerate(found.values()):
            if agreement.sigma_cv:
                axis.semilogy(*zip(*agreement.sigma_cv.items(), strict=True), label=f"{chr(97 + i)})")
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel("σ: sd / mean", fontsize=8)
        axis.legend(fontsize=7, ncols=len(found))
        axis.grid(alpha=0.3)
    figure.suptitle("Agreement of scores: Spearman above the diagonal, Jaccard of the kept below", fontsize=9)
    return figure


def draw_agreement(args: argparse.Namespace) -> None:
    found = agreements(find_runs(args.runs))
    print("\n\n".join(agreement_text(name, agreement) for name, agreement in found.items()))
    if args.o:
        save(agreement_figure(found), args.o)


# ---- prediction ------------------------------------------------------------------------------------------


class Evaluated(NamedTuple):
    """What --eval_only found for runs that differ in the seed alone."""

    name: str
    runs: list[Run]
    # By number of draws and τ, (0, 0) being the mean: every run's metrics.
    scores: dict[tuple[int, float], list[dict]]


def evaluated(folders: list[Path]) -> list[Evaluated]:
    """Runs with an evaluation.json of their task's (first) validation split."""
    runs, found = find_runs(folders), {}
    for run in runs:
        try:
            rows = read_json(run.folder / "evaluation.json")["evaluations"]
            split = TASKS[run.config["task"]].validation[0]
            mine = {(row["samples"], row["temperature"]): row for row in rows if row["split"] == split}
            numbers = [number for row in mine.values() for key, number in row.items() if key != "split"]
            if not numbers or not all(map(math.isfinite, numbers)):
                raise ValueError(f"no evaluation of {split} in evaluation.json")
        except (ValueError, KeyError, TypeError) as error:
            skip(run.folder, f"{error} (run_glue.py --eval_only writes evaluation.json)")
        else:
            found[run.folder] = mine
    runs = [run for run in runs if run.folder in found]
    if not runs:
        raise UsageError(
            "none of these runs has an evaluation of its validation data: run_glue.py --eval_only RUN"
        )
    groups = []
    for row, tasks in rows_of(runs).items():
        for task, same in tasks.items():
            keys = set.intersection(*(set(found[run.folder]) for run in same))
            scores = {key: [found[run.folder][key] for run in same] for key in sorted(keys)}
            groups.append(Evaluated(title(row, task, same), same, scores))
    return groups


def how(samples: int, temperature: float) -> str:
    return f"{samples} draws, τ = {temperature:g}" if samples else "mean"


def calibration_table(groups: list[Evaluated]) -> str:
    """Markdown: mean ± standard deviation over seeds, in percent but for NLL and Brier score."""
    lines = [
        "|  | prediction | score | accuracy | NLL | ECE | Brier |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for group in groups:
        metric = TASKS[group.runs[0].config["task"]].metric
        for key, rows in group.scores.items():
            cells = []
            for name, scale, digits in (
                (metric, 100, 2),
                ("accuracy", 100, 2),
                ("nll", 1, 4),
                ("ece", 100, 2),
                ("brier", 1, 4),
            ):
                values = [scale * row[name] for row in rows if name in row]
                deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.{digits}f}{deviation}" if values else "")
            lines.append(f"| {group.name} | {how(*key)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reliability(
    confidence: np.ndarray, right: np.ndarray, bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each of metrics.calibration's bins: examples, and their mean confidence and accuracy (or NaN)."""
    bin_of = np.digitize(confidence, np.arange(1, bins) / bins, right=True)
    counts = np.bincount(bin_of, minlength=bins)
    sums = [np.bincount(bin_of, weights=values, minlength=bins) for values in (confidence, right)]
    with np.errstate(invalid="ignore"):
        return counts, *(total / counts for total in sums)


def reliability_figure(groups: list[Evaluated]) -> Figure:
    """Accuracy against confidence, all seeds together, and how many examples are in each bin under it."""
    plt = pyplot()
    size = (0.5 + 3.2 * len(groups), 4.4)
    figure, axes = plt.subplots(
        2,
        len(groups),
        figsize=size,
        squeeze=False,
        sharex=True,
        sharey="row",
        height_ratios=(3, 1),
        layout="constrained",
    )
    for group, (diagram, histogram) in zip(groups, axes.T, strict=True):
        split = TASKS[group.runs[0].config["task"]].validation[0]
        diagram.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for i, (samples, tau) in enumerate(key for key in group.scores if key[0] == 0 or key[1] == 1):
            together = []
            for run in group.runs:
                tensors, _ = read_tensors(run.folder / "predictions.safetensors")
                labels = tensors.get(f"{split}.labels")
                p = tensors.get(f"{split}.tau={tau:g}" if samples else f"{split}.mean")
                if p is None or labels is None or p.ndim != 2 or len(p) != len(labels):
                    raise UsageError(f"{run.folder}: predictions.safetensors is not of the same evaluation")
                together.append((p.amax(1).numpy(), (p.argmax(1) == labels).numpy()))
            counts, confidence, accuracy = reliability(*map(np.concatenate, zip(*together, strict=True)))
            diagram.plot(
                confidence, accuracy, marker="o", markersize=3, color=f"C{i}", label=how(samples, tau)
            )
            histogram.bar(
                np.arange(10) / 10 + 0.02 + 0.04 * i, counts, width=0.035, align="edge", color=f"C{i}"
            )
        diagram.set_title("\n".join(textwrap.wrap(group.name, 38)), fontsize=8)
        diagram.legend(fontsize=7)
        histogram.set_xlabel("confidence", fontsize=8)
    axes[0, 0].set_ylabel("accuracy", fontsize=8)
    axes[1, 0].set_ylabel("examples", fontsize=8)
    axes[0, 0].set(xlim=(0, 1), ylim=(0, 1))
    return figure


def print_calibration(args: argparse.Namespace) -> None:
    groups = [group for group in evaluated(args.runs) if TASKS[group.runs[0].config["task"]].labels]
    if not groups:
        raise UsageError("none of these runs is of a task with classes")
    print(calibration_table(groups))
    if args.o:
        save(reliability_figure(groups), args.o)


def temperature_figure(groups: list[Evaluated]) -> Figure:
    """[V] figure 1: error (100 − the score in percent) and NLL against τ, with their range over seeds."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for i, group in enumerate(groups):
        metric = TASKS[group.runs[0].config["task"]].metric
        drawn = {tau: rows for (samples, tau), rows in group.scores.items() if samples}
        drawn.setdefault(0.0, group.scores.get((0, 0.0), []))
        taus = sorted(tau for tau, rows in drawn.items() if rows)
        for axis, name in zip(axes, (metric, "nll"), strict=True):
            if all(name in row for tau in taus for row in drawn[tau]):
                values = np.array([[row[name] for row in drawn[tau]] for tau in taus])
                values = 100 * (1 - values) if name == metric else values
                axis.plot(taus, values.mean(1), marker="o", markersize=3, color=f"C{i}", label=group.name)
                axis.fill_between(taus, values.min(1), values.max(1), alpha=0.15, color=f"C{i}", linewidth=0)
    axes[0].set(xlabel="τ", ylabel="error: 100 − score in percent")
    axes[1].set(xlabel="τ", ylabel="NLL")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center")
    return figure


def print_temperature(args: argparse.Namespace) -> None:
    groups = [group for group in evaluated(args.runs) if any(samples for samples, _ in group.scores)]
    if not groups:
        raise UsageError("none of these runs was evaluated with --eval_samples")
    print(calibration_table(groups))
    if args.o:
        save(temperature_figure(groups), args.o)


# ---- main ------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(message)

    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)

    commands = verbs.add_parser("commands", help="the grid, a run_glue.py command a line")
    commands.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    commands.add_argument("--seeds", nargs="+", type=whole(0), default=SEEDS)
    commands.add_argument("--ranks", nargs="+", type=number(0), default=(2, 4))
    commands.add_argument("--methods", nargs="+", choices=OTHER_FLAGS, default=list(OTHER_FLAGS))
    commands.add_argument("--missing", type=Path, metavar="RUNS", help="leave out what is finished in RUNS")
    commands.add_argument("flags", nargs="*", metavar="-- FLAG", help="flags that every command gets")
    commands.set_defaults(do=print_commands)
    for name, do, about in (
        ("table", print_table, "the paper's Table I, as Markdown"),
        ("ranks", print_ranks, "the paper's Figure 1: ranks by layer and module"),
        ("curves", draw_curves, "score and budget against step"),
        ("agreement", draw_agreement, "how far the scores agree"),
        ("calibration", print_calibration, "accuracy, NLL, ECE, Brier score; a reliability diagram"),
        ("temperature", print_temperature, "error and NLL against τ"),
    ):
        verb = verbs.add_parser(name, help=about)
        verb.add_argument("runs", nargs="+", type=Path, help="folders of runs")
        verb.set_defaults(do=do)
        if name == "table":
            verb.add_argument("--csv", action="store_true", help="a line a cell, as CSV")
        else:
            verb.add_argument("-o", type=Path, metavar="PICTURE", help="where to draw it (.png, .pdf, .svg)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        args.do(args)
    except UsageError as error:
        print("reproduce.py: error:", *str(error).split(), file=sys.stderr)
        return 2
    except BrokenPipeError:  # `reproduce.py commands | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
import itertools
import json
import math
import os
import shlex
import statistics
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from adalora import TARGETS
from checkpoint import read_tensors
from glue import TASKS, task_of
from metrics import reliability
from run_glue import (
    EVAL_ONLY_FLAGS,
    MODEL,
    OTHER_FLAGS,
    Parser,
    UsageError,
    number,
    parse_args,
    plan,
    rank_grid,
    rank_rows,
    whole,
)
from scores import SCORES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SEEDS = (2021, 2022, 2023, 2024, 2025)
PAPER_SCORES = ("sensitivity", "snr_abs", "snr", "mu", "inv_sigma")
GROUPS = {"large": ("mnli", "qqp", "qnli", "sst2"), "small": ("cola", "stsb", "mrpc", "rte")}  # columns
NONE = type(None)
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "adalora": "AdaLoRA", "ivon": "IVON", "adamw": "AdamW"}
# Which row of a table a run belongs to is decided by its settings. Of those in config.json these have a
# place of their own,
IDENTITY = "task method optimizer score target_rank model demo".split()
# the length of the run and its batches are its shape, which each task has for itself,
SHAPE = "total_steps batch_size grad_accum processes max_length eval_every group_by_length".split()
BATCH = ("batch_size", "grad_accum", "processes")
# these cannot change a result, but for rounding, or follow from others,
IGNORED = (
    "seed epochs max_steps output_dir overwrite device eval_batch_size track_scores eval_samples temperature "
    "resume resumed checkpoint_every keep_checkpoint encoder data versions git_commit device_name threads"
).split()
IGNORED += EVAL_ONLY_FLAGS
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
    rows = ["--method full --optimizer adamw"] if "full" in methods else []
    pairs = [("adamw", "sensitivity"), *(("ivon", score) for score in PAPER_SCORES)]
    for rank in ranks:
        if "lora" in methods:
            rows.append(f"--method lora --optimizer adamw --target_rank {rank:.12g}")
        for optimizer, score in pairs if "adalora" in methods else ():
            rows.append(f"--method adalora --optimizer {optimizer} --score {score} --target_rank {rank:.12g}")
    for task, row, seed in itertools.product(tasks, rows, seeds):
        yield f"--task {task} {row} --seed {seed}".split()


def resolved(argv: list[str]) -> dict:
    """Every setting that run_glue.py makes of a command line, as config.json has it."""
    args = parse_args(argv)
    task = task_of(args.task, args.method, args.demo)
    plan(args, task, task.train_size, modules=1)
    return json.loads(json.dumps(vars(args), default=str))


def print_commands(args: argparse.Namespace) -> None:
    own = {"--task", "--method", "--optimizer", "--score", "--target_rank", "--seed", "--output_dir"}
    if taken := own.intersection(word.split("=")[0] for word in args.flags):
        raise UsageError(f"every line has its own {sorted(taken)[0]}: leave it out after --")
    exists = args.missing and args.missing.exists()
    finished = [run.config for run in find_runs([args.missing], at_least=0)] if exists else []
    lines, compared = [], resolved(["--task", "cola"]).keys() - (set(IGNORED) - {"seed"})
    for argv in grid(
        *(list(dict.fromkeys(each)) for each in (args.tasks, args.seeds, args.ranks, args.methods))
    ):
        wanted = resolved([*argv, *args.flags])
        keys = (
            compared if wanted["targets"] else compared - {"targets"}
        )  # a run has its model's own otherwise
        if any(all(config.get(key) == wanted[key] for key in keys) for config in finished):
            continue
        if args.missing:
            name = Path(wanted["output_dir"]).name
            names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
            free = next(n for n in names if not (args.missing / n / "results.json").exists())
            argv += ["--output_dir", str(args.missing / free), "--resume"]
        lines.append(shlex.join(["python", "run_glue.py", *argv, *args.flags]))
    if lines:
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
            run.config.setdefault("processes", 1)
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
    absent += [key for key in (*shared, "metric", "best", "ranks", "budget") if key not in results]
    if absent:
        raise ValueError(f"not a run's, {absent[0]} is missing")
    if any(config[key] != results[key] for key in shared):
        raise ValueError("config.json and results.json are of two different runs")
    odd = [
        key
        for key in (*SHAPE, "seed", "target_rank")
        if type(config.get(key)) not in (int, float, bool, NONE)
    ]
    if odd or type(config["seed"]) is not int or type(config["demo"]) is not bool:
        raise ValueError(f"not a run's: {(odd or ['seed or demo'])[0]} is not a number")
    best = results["best"].get(str(results["metric"])) if isinstance(results["best"], dict) else None
    if type(best) not in (int, float) or not math.isfinite(best):
        raise ValueError(f"results.json has no number for the best {results['metric']}")
    ranks = results["ranks"]
    if not isinstance(ranks, dict) or any(type(rank) is not int for rank in ranks.values()):
        raise ValueError("results.json has no ranks")
    if not isinstance(results["budget"], dict) or type(results["budget"].get("b0")) is not int:
        raise ValueError("results.json has no budget")
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


def usual_encoders(runs: list[Run]) -> dict[str, str]:
    """By model, the checksum of the frozen weights of most runs; a folder's name says too little."""
    counts = defaultdict(Counter)
    for run in runs:
        if run.config.get("encoder") and run.config["method"] != "full":
            counts[str(run.config.get("model"))][run.config["encoder"]] += 1
    return {model: count.most_common(1)[0][0] for model, count in counts.items()}


def is_the_papers(config: dict) -> bool:
    """Whether model, settings, length and batches are those behind the paper's number."""
    argv = ["--task", config["task"], "--method", config["method"], "--optimizer", config["optimizer"]]
    usual = resolved(argv)
    same = all(config.get(key) == usual[key] for key in SHAPE if key not in BATCH)
    return (
        config.get("model") == MODEL
        and not departures(config)
        and same
        and batch(config) == usual["batch_size"]
        and (config["optimizer"] == "adamw" or config["processes"] == 1)  # each process draws
    )


def batch(config: dict) -> int | None:
    """Examples in an update."""
    sizes = [config.get(key) for key in BATCH]
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
    demo: bool = False

    def label(self) -> str:
        rank = self.rank is not None and f"r={self.rank:g}"
        parts = self.demo and "demo", NAMES[self.method], NAMES[self.optimizer], self.score, rank
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
    encoders = usual_encoders(runs)
    usual, cells = usual_shapes(runs), defaultdict(lambda: defaultdict(dict))
    for run in runs:
        c = run.config
        most, data = usual[str(c.get("model")), c["task"], c["method"]]
        settings = departures(c)
        settings |= {key: c.get(key) for key, other in zip(SHAPE, most, strict=True) if c.get(key) != other}
        settings |= {} if str(c.get("data_dir")) == data else {"data_dir": c.get("data_dir")}
        if c["method"] != "full" and c.get("encoder") not in (None, encoders.get(str(c.get("model")))):
            settings["encoder"] = c["encoder"]
        kind = str(c.get("model")), c["method"], c["target_rank"], c["optimizer"], c["score"]
        row = Row(*kind, settings_label(settings), c["demo"])
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
        writer.writerow([*Row._fields[:-1], "task", "metric", *Cell._fields])
        for row, cells in table.items():
            for task, c in cells.items():
                rounded = (round(c.mean, 4), None if c.sd is None else round(c.sd, 4), c.seeds, c.paper)
                writer.writerow([*row[:-1], task, TASKS[task].metric, *rounded])
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
    path = path.resolve()
    beside = path.with_name(f".{path.name}.new")
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        figure.savefig(beside, dpi=150, format=path.suffix.removeprefix(".") or "png")
        os.replace(beside, path)
    except (OSError, ValueError) as error:
        beside.unlink(missing_ok=True)
        raise UsageError(f"-o {path} cannot be written: {error}") from None
    print(path)


class Group(NamedTuple):
    """Runs that differ in the seed alone, and what to call them."""

    name: str
    task: str
    row: Row
    runs: list[Run]


def groups_of(runs: list[Run]) -> list[Group]:
    """As `rows_of`, a group a cell; names are different."""
    cells = [(row, task, same) for row, tasks in rows_of(runs).items() for task, same in tasks.items()]
    models = {row.model for row, _, _ in cells}
    return [
        Group(
            f"{TASKS[task].folder}, {row.label()}, {seeds(len(same))}{f', {row.model}' * (len(models) > 1)}",
            task,
            row,
            same,
        )
        for row, task, same in cells
    ]


def seeds(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"


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
    first = runs[0]
    for run in runs:
        same_model = run.config.get("model") == first.config.get("model")
        if not same_model or run.results["ranks"].keys() != first.results["ranks"].keys():
            raise UsageError(
                f"{first.folder} and {run.folder} are of different models or adapters "
                f"({first.config.get('model')}, {run.config.get('model')}): draw them one by one"
            )
    return {
        group.name: {
            name: statistics.fmean(run.results["ranks"][name] for run in group.runs)
            for name in first.results["ranks"]
        }
        for group in groups_of(runs)
    }


def ranks_figure(patterns: dict[str, dict[str, float]]) -> Figure:
    """[C] figure 1: for each method a heat map of layers and modules, one colour scale."""
    plt = pyplot()
    across = min(len(patterns), 2)
    down = math.ceil(len(patterns) / across)
    example = rank_rows(next(iter(patterns.values())))
    modules = list(dict.fromkeys(module for row in example.values() for module in row))
    width = 0.4 * len(example) + 0.6
    titles = {name: "\n".join(textwrap.wrap(name, int(14 * width))) for name in patterns}
    title_height = 0.13 * max(title.count("\n") for title in titles.values())
    size = (2.2 + across * width, 0.6 + down * (0.32 * len(modules) + 0.7 + title_height))
    figure, axes = plt.subplots(
        down, across, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    top = max(max(ranks.values()) for ranks in patterns.values())
    panels = list(axes.flat[: len(patterns)])
    for axis in axes.flat[len(patterns) :]:
        axis.remove()
    for axis, (name, ranks) in zip(panels, patterns.items(), strict=True):
        rows = rank_rows(ranks)
        grid = np.array([[row.get(module, math.nan) for row in rows.values()] for module in modules])
        image = axis.imshow(grid, vmin=0, vmax=max(top, 1), cmap="viridis", aspect="auto")
        for (y, x), rank in np.ndenumerate(grid):
            colour = "black" if rank > 0.6 * top else "white"
            text = "" if math.isnan(rank) else f"{round(rank, 1):g}"
            axis.text(x, y, text, ha="center", va="center", color=colour, fontsize=7)
        axis.set_title(titles[name], fontsize=8)
        axis.set_xticks(range(len(rows)), rows, fontsize=7)
        axis.tick_params(labelbottom=axis in panels[-across:])
        axis.set_yticks(range(len(modules)), modules, fontsize=7)
    figure.supxlabel("layer", fontsize=8)
    figure.colorbar(image, ax=panels, label="rank", shrink=0.8)
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


def read_lines(run: Run, name: str, needed: Callable[[dict, Run], bool]) -> list[dict]:
    """The objects of one of the run's .jsonl files; [] and a line on stderr where that cannot be had."""
    try:
        lines = [json.loads(line) for line in (run.folder / name).read_text(encoding="utf-8").splitlines()]
        if not lines or not all(needed(line, run) for line in lines):
            raise ValueError("it is not a run's")
    except FileNotFoundError:
        skip(run.folder, f"no {name}{' (it takes --track_scores)' * (name == 'score_agreement.jsonl')}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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

    def needed(line: dict, run: Run) -> bool:
        metric = TASKS[run.config["task"]].metric
        return math.isfinite(line["step"] + line[metric if "split" in line else "budget"])

    journals = {run.folder: lines for run in runs if (lines := read_lines(run, "metrics.jsonl", needed))}
    groups = groups_of([run for run in runs if run.folder in journals])
    tasks = list(dict.fromkeys(group.task for group in groups))
    if not tasks:
        raise UsageError("none of these runs has a metrics.jsonl that can be read")
    plt = pyplot()
    labels = {group.name: "\n".join(textwrap.wrap(group.name, 72)) for group in groups}
    most = max(sum(1 + labels[g.name].count("\n") for g in groups if g.task == task) for task in tasks)
    size = (1 + 5 * len(tasks), 5.7 + 0.15 * most)
    figure, axes = plt.subplots(
        2, len(tasks), figsize=size, squeeze=False, sharex="col", height_ratios=(3, 1), layout="constrained"
    )
    colours = {row: f"C{i}" for i, row in enumerate(dict.fromkeys(group.row for group in groups))}
    for group in groups:
        (score, budget), colour = axes[:, tasks.index(group.task)], colours[group.row]
        split, metric = TASKS[group.task].validation[0], TASKS[group.task].metric
        evaluations, budgets = [], []
        for run in group.runs:
            lines = journals[run.folder]
            evaluations.append({e["step"]: e[metric] for e in lines if e.get("split") == split})
            budgets.append({e["step"]: e["budget"] for e in lines if "budget" in e})
        steps, values = mean_over_seeds(evaluations)
        score.plot(steps, values.mean(0), label=labels[group.name], color=colour)
        score.fill_between(steps, values.min(0), values.max(0), alpha=0.15, color=colour, linewidth=0)
        steps, values = mean_over_seeds(budgets)
        budget.plot(steps, values.mean(0), color=colour)
        score.set(title=TASKS[group.task].folder, ylabel=metric.replace("_", " "))
        budget.set(xlabel="step", ylabel="triplets")
    for score, budget in axes.T:
        score.grid(alpha=0.3)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.4), "borderaxespad": 0}
        budget.legend(*score.get_legend_handles_labels(), fontsize=7, **below)
    return figure


def draw_curves(args: argparse.Namespace) -> None:
    save(curves_figure(find_runs(args.runs)), args.o or Path("curves.png"))


class Agreement(NamedTuple):
    """How far scores agree in runs that differ in the seed alone: means over allocations and seeds."""

    names: list[str]
    spearman: np.ndarray  # (names, names), NaN where it is not defined
    jaccard: np.ndarray
    chance: float  # Jaccard of two scores that have nothing to do with each other
    sigma_cv: dict[int, float]  # by step, mean over seeds; {} without a posterior


def agreements(runs: list[Run]) -> dict[str, Agreement]:
    def needed(line: dict, run: Run) -> bool:
        numbers = [*line["spearman"].values(), *line["jaccard"].values(), line["sigma_cv"]]
        numbers = [number for number in numbers if number is not None]
        same_pairs = line["spearman"].keys() == line["jaccard"].keys()
        return same_pairs and all(map(math.isfinite, [*numbers, line["step"], line["budget"]]))

    tracked = {
        run.folder: lines for run in runs if (lines := read_lines(run, "score_agreement.jsonl", needed))
    }
    if not tracked:
        raise UsageError("none of these runs has a score_agreement.jsonl: train with --track_scores")
    found = {}
    for group in groups_of([run for run in runs if run.folder in tracked]):
        lines = [tracked[run.folder] for run in group.runs]
        together = [line for of_run in lines for line in of_run]
        pairs = [pair.split("/") for pair in lines[0][0]["spearman"]]
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        matrices = []
        for measure in ("spearman", "jaccard"):
            matrix = np.eye(len(names))
            for a, b in pairs:
                values = [line[measure].get(f"{a}/{b}") for line in together]
                values = [value for value in values if value is not None]
                i, j = names.index(a), names.index(b)
                matrix[i, j] = matrix[j, i] = statistics.fmean(values) if values else math.nan
            matrices.append(matrix)
        # Two random sets of k of n triplets share k²/n of them.
        n = sum(run.results["budget"]["b0"] for run in group.runs) / len(group.runs)
        chance = statistics.fmean(k / (2 * n - k) if (k := line["budget"]) else 1.0 for line in together)
        series = [{e["step"]: e["sigma_cv"] for e in of_run if e["sigma_cv"] is not None} for of_run in lines]
        steps, values = mean_over_seeds(series)
        found[group.name] = Agreement(names, *matrices, chance, dict(zip(steps, values.mean(0), strict=True)))
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
    lines.append(f"Jaccard of two scores that have nothing in common: {agreement.chance:.3f}")
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
        text = f"{chr(97 + i)}) {name} (Jaccard by chance {agreement.chance:.2f})"
        axis.set_title("\n".join(textwrap.wrap(text, 46)), fontsize=8)
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
    """What --eval_only found for a group of runs."""

    group: Group
    # By number of draws and τ, (0, 0) being the mean: the runs that have it and their metrics.
    scores: dict[tuple[int, float], list[tuple[Run, dict]]]


def evaluated(folders: list[Path]) -> list[Evaluated]:
    """Runs with an evaluation.json of their own task's (first) validation split."""
    runs, found = find_runs(folders), {}
    for run in runs:
        split = TASKS[run.config["task"]].validation[0]
        try:
            rows = [
                row
                for row in read_json(run.folder / "evaluation.json")["evaluations"]
                if row["split"] == split
            ]
            if any(row[key] != run.config.get(key) for row in rows for key in ("model", "data_dir")):
                raise ValueError("evaluated with another model or other data than it was trained with")
            numbers = [row[key] for row in rows for key in row.keys() - {"split", "model", "data_dir"}]
            if not numbers or not all(map(math.isfinite, numbers)):
                raise ValueError(f"no evaluation of {split} in evaluation.json")
            found[run.folder] = {(row["samples"], row["temperature"]): row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            skip(run.folder, f"{error} (run_glue.py --eval_only writes evaluation.json)")
    runs = [run for run in runs if run.folder in found]
    if not runs:
        raise UsageError(
            "none of these runs has an evaluation of its validation data: run_glue.py --eval_only RUN"
        )
    results = []
    for group in groups_of(runs):
        scores = defaultdict(list)
        for run in group.runs:
            for key, row in found[run.folder].items():
                scores[key].append((run, row))
        results.append(Evaluated(group, dict(sorted(scores.items()))))
    return results


def how(samples: int, temperature: float) -> str:
    return f"{samples} draws, τ = {temperature:g}" if samples else "mean"


def calibration_table(found: list[Evaluated]) -> str:
    """Markdown: mean ± standard deviation over seeds, in percent but for NLL and Brier score."""
    lines = ["|  | prediction | seeds | score | accuracy | NLL | ECE | Brier |", "| --- " * 8 + "|"]
    for group, scores in found:
        name = group.name.replace(f", {seeds(len(group.runs))}", "")
        shown = (
            (TASKS[group.task].metric, 100, 2),
            ("accuracy", 100, 2),
            ("nll", 1, 4),
            ("ece", 100, 2),
            ("brier", 1, 4),
        )
        for key, rows in scores.items():
            cells = []
            for metric, scale, digits in shown:
                values = [scale * row[metric] for _, row in rows if metric in row]
                deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.{digits}f}{deviation}" if values else "")
            lines.append(f"| {name} | {how(*key)} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_predictions(run: Run, split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, classes) and labels (n,) that belong to evaluation.json; raises UsageError."""
    path = run.folder / "predictions.safetensors"
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise UsageError(str(error)) from None
    rows = read_json(run.folder / "evaluation.json")["evaluations"]
    p, labels = tensors.get(f"{split}.{key}"), tensors.get(f"{split}.labels")
    whole = (
        p is not None and labels is not None and labels.ndim == 1 and p.shape == (len(labels), p.shape[-1])
    )
    if not whole or metadata.get("evaluations") != json.dumps(rows):
        raise UsageError(
            f"{path} is not of the same evaluation as evaluation.json: run_glue.py --eval_only again"
        )
    return p.numpy(), labels.numpy()


def reliability_figure(found: list[Evaluated]) -> Figure:
    """Accuracy against confidence, all seeds together, and how many examples are in each bin under it."""
    plt = pyplot()
    across = min(len(found), 4)
    down = math.ceil(len(found) / across)
    figure, axes = plt.subplots(
        2 * down, across, figsize=(0.5 + 3.2 * across, 4.2 * down), squeeze=False, sharex=True,
        height_ratios=(3, 1) * down, layout="constrained",
    )  # fmt: skip
    for axis in axes[-2:, len(found) - across * (down - 1) :].flat:
        axis.remove()
    for n, (group, scores) in enumerate(found):
        diagram, histogram = axes[2 * (n // across) : 2 * (n // across) + 2, n % across]
        diagram.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for i, (samples, tau) in enumerate(key for key in scores if key[0] == 0 or key[1] == 1):
            key = f"tau={tau:g}" if samples else "mean"
            split = TASKS[group.task].validation[0]
            together = [read_predictions(run, split, key) for run, _ in scores[samples, tau]]
            counts, confidence, accuracy = reliability(*map(np.concatenate, zip(*together, strict=True)))
            diagram.plot(
                confidence, accuracy, marker="o", markersize=3, color=f"C{i}", label=how(samples, tau)
            )
            histogram.bar(
                np.arange(10) / 10 + 0.02 + 0.04 * i, counts, width=0.035, align="edge", color=f"C{i}"
            )
        diagram.set_title("\n".join(textwrap.wrap(group.name, 40)), fontsize=8)
        diagram.set(xlim=(0, 1), ylim=(0, 1))
        diagram.legend(fontsize=7)
        diagram.set_ylabel("accuracy", fontsize=8)
        histogram.set_ylabel("examples", fontsize=8)
        histogram.set_xlabel("confidence", fontsize=8)
    return figure


def print_calibration(args: argparse.Namespace) -> None:
    found = [one for one in evaluated(args.runs) if TASKS[one.group.task].labels]
    if not found:
        raise UsageError("none of these runs is of a task with classes")
    print(calibration_table(found))
    if args.o:
        save(reliability_figure(found), args.o)


def temperature_figure(found: list[Evaluated]) -> Figure:
    """[V] figure 1: error (100 − the score in percent) and NLL against τ, with their range over seeds."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for i, (group, scores) in enumerate(found):
        metric = TASKS[group.task].metric
        by_tau = {tau: [row for _, row in rows] for (_, tau), rows in scores.items()}  # τ = 0 is the mean
        for axis, name in zip(axes, (metric, "nll"), strict=True):
            curve = {
                tau: [row[name] for row in rows]
                for tau, rows in by_tau.items()
                if all(name in r for r in rows)
            }
            if name == metric:
                curve = {tau: [100 * (1 - score) for score in values] for tau, values in curve.items()}
            middle, low, high = (
                [f(values) for values in curve.values()] for f in (statistics.fmean, min, max)
            )
            axis.plot(list(curve), middle, marker="o", markersize=3, color=f"C{i}", label=group.name)
            axis.fill_between(list(curve), low, high, alpha=0.15, color=f"C{i}", linewidth=0)
    axes[0].set(xlabel="τ", ylabel="error: 100 − score in percent")
    axes[1].set(xlabel="τ", ylabel="NLL")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center")
    return figure


def print_temperature(args: argparse.Namespace) -> None:
    found = [one for one in evaluated(args.runs) if any(samples for samples, _ in one.scores)]
    if not found:
        raise UsageError("none of these runs was evaluated with --eval_samples")
    print(calibration_table(found))
    if args.o:
        save(temperature_figure(found), args.o)


# ---- main ------------------------------------------------------------------------------------------------


def picture(text: str) -> Path:
    if not Path(text).name:
        raise argparse.ArgumentTypeError(f"{text!r} is not a file's name")
    return Path(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
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
            verb.add_argument(
                "-o", type=picture, metavar="PICTURE", help="where to draw it (.png, .pdf, .svg)"
            )
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

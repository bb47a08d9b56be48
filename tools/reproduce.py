"""The papers' grid as commands; finished runs as the papers' table and figures.

    python -m tools.reproduce commands > grid.txt                  # 15 rows × 8 tasks × 5 seeds
    python -m tools.reproduce commands --missing runs              # those without a finished run in runs/
    python -m tools.reproduce commands --tasks rte -- --bf16       # flags that every line gets
    python -m tools.reproduce table runs                           # Table I as Markdown, or with --csv
    python -m tools.reproduce ranks runs/A runs/B -o ranks.png     # Figure 1; without -o as text
    python -m tools.reproduce curves runs -o curves.png            # score and budget against the step
    python -m tools.reproduce agreement runs -o agreement.png      # of runs with --track_scores
    python -m tools.reproduce calibration runs -o reliability.png  # of runs that tools.evaluate has evaluated
    python -m tools.reproduce temperature runs -o temperature.png  # … at several --temperature: [V] figure 1

Wherever runs are asked for, a folder stands for every finished run in and under it. What cannot be used is
named on stderr and left out. A row of a table, and a line of a figure, are runs that differ in task and seed
alone. Settings that are not the task's published ones are part of its label; those that all rows of a table
share are in its caption. `--name h0=1e-4 hess_init=1e-4 beta2=0.999 lr=*` gives a group of settings a name
(* is any value).

[C] Chen and Garner, "A Bayesian Interpretation of Adaptive Low-Rank Adaptation", arXiv 2409.10673.
[V] Cong et al., "Variational Low-Rank Adaptation Using IVON", 2024.
"""

import itertools
import json
import math
import os
import shlex
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness import glue
from harness.encoder import TARGETS
from harness.files import read_tensors
from harness.metrics import rank_table
from harness.settings import IDENTITY, MODEL, NOTHING, SHAPE, TASKS, Parser, Settings, exit_status, task_of
from harness.task import UsageError
from scores import SCORES
from tools import figures
from tools.finished import FinishedRun, check_same_model, find_runs, read_evaluations, read_lines, skip

PAPER = Path(__file__).resolve().parent.parent / "results/paper_table1.csv"
SEEDS = (2021, 2022, 2023, 2024, 2025)
LARGE = ("mnli", "qqp", "qnli", "sst2")  # as [C] groups the tasks; all others are small
COLUMNS = [*LARGE, *(task for task in TASKS if task not in LARGE)]
METHODS = {"full": "full fine-tuning", "lora": "LoRA", "adalora": "AdaLoRA"}  # in the order of [C] table I
OPTIMIZERS = {"adamw": "AdamW", "ivon": "IVON"}
OWN_PLACE = {"task", "seed", "method", "optimizer", "score", "target_rank", "demo"}  # shown by themselves
BATCH = ["batch_size", "grad_accum", "processes"]
GROUP = ["model", "row", "task"]  # the same for runs that differ in the seed alone


# ---- the grid ------------------------------------------------------------------------------------------


def grid(tasks: list[str], seeds: list[int], ranks: list[float], methods: list[str]) -> Iterator[list[str]]:
    """run_glue.py's arguments for every run of [C] table I, a task after the other."""
    rows = ["--method full --optimizer adamw"] if "full" in methods else []
    for rank in ranks:
        if "lora" in methods:
            rows.append(f"--method lora --optimizer adamw --target_rank {rank:.12g}")
        if "adalora" in methods:
            pairs = ["adamw --score sensitivity"]
            pairs += [f"ivon --score {s}" for s in ("sensitivity", "snr_abs", "snr", "mu", "inv_sigma")]
            rows += [f"--method adalora --optimizer {pair} --target_rank {rank:.12g}" for pair in pairs]
    for task, row, seed in itertools.product(*map(dict.fromkeys, (tasks, rows, seeds))):
        yield f"--task {task} {row} --seed {seed}".split()


def print_commands(args: Namespace) -> None:
    own = {"--task", "--method", "--optimizer", "--score", "--target_rank", "--seed", "--output_dir"}
    if taken := own.intersection(word.split("=")[0] for word in args.flags):
        raise UsageError(f"every line has its own {min(taken)}: leave it out after --")
    finished = find_runs([args.missing], skip) if args.missing and args.missing.exists() else []
    lines = []
    for argv in grid(args.tasks, args.seeds, args.ranks, args.methods):
        settings = Settings.from_command_line([*argv, *args.flags], __doc__)
        wanted = as_json(settings.resolve(task_of(settings).train_size))
        if any(all(run.config.get(k, v) == v for k, v in wanted.items()) for run in finished):
            continue
        if args.missing:
            name = settings.output_dir.name
            names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
            free = next(n for n in names if not (args.missing / n / "results.json").exists())
            argv += ["--output_dir", str(args.missing / free), "--resume"]
        lines.append(shlex.join(["python", "run_glue.py", *argv, *args.flags]) + "\n")
    print("".join(lines), end="")


def as_json(settings: Settings) -> dict[str, Any]:
    """What decides a run's result, as its config.json has it; `targets` only if they were given."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings) if f.metadata["role"] != NOTHING}
    values |= {"model": settings.model, "device": None}
    return json.loads(json.dumps({k: v for k, v in values.items() if v is not None}, default=str))


# ---- runs into rows ------------------------------------------------------------------------------------


def departures(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's identity settings that are not the published ones for its task, method, length and batches."""
    names = ("method", "optimizer", "score", "target_rank", *BATCH[:2])
    given = {name: config[name] for name in names if config.get(name) is not None}
    place = {"demo": True} if config["demo"] else {"task": config["task"]}
    s = Settings(**place, **given, max_steps=config["total_steps"], device="cpu").completed()
    s = replace(s, processes=config.get("processes", 1))
    usual = dict(vars(s.resolve(config.get("train_size") or task_of(s).train_size)))
    if config.get("lr") != usual["lr"]:
        usual |= {"first_lr": 0.0, "first_steps": 0}  # a learning rate that is given has no first phase
    if config.get("targets") in TARGETS.values():
        usual["targets"] = config["targets"]
    own = [f.name for f in fields(Settings) if f.metadata["role"] == IDENTITY and f.name not in OWN_PLACE]
    return {k: config[k] for k in own if config.get(k) is not None and config[k] != usual[k]}


def shapes(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Length, batches and checksums of data and frozen weights: a run's, and those of most runs like it.

    Both have a line a run and a column a setting; None or NaN is what no run, or an earlier one, tells.
    """
    shape = [f for f in fields(Settings) if f.metadata["role"] == SHAPE]
    lines = [
        {f.name: run.config.get(f.name, f.default) for f in shape}
        | {name: run.config.get(name) for name in ("data", "encoder")}
        for run in runs["run"]
    ]
    own = pd.DataFrame(lines, dtype=object)
    alike = own.groupby([runs["model"], runs["task"], runs["method"]])
    return own, alike.transform(lambda values: next(iter(values.mode()), None))


def with_names(settings: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """Settings with each group that --name describes under its name."""

    def matches(value: Any, wanted: str) -> bool:
        try:
            return wanted in ("*", str(value)) or float(wanted) == value
        except ValueError:
            return False

    for label, *pairs in names:
        group = dict(pair.split("=", 1) for pair in pairs)
        if all(key in settings and matches(settings[key], value) for key, value in group.items()):
            settings = {label: None} | {k: v for k, v in settings.items() if k not in group}
    return settings


def settings_text(settings: Mapping[str, Any]) -> str:
    """Different settings have different texts."""
    return ", ".join(k if v is None else f"{k} {str(v).removesuffix('.0')}" for k, v in settings.items())


def row_label(config: Mapping[str, Any], settings: str) -> str:
    rank = config["target_rank"] is not None and f"r={config['target_rank']:g}"
    what = METHODS[config["method"]], OPTIMIZERS[config["optimizer"]], config["score"], rank
    return " ".join(part for part in [config["demo"] and "demo", *what, settings and f"({settings})"] if part)


def order(config: Mapping[str, Any], settings: str) -> tuple:
    """As in [C] table I: full fine-tuning, then rank by rank LoRA and AdaLoRA."""
    kind = list(METHODS).index(config["method"]), list(OPTIMIZERS).index(config["optimizer"])
    row = (config["target_rank"] or 0, *kind, [None, *SCORES].index(config["score"]), settings)
    return (config["model"], *row, COLUMNS.index(config["task"]), config["seed"])


def read_runs(args: Namespace, needs: Callable[[FinishedRun], Any]) -> pd.DataFrame:
    """A line a run, in the paper's order: run, model, task, method, seed, row (its label), what it `needs`
    ("found"), settings that depart from the published ones, and the usual length and batches.

    Left out by name: a run whose settings cannot be compared, whose `needs` (a function that may raise
    UsageError) is nothing, or that repeats settings and seed of another. For a table, `attrs["shared"]` has
    the settings that all runs share, and no label has them. UsageError if no run is left.
    """
    lines = []
    for run in find_runs(args.runs, skip):
        try:
            line = {"run": run, "departs": departures(run.config), "found": needs(run)}
        except (UsageError, TypeError, ZeroDivisionError) as error:
            skip(run.folder, str(error))
            continue
        if line["found"]:
            lines.append(line | {key: run.config[key] for key in ("model", "task", "method", "seed")})
    if not lines:
        raise UsageError(f"there is no run for this in {', '.join(map(str, args.runs))}")
    runs = pd.DataFrame(lines)
    shape, usual = shapes(runs)
    unusual = shape.where(shape.ne(usual)).apply(lambda own: own.dropna().to_dict(), axis=1)
    settings = [with_names(of, args.name) | own for of, own in zip(runs["departs"], unusual, strict=True)]
    shared = dict(settings[0]) if args.verb == "table" else {}
    for of in settings:
        shared = {k: v for k, v in shared.items() if k in of and of[k] == v}
    texts = [settings_text({k: v for k, v in of.items() if k not in shared}) for of in settings]
    labelled = list(zip((run.config for run in runs["run"]), texts, strict=True))
    runs = runs.assign(row=[row_label(*of) for of in labelled], order=[order(*of) for of in labelled])
    again = runs.duplicated([*GROUP, "seed"])
    for run in runs["run"][again]:
        skip(run.folder, "the same settings and seed as another run")
    runs = runs.join(usual)[~again].sort_values("order", ignore_index=True)
    runs.attrs["shared"] = shared
    return runs


def named_groups(runs: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Runs that differ in the seed alone, with a name for each group."""
    for (model, row, task), group in runs.groupby(GROUP, sort=False):
        seeds = f"{len(group)} seed{'s' * (len(group) != 1)}"
        other_model = f", {model}" * (runs["model"].nunique() > 1)
        yield f"{TASKS[task].folder}, {row}, {seeds}{other_model}", group


def read_found(args: Namespace, needs: Callable[[FinishedRun], list[dict]]) -> dict[str, pd.DataFrame]:
    """By name of a group, the lines that each of its runs `needs`, with the run's folder, task and row."""
    groups = {}
    for name, group in named_groups(read_runs(args, needs)):
        lines = [
            pd.json_normalize(run.found).assign(folder=run.run.folder, task=run.task, row=run.row)
            for run in group.itertuples()
        ]
        groups[name] = pd.concat(lines, ignore_index=True)
    return groups


# ---- the table -----------------------------------------------------------------------------------------


def paper_number(config: Mapping[str, Any], departs: Mapping[str, Any]) -> float:
    """[C] table I, in percent; NaN unless model, settings, length and batches are those behind it."""
    s = Settings(task=config["task"], method=config["method"], optimizer=config["optimizer"], device="cpu")
    usual = s.completed().resolve(task_of(s).train_size)
    lengths = ("total_steps", "max_length", "eval_every", "group_by_length")
    same = all(config.get(name) == getattr(usual, name) for name in lengths)
    alone = config["optimizer"] == "adamw" or config.get("processes", 1) == 1  # each process draws
    batch = math.prod(config.get(name, 1) for name in BATCH)
    if config["model"] != MODEL or departs or not (same and alone and batch == usual.batch_size):
        return math.nan
    paper = pd.read_csv(PAPER, dtype=str, keep_default_na=False)
    row = {key: config[key] or "" for key in ("method", "optimizer", "score")}
    row["rank"] = "" if config["target_rank"] is None else f"{config['target_rank']:g}"
    found = paper[(paper[list(row)] == pd.Series(row)).all(axis=1)]
    return float(found[config["task"]].iloc[0]) if len(found) and config["task"] in found else math.nan


def cells_of(runs: pd.DataFrame) -> pd.DataFrame:
    """A line a row and task: mean and standard deviation (n − 1) of the best scores, seeds, the paper's."""
    runs = runs.assign(
        metric=[TASKS[task].metric for task in runs["task"]],
        best=[100 * run.results["best"][run.results["metric"]] for run in runs["run"]],
        paper=[paper_number(run.config, of) for run, of in zip(runs["run"], runs["departs"], strict=True)],
    )
    best = {"mean": ("best", "mean"), "sd": ("best", "std"), "seeds": ("best", "size")}
    cells = runs.groupby(GROUP, sort=False).agg(metric=("metric", "first"), **best, paper=("paper", "first"))
    return cells.reset_index()


def mean_text(mean: float, sd: float, digits: int = 2) -> str:
    deviation = "" if math.isnan(sd) else f" ± {sd:.{digits}f}"
    return "" if math.isnan(mean) else f"{mean:.{digits}f}{deviation}"


def cell_text(cell: pd.Series) -> str:
    paper = "" if math.isnan(cell["paper"]) else f" [{cell['paper']:.2f}]"
    return f"{mean_text(cell['mean'], cell['sd'])} ({cell['seeds']}){paper}"


def marked(texts: pd.Series, values: pd.Series) -> list[str]:
    """The best in bold and the second best in italics, as far as the two decimals tell."""
    ranking = sorted(set(values.round(2).dropna()), reverse=True)
    marks = dict(zip(ranking, ("**", "*"), strict=False)) if len(ranking) > 1 else {}
    marks = [marks.get(value, "") for value in values.round(2)]
    return [f"{mark}{text}{mark}" for mark, text in zip(marks, texts, strict=True)]


def markdown(cells: pd.DataFrame) -> str:
    """The rows of one model, a column a task, and means over [C]'s large tasks, its small ones and all."""
    cells = cells.assign(text=cells.apply(cell_text, axis=1))
    tasks = [task for task in COLUMNS if task in set(cells["task"])]
    rows = list(dict.fromkeys(cells["row"]))
    table = cells.pivot(index="row", columns="task").reindex(rows)
    columns = {"": rows}
    for task in tasks:
        columns[TASKS[task].folder] = marked(table["text"][task].fillna(""), table["mean"][task])
    large, small = [t for t in tasks if t in LARGE], [t for t in tasks if t not in LARGE]
    groups = {"large avg": large, "small avg": small} if large and small else {}
    for name, group in (groups | {"all avg": tasks}).items():
        if len(group) > 1:
            average = table["mean"][group].mean(axis=1, skipna=False)
            columns[name] = marked(average.map(lambda mean: mean_text(mean, math.nan)), average)
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def length_text(usual: pd.Series) -> str:
    like = " of like length" * bool(usual["group_by_length"])
    updates = f"{usual['total_steps']} updates of {math.prod(usual[BATCH])} examples{like}"
    return f"{updates}, at most {usual['max_length']} tokens, evaluated every {usual['eval_every']}"


def caption(runs: pd.DataFrame, shared: Mapping[str, Any], paper: bool) -> Iterator[str]:
    """What the rows of one model have in common, as Markdown."""
    yield (
        f"Encoder `{runs['model'].iloc[0]}`. Best validation score in percent: mean ± standard deviation "
        f"(number of seeds){' [the paper, five seeds]' * paper}; the best in bold, the second in italics."
    )
    if shared:
        yield f"All rows: {settings_text(shared)}."
    yield ""
    runs = runs.assign(length=runs.apply(length_text, axis=1))
    for task, own in sorted(runs.groupby("task"), key=lambda item: COLUMNS.index(item[0])):
        for length, those in own.groupby("length", sort=False):
            methods = ", ".join(METHODS[method] for method in those["method"].unique())
            which = f" ({methods})" if own["length"].nunique() > 1 else ""
            yield f"- {TASKS[task].folder}{which}: {TASKS[task].metric.replace('_', ' ')}; {length}"


def print_table(args: Namespace) -> None:
    def is_real(run: FinishedRun) -> bool:
        if run.config["demo"]:
            raise UsageError("a demo run")
        return True

    runs = read_runs(args, is_real)
    cells = cells_of(runs)
    if args.csv:
        print(cells.round(4).to_csv(index=False), end="")
        return
    sections = []
    for model, own in cells.groupby("model", sort=False):
        paper = bool(own["paper"].notna().any())
        about = caption(runs[runs["model"] == model], runs.attrs["shared"], paper)
        sections += [markdown(own), "\n".join(about)]
    print("\n\n".join(sections))


# ---- figures -------------------------------------------------------------------------------------------


def print_ranks(args: Namespace) -> None:
    def ranks(run: FinishedRun) -> dict:
        if not run.results["ranks"]:
            raise UsageError("it has no adapters, so no ranks")
        return run.results["ranks"]

    runs = read_runs(args, ranks)
    check_same_model(runs["run"])
    groups = named_groups(runs)
    patterns = {name: pd.DataFrame(list(of["found"])).mean().round(2).to_dict() for name, of in groups}
    if args.o:
        figures.save(figures.ranks(patterns), args.o)
    else:
        print("\n\n".join(f"{name}\n{rank_table(pattern)}" for name, pattern in patterns.items()))


def draw_curves(args: Namespace) -> None:
    def journal(run: FinishedRun) -> list[dict]:
        task = TASKS[run.config["task"]]

        def numbers(line: dict) -> list:
            return [line["step"], line[task.metric if "split" in line else "budget"]]

        lines = read_lines(run, "metrics.jsonl", numbers)
        if not {None, task.validation[0]} <= {line.get("split") for line in lines}:
            raise UsageError("metrics.jsonl has no evaluation")
        return lines

    def over_seeds(lines: pd.DataFrame, value: str) -> pd.DataFrame:
        """Mean, min and max by step, at the steps that all seeds have."""
        values = lines.groupby("step")[value].agg(["mean", "min", "max", "count"])
        return values[values["count"] == lines["folder"].nunique()]

    curves = {}
    for name, lines in read_found(args, journal).items():
        task = TASKS[lines["task"].iloc[0]]
        scores = over_seeds(lines[lines["split"] == task.validation[0]], task.metric)
        place = lines["row"].iloc[0], task.folder, task.metric.replace("_", " ")
        curves[name] = figures.Curve(*place, scores, over_seeds(lines, "budget"))
    figures.save(figures.curves(curves), args.o or Path("curves.png"))


def print_agreement(args: Namespace) -> None:
    def agreement(run: FinishedRun) -> list[dict]:
        def numbers(line: dict) -> list:
            may_be_none = [line["sigma_cv"], *line["spearman"].values()]
            defined = [number for number in may_be_none if number is not None]
            return [line["step"], line["budget"], *line["jaccard"].values(), *defined]

        b0 = run.results["budget"]["b0"]
        return [line | {"b0": b0} for line in read_lines(run, "score_agreement.jsonl", numbers)]

    found = {}
    for name, lines in read_found(args, agreement).items():
        # Two random sets of k of n triplets share k²/n of them.
        chance = (lines["budget"] / (2 * lines["b0"] - lines["budget"])).where(lines["budget"] > 0, 1.0)
        variation = lines.dropna(subset="sigma_cv").groupby("step")["sigma_cv"].mean()
        found[name] = figures.Agreement(agreement_matrix(lines), chance.mean(), variation)
    print("\n\n".join(agreement_text(name, agreement) for name, agreement in found.items()))
    if args.o:
        figures.save(figures.agreement(found), args.o)


def agreement_matrix(lines: pd.DataFrame) -> pd.DataFrame:
    """Means over allocations and seeds, (scores, scores): Spearman above the diagonal, Jaccard below it.

    NaN on the diagonal, and where a measure is not defined.
    """
    means = lines.filter(regex=r"^(spearman|jaccard)\.").astype(float).mean()
    pairs = {name: name.partition(".")[2].split("/") for name in means.index}
    scores = list(dict.fromkeys(itertools.chain(*pairs.values())))
    matrix = pd.DataFrame(math.nan, scores, scores)
    for name, (a, b) in pairs.items():
        matrix.loc[(a, b) if name.startswith("spearman") else (b, a)] = means[name]
    return matrix


def agreement_text(name: str, agreement: figures.Agreement) -> str:
    lines = [name, agreement.matrix.to_string(float_format="{:.3f}".format, na_rep="")]
    lines.append(f"Jaccard of two scores that have nothing in common: {agreement.chance:.3f}")
    if len(agreement.sigma_cv):
        last = agreement.sigma_cv.iloc[-1]
        lines.append(f"coefficient of variation of σ at the last allocation: {last:.2g}")
    return "\n".join(lines)


# ---- prediction ----------------------------------------------------------------------------------------


def read_evaluated(
    args: Namespace, wanted: Callable[[FinishedRun, list[dict]], bool]
) -> dict[str, pd.DataFrame]:
    """By group, a line an evaluation of the task's (first) validation split, as tools.evaluate wrote it, with
    "how". Runs that have none, or an unwanted one, are left out."""

    def rows(run: FinishedRun) -> list[dict]:
        found = read_evaluations(run, TASKS[run.config["task"]].validation[0])
        return found if wanted(run, found) else []

    groups = {}
    for name, found in read_found(args, rows).items():
        frame = found.sort_values(["samples", "temperature"], kind="stable")
        kinds = zip(frame["samples"], frame["temperature"], strict=True)
        groups[name] = frame.assign(how=[f"{n} draws, τ = {tau:g}" if n else "mean" for n, tau in kinds])
    return groups


def calibration_table(found: Mapping[str, pd.DataFrame]) -> str:
    """Markdown: mean ± standard deviation over seeds, in percent but for NLL and Brier score."""
    lines = ["|  | prediction | seeds | score | accuracy | NLL | ECE | Brier |", "| --- " * 8 + "|"]
    for (task, row, how), rows in itertools.chain(
        *(frame.groupby(["task", "row", "how"], sort=False) for frame in found.values())
    ):
        cells = []
        for metric in (TASKS[task].metric, "accuracy", "nll", "ece", "brier"):
            scale, digits = (1, 4) if metric in ("nll", "brier") else (100, 2)
            values = scale * rows.get(metric, pd.Series(dtype=float))
            cells.append(mean_text(values.mean(), values.std(), digits))
        lines.append(f"| {TASKS[task].folder}, {row} | {how} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_predictions(row: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, classes) and labels (n,) that belong to an evaluation. Raises UsageError."""
    path = row.folder / "predictions.safetensors"
    tensors, metadata = read_tensors(path)
    rows = json.loads((row.folder / "evaluation.json").read_text())["evaluations"]
    key = f"tau={row.temperature:g}" if row.samples else "mean"
    p, labels = tensors.get(f"{row.split}.{key}"), tensors.get(f"{row.split}.labels")
    there = p is not None and labels is not None and labels.ndim == 1 and p.ndim == 2
    if not there or len(p) != len(labels) or metadata.get("evaluations") != json.dumps(rows):
        raise UsageError(f"{path} is not of the same evaluation as evaluation.json: tools.evaluate again")
    return p.numpy(), labels.numpy()


def print_calibration(args: Namespace) -> None:
    found = read_evaluated(args, lambda run, _: bool(TASKS[run.config["task"]].labels))
    print(calibration_table(found))
    if not args.o:
        return
    panels = {name: {} for name in found}
    for name, frame in found.items():
        shown = frame[(frame["samples"] == 0) | (frame["temperature"] == 1)]
        for how, rows in shown.groupby("how", sort=False):
            of_seeds = zip(*map(read_predictions, rows.itertuples()), strict=True)
            panels[name][how] = tuple(map(np.concatenate, of_seeds))
    figures.save(figures.reliability_diagrams(panels), args.o)


def print_temperature(args: Namespace) -> None:
    found = read_evaluated(args, lambda _, rows: any(row["samples"] for row in rows))
    print(calibration_table(found))
    if args.o:
        for frame in found.values():
            frame["error"] = 100 * (1 - frame[TASKS[frame["task"].iloc[0]].metric])
        figures.save(figures.temperature(found), args.o)


# ---- main ----------------------------------------------------------------------------------------------


def picture(text: str) -> Path:
    if not Path(text).name:
        raise ArgumentTypeError(f"{text!r} is not a file's name")
    return Path(text)


VERBS = {
    "table": (print_table, "the paper's Table I, as Markdown"),
    "ranks": (print_ranks, "the paper's Figure 1: ranks by layer and module"),
    "curves": (draw_curves, "score and budget against step"),
    "agreement": (print_agreement, "how far the scores agree"),
    "calibration": (print_calibration, "accuracy, NLL, ECE, Brier score; a reliability diagram"),
    "temperature": (print_temperature, "error and NLL against τ"),
}


def parse(argv: list[str] | None = None) -> Namespace:
    parser = Parser(__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)
    commands = verbs.add_parser("commands", help="the grid, a run_glue.py command a line")
    commands.add_argument("--tasks", nargs="+", choices=TASKS, default=list(glue.TASKS))
    commands.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    commands.add_argument("--ranks", nargs="+", type=float, default=(2, 4))
    commands.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    commands.add_argument("--missing", type=Path, metavar="RUNS", help="leave out what is finished in RUNS")
    commands.add_argument("flags", nargs="*", metavar="-- FLAG", help="flags that every command gets")
    commands.set_defaults(do=print_commands)
    naming = {"metavar": ("LABEL", "KEY=VALUE"), "help": "name a group of settings (* is any value)"}
    for name, (do, about) in VERBS.items():
        verb = verbs.add_parser(name, help=about)
        verb.add_argument("runs", nargs="+", type=Path, help="folders of runs")
        verb.add_argument("--name", nargs="+", action="append", default=[], **naming)
        if name == "table":
            verb.add_argument("--csv", action="store_true", help="a line a cell, as CSV")
        else:
            verb.add_argument("-o", type=picture, metavar="PICTURE", help="a file: .png, .pdf, .svg")
        verb.set_defaults(do=do)
    args = parser.parse_args(argv)
    for label, *pairs in getattr(args, "name", ()):
        if not pairs or any("=" not in pair for pair in pairs):
            raise UsageError(f"--name {label}: give a label, then settings as KEY=VALUE")
    if args.verb == "curves" or getattr(args, "o", None):
        figures.check_available()
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        args.do(args)
    except BrokenPipeError:  # `… commands | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(exit_status(main, "tools.reproduce"))

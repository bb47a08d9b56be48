"""The papers' grid as commands; finished runs as the papers' table and figures.

    python -m tools.reproduce commands > grid.txt                  # 15 rows × 8 tasks × 5 seeds
    python -m tools.reproduce commands --missing runs              # those without a finished run in runs/
    python -m tools.reproduce commands --tasks rte -- --bf16       # flags that every line gets
    python -m tools.reproduce study runs -- --model MODEL          # results/study.md: what is not finished
    python -m tools.reproduce table runs                           # Table I as Markdown
    python -m tools.reproduce report runs -o report.png            # the study's trials and comparisons
    python -m tools.reproduce compare runs/A runs/B runs/C         # A against B and C, seed by seed
    python -m tools.reproduce ranks runs/A runs/B -o ranks.png     # Figure 1; without -o as text
    python -m tools.reproduce curves runs -o curves.png            # score (or --of clipped), budget
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
from argparse import Namespace
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
from harness.settings import IDENTITY, OPTIMIZERS, SHAPE, TASKS, Parser, Settings, exit_status, task_of
from harness.task import UsageError
from scores import SCORES
from tools import compare, figures, study
from tools.finished import COUNT, DAMAGED, FinishedRun, find_runs, read_evaluations, read_lines, skip

SEEDS = (2021, 2022, 2023, 2024, 2025)
METHODS = {"full": "full fine-tuning", "lora": "LoRA", "adalora": "AdaLoRA"}  # in the order of [C] table I
OWN_PLACE = {"task", "seed", "method", "optimizer", "score", "target_rank", "demo"}  # shown by themselves
BATCH = ["batch_size", "grad_accum", "processes"]
# Length, batches, and checksums of data and frozen weights.
SHAPES = [f.name for f in fields(Settings) if f.metadata["role"] == SHAPE] + ["data", "encoder"]
DIAGNOSTICS = ("clipped", "mean_step", "law", "h_05", "h_50", "h_95", "sigma", "sigma_cv")
GROUP = ["model", "row", "task"]  # the same for runs that differ in the seed alone


# ---- the grid ------------------------------------------------------------------------------------------


def grid(tasks: list[str], seeds: list[int], ranks: list[float], methods: list[str]) -> Iterator[list[str]]:
    """run_glue.py's arguments for every run of [C] table I, task by task."""
    rows = ["--method full --optimizer adamw"] if "full" in methods else []
    for rank in ranks:
        if "lora" in methods:
            rows.append(f"--method lora --optimizer adamw --target_rank {rank:.12g}")
        if "adalora" in methods:
            pairs = ["adamw --score sensitivity"]
            pairs += [f"ivon --score {s}" for s in ("sensitivity", "snr_abs", "snr", "mu", "inv_sigma")]
            rows += [f"--method adalora --optimizer {pair} --target_rank {rank:.12g}" for pair in pairs]
    for task, row, seed in itertools.product(tasks, rows, seeds):
        yield f"--task {task} {row} --seed {seed}".split()


def print_commands(args: Namespace) -> None:
    own = {"--task", "--method", "--optimizer", "--score", "--target_rank", "--seed", "--output_dir"}
    if taken := own.intersection(word.split("=")[0] for word in args.flags):
        raise UsageError(f"every line has its own {min(taken)}: leave it out after --")
    lines = []
    for argv in grid(args.tasks, args.seeds, args.ranks, args.methods):
        settings = Settings.from_command_line([*argv, *args.flags], __doc__)
        if args.missing:
            folder = args.missing / settings.output_dir.name
            if (folder / "results.json").exists():
                continue
            argv += ["--output_dir", str(folder), "--resume"]
        lines.append(shlex.join(["python", "run_glue.py", *argv, *args.flags]) + "\n")
    print("".join(lines), end="")


# ---- runs into rows ------------------------------------------------------------------------------------


def departures(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's identity settings that are not the published ones for its task, method, length and batches."""
    own = [f for f in fields(Settings) if f.metadata["role"] == IDENTITY and f.name not in OWN_PLACE]
    s = replace(Settings.from_config(config), **{f.name: f.default for f in own})
    s = replace(s, max_steps=config["total_steps"], total_steps=None).with_ranks()
    usual = dict(vars(s.resolve(config.get("train_size") or task_of(s).train_size)))
    if config.get("lr") != usual["lr"]:
        usual |= {"first_lr": 0.0, "first_steps": 0}  # a learning rate that is given has no first phase
    if config.get("targets") in TARGETS.values():
        usual["targets"] = config["targets"]
    differ = [f.name for f in own if config.get(f.name) is not None and config[f.name] != usual[f.name]]
    return {name: config[name] for name in differ}


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
    """Settings as the text of a table's cell; different settings have different texts."""
    text = ", ".join(k if v is None else f"{k} {str(v).removesuffix('.0')}" for k, v in settings.items())
    return " ".join(text.replace("|", "\\|").split())


def row_label(config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    rank = config["target_rank"] is not None and f"r={config['target_rank']:g}"
    optimizer = {"adamw": "AdamW"}.get(config["optimizer"], config["optimizer"].upper())
    what = METHODS[config["method"]], optimizer, config["score"], rank
    own = settings and f"({settings_text(settings)})"
    return " ".join(part for part in [config["demo"] and "demo", *what, own] if part)


def order(config: Mapping[str, Any], row: str) -> tuple:
    """As in [C] table I: full fine-tuning, then rank by rank LoRA and AdaLoRA."""
    kind = list(METHODS).index(config["method"]), list(OPTIMIZERS).index(config["optimizer"])
    place = (config["target_rank"] or 0, *kind, [None, *SCORES].index(config["score"]), row)
    return (config["model"], *place, task_order(config["task"]), config["seed"])


def task_order(name: str) -> tuple:
    """GLUE's tasks as in [C] table I, then the user's own."""
    return (list(TASKS).index(name) if name in TASKS else len(TASKS), name)


def read_runs(args: Namespace, needs: Callable[[FinishedRun], Any]) -> pd.DataFrame:
    """One line per run, in the paper's order: run, model, task with its title and measure, method, seed, row
    (its label), SHAPES, settings that depart from the published ones, and `needs(run)` ("found").

    A setting of SHAPES that differs between runs of one model, task and method is in their labels. Runs that
    `needs` cannot read, or that repeat another's settings and seed, are skipped by name. For a table,
    `attrs["shared"]` has the settings that all runs share, and no label has them.
    """
    lines = []
    for run in find_runs(args.runs):
        try:
            line = {"run": run, "settings": departures(run.config), "found": needs(run)}
        except DAMAGED as error:
            skip(run.folder, error)
            continue
        line |= {key: run.config[key] for key in ("model", "task", "method", "seed")}
        line |= {"title": run.task.folder, "measure": run.task.metric}
        lines.append(line | {name: run.config.get(name) for name in SHAPES})
    if not lines:
        raise UsageError(f"there is no run for this in {', '.join(map(str, args.runs))}")
    runs = pd.DataFrame(lines)
    varying = runs.groupby(["model", "task", "method"])[SHAPES].transform("nunique") > 1
    shapes = runs[SHAPES].astype(object).where(varying)
    labels = [
        with_names(of, args.name) | own.dropna().to_dict()
        for of, (_, own) in zip(runs["settings"], shapes.iterrows(), strict=True)
    ]
    shared = dict(labels[0]) if args.verb == "table" else {}
    for of in labels:
        shared = {k: v for k, v in shared.items() if k in of and of[k] == v}
    labels = [{k: v for k, v in of.items() if k not in shared} for of in labels]
    runs["row"] = [row_label(run.config, of) for run, of in zip(runs["run"], labels, strict=True)]
    runs["order"] = [order(run.config, row) for run, row in zip(runs["run"], runs["row"], strict=True)]
    again = runs.duplicated([*GROUP, "seed"])
    for run in runs["run"][again]:
        skip(run.folder, "the same settings and seed as another run")
    runs = runs[~again].sort_values("order", ignore_index=True)
    runs.attrs["shared"] = shared
    return runs


def named_groups(runs: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Runs that differ in the seed alone, with a name for each group."""
    for (model, row, _), group in runs.groupby(GROUP, sort=False):
        seeds = f"{len(group)} seed{'s' * (len(group) != 1)}"
        other_model = f", {model}" * (runs["model"].nunique() > 1)
        yield f"{group['title'].iloc[0]}, {row}, {seeds}{other_model}", group


def read_found(args: Namespace, needs: Callable[[FinishedRun], pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """By name of a group, the lines that `needs` returns of each run, with the run's folder, row and task."""

    def lines(run: Any) -> pd.DataFrame:
        return run.found.assign(folder=run.run.folder, row=run.row, title=run.title, measure=run.measure)

    groups = named_groups(read_runs(args, needs))
    return {name: pd.concat(map(lines, of.itertuples()), ignore_index=True) for name, of in groups}


# ---- the table -----------------------------------------------------------------------------------------


def mean_text(values: pd.Series, digits: int = 2) -> str:
    """Mean ± standard deviation (n − 1)."""
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return "" if values.isna().all() else f"{values.mean():.{digits}f}{deviation}"


def markdown(runs: pd.DataFrame) -> str:
    """The rows of one model, a column a task; the mean over tasks where a row has them all."""
    titles = dict(zip(runs["task"], runs["title"], strict=True))
    tasks = sorted(titles, key=task_order)
    lines = [["", *(titles[task] for task in tasks), *["average"] * (len(tasks) > 1)]]
    lines.append(["---"] * len(lines[0]))
    for row, own in runs.groupby("row", sort=False):
        cells = {task: f"{mean_text(of['found'])} ({len(of)})" for task, of in own.groupby("task")}
        average = own.groupby("task")["found"].mean().mean() if len(cells) == len(tasks) else math.nan
        averages = ["" if math.isnan(average) else f"{average:.2f}"] * (len(tasks) > 1)
        lines.append([row, *(cells.get(task, "") for task in tasks), *averages])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def length_text(run: pd.Series) -> str:
    like = " of similar length" * bool(run["group_by_length"])
    updates = f"{run['total_steps']} updates of {math.prod(run[BATCH])} examples{like}"
    judged = f" on {run['holdout']:g} of train" * bool(run["holdout"])
    return f"{updates}, at most {run['max_length']} tokens, evaluated every {run['eval_every']}{judged}"


def print_table(args: Namespace) -> None:
    def best(run: FinishedRun) -> float:
        if run.config["demo"]:
            raise UsageError("a demo run")
        return 100 * run.results["best"][run.results["metric"]]

    runs = read_runs(args, best)
    shared = runs.attrs["shared"]
    for model, own in runs.groupby("model", sort=False):
        print(f"{markdown(own)}\n\nModel `{model}`. Best validation score in percent: mean ± standard")
        print("deviation (seeds).")
        print(f"All rows: {settings_text(shared)}." if shared else "")
        for _, of in own.groupby("task"):
            lengths = " or ".join(of.apply(length_text, axis=1).unique())
            print(f"- {of['title'].iloc[0]}: {of['measure'].iloc[0].replace('_', ' ')}; {lengths}")


# ---- figures -------------------------------------------------------------------------------------------


def print_ranks(args: Namespace) -> None:
    def ranks(run: FinishedRun) -> dict:
        if not run.results["ranks"]:
            raise UsageError("it has no adapters, so no ranks")
        return run.results["ranks"]

    runs = read_runs(args, ranks)
    if len(set(map(frozenset, runs["found"]))) > 1:
        raise UsageError("these runs have different adapters: give one model's at a time")
    means = {name: pd.DataFrame(list(of["found"])).mean() for name, of in named_groups(runs)}
    patterns = {name: mean.round(2).to_dict() for name, mean in means.items()}
    if args.o:
        figures.save(figures.ranks(patterns), args.o)
    else:
        print("\n\n".join(f"{name}\n{rank_table(pattern)}" for name, pattern in patterns.items()))


def plot_curves(args: Namespace) -> None:
    def journal(run: FinishedRun) -> pd.DataFrame:
        lines = read_lines(run, "metrics.jsonl")
        lines = lines[lines["split"].isna() | (lines["split"] == run.task.validation[0])]
        column = f"optimizer.{args.of}" if args.of else run.task.metric
        lines = lines.assign(score=lines[column].astype(float))[["step", "score", "budget"]]
        if lines["score"].isna().all() or lines["budget"].astype(float).isna().all():
            raise UsageError("metrics.jsonl has no evaluation, or nothing else")
        return lines

    found = read_found(args, journal)
    named = {name: lines.assign(measure=args.of or lines["measure"]) for name, lines in found.items()}
    figures.save(figures.curves(named), args.o or Path("curves.png"))


def print_agreement(args: Namespace) -> None:
    def agreement(run: FinishedRun) -> pd.DataFrame:
        lines = read_lines(run, "score_agreement.jsonl").assign(b0=run.results["budget"]["b0"])
        counts = lines[["step", "budget", "b0"]].astype(float)
        measures = lines.filter(regex=r"^(spearman|jaccard)\.\w+/\w+$").astype(float)
        if measures.empty or not ((counts >= 0) & (counts <= COUNT.most)).all(axis=None):
            raise UsageError("score_agreement.jsonl has no pairs of scores, or is damaged")
        return counts.astype(int).join(lines["sigma_cv"].astype(float)).join(measures)

    found = {}
    for name, lines in read_found(args, agreement).items():
        last = lines[lines["step"] == lines["step"].max()]
        k, n = last["budget"].iloc[0], last["b0"].iloc[0]
        chance = k / (2 * n - k) if k else 1.0  # two random sets of k of n triplets share k²/n of them
        history = lines.groupby("step").mean(numeric_only=True)
        found[name] = figures.Agreement(agreement_matrix(last), chance, history)
    print("\n\n".join(agreement_text(name, agreement) for name, agreement in found.items()))
    if args.o:
        figures.save(figures.agreement(found), args.o)


def agreement_matrix(lines: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, (scores, scores): Spearman above the diagonal, Jaccard below it.

    NaN on the diagonal, and where a measure is not defined.
    """
    means = lines.filter(regex=r"^(spearman|jaccard)\.").mean()
    pairs = {name: name.partition(".")[2].split("/") for name in means.index}
    scores = list(dict.fromkeys(itertools.chain(*pairs.values())))
    matrix = pd.DataFrame(math.nan, scores, scores)
    for name, (a, b) in pairs.items():
        matrix.loc[(a, b) if name.startswith("spearman") else (b, a)] = means[name]
    return matrix


def agreement_text(name: str, agreement: figures.Agreement) -> str:
    first, last = agreement.history.index[[0, -1]]
    lines = [f"{name}: at the last allocation, step {last}"]
    lines.append(agreement.matrix.to_string(float_format="{:.3f}".format, na_rep=""))
    lines.append(f"Jaccard of two unrelated scores (chance): {agreement.chance:.3f}")
    for column, label in agreement.pairs().items():
        begin, end = agreement.history[column].iloc[[0, -1]]
        lines.append(f"Spearman of {label}, from step {first} to {last}: {begin:.3f}, {end:.3f}")
    if agreement.history["sigma_cv"].notna().any():
        cv = agreement.history["sigma_cv"].iloc[-1]
        lines.append(f"coefficient of variation of σ at the last allocation: {cv:.2g}")
    return "\n".join(lines)


# ---- prediction ----------------------------------------------------------------------------------------


def read_evaluated(args: Namespace) -> dict[str, pd.DataFrame]:
    """By group, one line per evaluation of the first validation split by tools.evaluate, with "how"."""

    def rows(run: FinishedRun) -> pd.DataFrame:
        found = read_evaluations(run)
        how = found["how"]
        draws = found["samples"].astype(str) + " draws, " + how.str.replace("tau=", "τ = ")
        how = draws.where(how.str.startswith("tau="), how)
        return found.assign(key=found["how"], how=how, error=100 * (1 - found[run.task.metric]))

    groups = read_found(args, rows).items()
    return {name: found.sort_values(["samples", "temperature"], kind="stable") for name, found in groups}


def print_calibration_table(found: Mapping[str, pd.DataFrame]) -> None:
    """Markdown: mean ± standard deviation over seeds, in percent but for NLL and Brier score."""
    print("|  | prediction | seeds | score | accuracy | NLL | ECE | Brier |\n" + "| --- " * 8 + "|")
    absent = pd.Series(dtype=float)
    for frame in found.values():
        for (title, row, measure, how), rows in frame.groupby(["title", "row", "measure", "how"], sort=False):
            measures = [(measure, 100, 2), ("accuracy", 100, 2)]
            measures += [("nll", 1, 4), ("ece", 100, 2), ("brier", 1, 4)]
            cells = [mean_text(scale * rows.get(name, absent), n) for name, scale, n in measures]
            print(f"| {title}, {row} | {how} | {len(rows)} | {' | '.join(cells)} |")


def read_predictions(row: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, classes) and labels (n,) that belong to an evaluation. Raises UsageError."""
    path = row.folder / "predictions.safetensors"
    tensors, metadata = read_tensors(path)
    rows = json.loads((row.folder / "evaluation.json").read_text())["evaluations"]
    p, labels = tensors.get(f"{row.split}.{row.key}"), tensors.get(f"{row.split}.labels")
    if p is None or labels is None or metadata.get("evaluations") != json.dumps(rows):
        raise UsageError(f"{path} does not match evaluation.json: run tools.evaluate again")
    return p.numpy(), labels.numpy()


def print_calibration(args: Namespace) -> None:
    found = read_evaluated(args)
    print_calibration_table(found)
    if not args.o:
        return
    panels = {name: {} for name, frame in found.items() if "nll" in frame}  # regression has no probabilities
    if not panels:
        raise UsageError("there is nothing to plot: a regression predicts no probabilities")
    for name in panels:
        frame = found[name]
        shown = frame[frame["key"].isin(["mean", "tau=1", "temperature scaling"])]
        for how, rows in shown.groupby("how", sort=False):
            of_seeds = zip(*map(read_predictions, rows.itertuples()), strict=True)
            panels[name][how] = tuple(map(np.concatenate, of_seeds))
    figures.save(figures.reliability_diagrams(panels), args.o)


def print_temperature(args: Namespace) -> None:
    found = read_evaluated(args)
    print_calibration_table(found)
    if args.o:
        draws = {name: frame[frame["key"].str.startswith("tau=")] for name, frame in found.items()}
        drawn = {name: frame for name, frame in draws.items() if len(frame)}
        if not drawn:
            raise UsageError("there is nothing to plot: run tools.evaluate with --eval_samples")
        figures.save(figures.temperature(drawn), args.o)


# ---- comparisons ----------------------------------------------------------------------------------------


def print_differences(args: Namespace) -> None:
    if args.verb == "report":
        table = study.print_report(args.out)
    else:
        table = compare.print_compare(args.rows, args.split)
    if args.o and table.empty:
        raise UsageError("there is nothing to plot: no comparison is finished")
    if args.o:
        figures.save(figures.differences(table), args.o)


# ---- main ----------------------------------------------------------------------------------------------


VERBS = {
    "table": (print_table, "the paper's Table I, as Markdown"),
    "ranks": (print_ranks, "the paper's Figure 1: ranks by layer and module"),
    "curves": (plot_curves, "score and budget against step"),
    "agreement": (print_agreement, "how far the scores agree"),
    "calibration": (print_calibration, "accuracy, NLL, ECE, Brier score; a reliability diagram"),
    "temperature": (print_temperature, "error and NLL against τ"),
}


PICTURE = {"type": Path, "metavar": "PICTURE", "help": "a file: .png, .pdf, .svg"}


def parse(argv: list[str] | None = None) -> Namespace:
    parser = Parser(__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)
    commands = verbs.add_parser("commands", help="the grid, one run_glue.py command per line")
    commands.add_argument("--tasks", nargs="+", choices=glue.TASKS, default=list(glue.TASKS))
    commands.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    commands.add_argument("--ranks", nargs="+", type=float, default=(2, 4))
    commands.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    commands.add_argument("--missing", type=Path, metavar="RUNS", help="leave out what is finished in RUNS")
    commands.add_argument("flags", nargs="*", metavar="-- FLAG", help="flags that every command gets")
    commands.set_defaults(do=print_commands)
    lines = verbs.add_parser("study", help="the study's commands that are still to run")
    lines.add_argument("out", type=Path, help="where its runs are, or will be")
    lines.add_argument("flags", nargs="*", metavar="-- FLAG", help="flags that every command gets")
    lines.set_defaults(do=lambda args: study.print_commands(args.out, args.flags))
    report = verbs.add_parser("report", help="the study's trials and comparisons, from what is finished")
    report.add_argument("out", type=Path, help="where its runs are")
    comparison = verbs.add_parser("compare", help=compare.__doc__.split("\n")[0])
    comparison.add_argument("rows", nargs="+", metavar="ROW", help="the first against the others")
    comparison.add_argument("--split", default="validation", help="as tools.evaluate had it (validation)")
    for verb in (report, comparison):
        verb.add_argument("-o", **PICTURE)
        verb.set_defaults(do=print_differences)
    naming = {"metavar": ("LABEL", "KEY=VALUE"), "help": "name a group of settings (* is any value)"}
    for name, (do, about) in VERBS.items():
        verb = verbs.add_parser(name, help=about)
        verb.add_argument("runs", nargs="+", type=Path, help="folders of runs")
        verb.add_argument("--name", nargs="+", action="append", default=[], **naming)
        if name != "table":
            verb.add_argument("-o", **PICTURE)
        if name == "curves":
            verb.add_argument("--of", choices=DIAGNOSTICS, help="a diagnostic of IVON instead of the score")
        verb.set_defaults(do=do)
    args = parser.parse_args(argv)
    for label, *pairs in getattr(args, "name", ()):
        if not pairs or not all("=" in pair for pair in pairs):
            raise UsageError(f"--name {label}: give a label, then settings as KEY=VALUE")
    if figures.plt is None and (args.verb == "curves" or getattr(args, "o", None)):
        raise UsageError("pictures need matplotlib: pip install matplotlib")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        args.do(args)
    except BrokenPipeError:  # `… commands | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(exit_status(main, "tools.reproduce"))

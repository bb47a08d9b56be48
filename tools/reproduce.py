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
from harness.settings import (
    IDENTITY,
    METHODS,
    MODEL,
    NOTHING,
    SHAPE,
    TASKS,
    Parser,
    Settings,
    exit_status,
    number,
    task_of,
    whole,
)
from harness.task import UsageError
from scores import SCORES
from tools import figures
from tools.finished import FinishedRun, evaluations, find_runs, read_lines, same_model, skip

PAPER = Path(__file__).resolve().parent.parent / "results/paper_table1.csv"
SEEDS = (2021, 2022, 2023, 2024, 2025)
LARGE = ("mnli", "qqp", "qnli", "sst2")  # as [C] groups the tasks; all others are small
COLUMNS = [*LARGE, *(task for task in TASKS if task not in LARGE)]
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "adalora": "AdaLoRA", "ivon": "IVON", "adamw": "AdamW"}
OWN_PLACE = {"task", "seed", "method", "optimizer", "score", "target_rank", "demo"}  # shown by themselves
BATCH = ("batch_size", "grad_accum", "processes")


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


def published(config: Mapping[str, Any]) -> Settings:
    """The published settings for a run's task, method, length and batches."""
    names = ("method", "optimizer", "score", "target_rank", *BATCH)
    given = {name: config[name] for name in names if config.get(name) is not None}
    place = {"demo": True} if config["demo"] else {"task": config["task"]}
    s = Settings(**place, **given, max_steps=config["total_steps"], device="cpu").completed()
    size = config.get("train_size") or task_of(s).train_size
    return replace(s, processes=config.get("processes", 1)).resolve(size)


def departures(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's identity settings that are not the published ones."""
    usual = dict(vars(published(config)))
    if config.get("lr") != usual["lr"]:
        usual |= {"first_lr": 0.0, "first_steps": 0}  # a learning rate that is given has no first phase
    if config.get("targets") in TARGETS.values():
        usual["targets"] = config["targets"]
    own = [f.name for f in fields(Settings) if f.metadata["role"] == IDENTITY and f.name not in OWN_PLACE]
    return {k: config[k] for k in own if config.get(k) is not None and config[k] != usual[k]}


def shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """Length and batches of a run, and checksums of its data and frozen weights where they are known."""
    names = [f.name for f in fields(Settings) if f.metadata["role"] == SHAPE]
    checksums = ("data",) if config["method"] == "full" else ("data", "encoder")
    found = {name: config.get(name) for name in names} | {"processes": config.get("processes", 1)}
    return found | {name: config[name] for name in checksums if config.get(name)}


def is_the_papers(config: Mapping[str, Any], departs: Mapping[str, Any]) -> bool:
    """Whether model, settings, length and batches are those behind the paper's number."""
    s = Settings(task=config["task"], method=config["method"], optimizer=config["optimizer"], device="cpu")
    usual = s.completed().resolve(task_of(s).train_size)
    lengths = ("total_steps", "max_length", "eval_every", "group_by_length")
    same = all(config.get(name) == getattr(usual, name) for name in lengths)
    alone = config["optimizer"] == "adamw" or config.get("processes", 1) == 1  # each process draws
    batch = math.prod(config.get(name, 1) for name in BATCH)
    return config.get("model") == MODEL and not departs and same and alone and batch == usual.batch_size


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
    parts = [config["demo"] and "demo", NAMES[config["method"]], NAMES[config["optimizer"]], config["score"]]
    return " ".join(part for part in [*parts, rank, settings and f"({settings})"] if part)


def order(config: Mapping[str, Any]) -> tuple:
    """As in [C] table I: full fine-tuning, then rank by rank LoRA and AdaLoRA."""
    position = [None, *SCORES].index(config["score"]) if config["score"] in SCORES else -1
    kind = ["full", "lora", "adalora"].index(config["method"]), ["adamw", "ivon"].index(config["optimizer"])
    return (str(config.get("model")), config["target_rank"] or 0, *kind, position)


def read_runs(args: Namespace, needs: Callable[[FinishedRun], Any] = lambda run: True) -> pd.DataFrame:
    """A line a run, in the paper's order: run, model, task, seed, row (its label), what it `needs`, shape.

    Left out by name: a run whose settings cannot be compared, whose `needs` (a function that may raise
    UsageError) is nothing, or that repeats settings and seed of another. For a table, `attrs["shared"]` has
    the settings that all runs share, and no label has them. UsageError if no run is left.
    """
    lines = []
    for run in find_runs(args.runs, skip):
        c = run.config
        try:
            departs, found = departures(c), needs(run)
        except (UsageError, TypeError, ZeroDivisionError) as error:
            skip(run.folder, str(error))
            continue
        if found:
            line = {"run": run, "model": str(c.get("model")), "task": c["task"], "seed": c["seed"]}
            line |= {"found": found, "departs": departs, "settings": with_names(departs, args.name)}
            lines.append(line | {"method": c["method"], "shape": json.dumps(shape(c))})
    if not lines:
        raise UsageError(f"there is no run for this in {', '.join(map(str, args.runs))}")
    runs = pd.DataFrame(lines)
    usual = runs.groupby(["model", "task", "method"])["shape"].transform(lambda s: s.mode()[0])
    for settings, own, most in zip(runs["settings"], map(json.loads, runs["shape"]), usual, strict=True):
        settings |= {k: v for k, v in own.items() if json.loads(most).get(k, v) != v}
    every = [{(k, str(v)) for k, v in settings.items()} for settings in runs["settings"]]
    shared = {key for key, _ in set.intersection(*every)} if args.verb == "table" else set()
    runs.attrs["shared"] = {k: v for k, v in runs["settings"][0].items() if k in shared}
    texts = [settings_text({k: v for k, v in s.items() if k not in shared}) for s in runs["settings"]]
    runs["row"] = [row_label(run.config, text) for run, text in zip(runs["run"], texts, strict=True)]
    runs["order"] = [
        (*order(run.config), text, COLUMNS.index(run.config["task"]), run.config["seed"])
        for run, text in zip(runs["run"], texts, strict=True)
    ]
    again = runs.duplicated(["model", "row", "task", "seed"])
    for run in runs["run"][again]:
        skip(run.folder, "the same settings and seed as another run")
    return runs[~again].sort_values("order").reset_index(drop=True)


def groups_of(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Runs that differ in the seed alone, by a name for each group."""
    groups = {}
    for (model, row, task), group in runs.groupby(["model", "row", "task"], sort=False):
        seeds = f"{len(group)} seed{'s' * (len(group) != 1)}"
        other_model = f", {model}" * (runs["model"].nunique() > 1)
        groups[f"{TASKS[task].folder}, {row}, {seeds}{other_model}"] = group
    return groups


# ---- the table -----------------------------------------------------------------------------------------


def paper_number(config: Mapping[str, Any]) -> float | None:
    """[C] table I, in percent."""
    paper = pd.read_csv(PAPER, keep_default_na=False)
    same = (paper["method"] == config["method"]) & (paper["optimizer"] == config["optimizer"])
    rank = "" if config["target_rank"] is None else f"{config['target_rank']:g}"
    same &= (paper["score"] == (config["score"] or "")) & (paper["rank"] == rank)
    found = paper[same]
    return float(found[config["task"]].iloc[0]) if len(found) and config["task"] in found else None


def cells_of(runs: pd.DataFrame) -> pd.DataFrame:
    """A line a row and task: mean and standard deviation (n − 1) of the best scores, seeds, the paper's."""
    lines = []
    for (model, row, task), group in runs.groupby(["model", "row", "task"], sort=False):
        first = group["run"].iloc[0]
        scores = pd.Series([100 * r.results["best"][r.results["metric"]] for r in group["run"]])
        papers = paper_number(first.config) if is_the_papers(first.config, group["departs"].iloc[0]) else None
        line = {"model": model, "row": row, "task": task, "metric": TASKS[task].metric}
        numbers = {"mean": scores.mean(), "sd": scores.std(), "seeds": len(scores), "paper": papers}
        lines.append(line | numbers)
    return pd.DataFrame(lines)


def cell_text(cell: pd.Series) -> str:
    deviation = "" if math.isnan(cell["sd"]) else f" ± {cell['sd']:.2f}"
    paper = "" if pd.isna(cell["paper"]) else f" [{cell['paper']:.2f}]"
    return f"{cell['mean']:.2f}{deviation} ({cell['seeds']}){paper}"


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
    means = cells.pivot(index="row", columns="task", values="mean").reindex(index=rows, columns=tasks)
    texts = cells.pivot(index="row", columns="task", values="text").reindex(index=rows, columns=tasks)
    columns = {"": rows}
    for task in tasks:
        columns[TASKS[task].folder] = marked(texts[task].fillna(""), means[task])
    large, small = [t for t in tasks if t in LARGE], [t for t in tasks if t not in LARGE]
    groups = {"large avg": large, "small avg": small} if large and small else {}
    for name, group in (groups | {"all avg": tasks}).items():
        if len(group) > 1:
            average = means[group].mean(axis=1, skipna=False)
            columns[name] = marked(average.map("{:.2f}".format).where(average.notna(), ""), average)
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def caption(runs: pd.DataFrame, shared: Mapping[str, Any], paper: bool) -> Iterator[str]:
    """What the rows of one model have in common, as Markdown."""
    yield (
        f"Encoder `{runs['model'].iloc[0]}`. Best validation score in percent: mean ± standard deviation "
        f"(number of seeds){' [the paper, five seeds]' * paper}; the best in bold, the second in italics."
    )
    if shared:
        yield f"All rows: {settings_text(shared)}."
    yield ""
    shapes = runs.groupby(["task", "method"], sort=False)["shape"].agg(lambda s: s.mode()[0]).reset_index()
    lengths = [
        {k: v for k, v in json.loads(s).items() if k not in ("data", "encoder")} for s in shapes["shape"]
    ]
    shapes["shape"] = [json.dumps(length) for length in lengths]
    for (task, most), those in shapes.groupby(["task", "shape"], sort=False):
        c = json.loads(most)
        several = shapes[shapes["task"] == task]["shape"].nunique() > 1
        which = f" ({', '.join(NAMES[method] for method in those['method'])})" if several else ""
        yield (
            f"- {TASKS[task].folder}{which}: {TASKS[task].metric.replace('_', ' ')}; {c['total_steps']} "
            f"updates of {math.prod(c[name] or 1 for name in BATCH)} examples"
            f"{' of like length' * bool(c['group_by_length'])}, at most {c['max_length']} tokens, evaluated "
            f"every {c['eval_every']}"
        )


def print_table(args: Namespace) -> None:
    def real(run: FinishedRun) -> bool:
        if run.config["demo"]:
            raise UsageError("a demo run")
        return True

    runs = read_runs(args, real)
    cells = cells_of(runs)
    if args.csv:
        print(cells.round(4).to_csv(index=False), end="")
        return
    sections = []
    for model, own in cells.groupby("model", sort=False):
        paper = bool(own["paper"].notna().any())
        about = caption(runs[runs["model"] == model], runs.attrs["shared"], paper)
        sections.append("\n\n".join([markdown(own), "\n".join(about)]))
    print("\n\n".join(sections))


# ---- figures -------------------------------------------------------------------------------------------


def print_ranks(args: Namespace) -> None:
    def ranks(run: FinishedRun) -> dict:
        if not run.results["ranks"]:
            raise UsageError("it has no adapters, so no ranks")
        return run.results["ranks"]

    runs = read_runs(args, ranks)
    same_model(runs["run"])
    modules = list(runs["found"][0])
    patterns = {
        name: pd.DataFrame(list(group["found"])).mean()[modules].to_dict()
        for name, group in groups_of(runs).items()
    }
    if args.o:
        figures.save(figures.ranks(patterns), args.o)
        return
    rounded = {name: {m: round(r, 2) for m, r in ranks.items()} for name, ranks in patterns.items()}
    print("\n\n".join(f"{name}\n{rank_table(ranks)}" for name, ranks in rounded.items()))


def draw_curves(args: Namespace) -> None:
    def journal(run: FinishedRun) -> list[dict]:
        task = TASKS[run.config["task"]]
        lines = read_lines(
            run, "metrics.jsonl", lambda e: [e["step"], float(e[task.metric if "split" in e else "budget"])]
        )
        if not any(line.get("split") == task.validation[0] for line in lines):
            raise UsageError("metrics.jsonl has no evaluation")
        return lines

    lines = []
    for name, group in groups_of(read_runs(args, journal)).items():
        task = TASKS[group["task"].iloc[0]]
        split = task.validation[0]
        scores = [{e["step"]: e[task.metric] for e in of if e.get("split") == split} for of in group["found"]]
        budgets = [{e["step"]: e["budget"] for e in of if "budget" in e} for of in group["found"]]
        panel = task.folder, task.metric.replace("_", " ")
        lines.append(figures.Curve(name, group["row"].iloc[0], *panel, *map(pd.DataFrame, (scores, budgets))))
    figures.save(figures.curves(lines), args.o or Path("curves.png"))


def print_agreement(args: Namespace) -> None:
    def agreement(run: FinishedRun) -> list[dict]:
        return read_lines(
            run,
            "score_agreement.jsonl",
            lambda e: [
                e["step"],
                e["budget"],
                e["sigma_cv"],
                *e["spearman"].values(),
                *e["jaccard"].values(),
            ],
        )

    found = {}
    for name, group in groups_of(read_runs(args, agreement)).items():
        lines = pd.json_normalize([line for of_run in group["found"] for line in of_run])
        b0 = group["run"].map(lambda run: run.results["budget"]["b0"]).mean()
        # Two random sets of k of n triplets share k²/n of them.
        chance = (lines["budget"] / (2 * b0 - lines["budget"])).where(lines["budget"] > 0, 1.0).mean()
        variation = lines.dropna(subset=["sigma_cv"]).groupby("step")["sigma_cv"].mean().to_dict()
        matrices = [matrix_of(lines, measure) for measure in ("spearman", "jaccard")]
        found[name] = figures.Agreement(*matrices, chance, variation)
    print("\n\n".join(agreement_text(name, agreement) for name, agreement in found.items()))
    if args.o:
        figures.save(figures.agreement(found), args.o)


def matrix_of(lines: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Means over allocations and seeds, (scores, scores); NaN where the measure is not defined."""
    means = lines.filter(regex=f"^{measure}\\.").astype(float).mean()
    pairs = [name.removeprefix(f"{measure}.").split("/") for name in means.index]
    scores = list(dict.fromkeys(itertools.chain(*pairs)))
    matrix = pd.DataFrame(np.eye(len(scores)), scores, scores)
    for (a, b), value in zip(pairs, means, strict=True):
        matrix.loc[a, b] = matrix.loc[b, a] = value
    return matrix


def agreement_text(name: str, agreement: figures.Agreement) -> str:
    """Spearman above the diagonal, Jaccard below it."""
    both = agreement.both()
    lines = [name, both.to_string(float_format="{:.3f}".format, na_rep="")]
    lines.append(f"Jaccard of two scores that have nothing in common: {agreement.chance:.3f}")
    if agreement.sigma_cv:
        last = max(agreement.sigma_cv)
        lines.append(f"coefficient of variation of σ at the last allocation: {agreement.sigma_cv[last]:.2g}")
    return "\n".join(lines)


# ---- prediction ----------------------------------------------------------------------------------------


def evaluated(args: Namespace, wanted: Callable[[FinishedRun, list[dict]], bool]) -> dict[str, pd.DataFrame]:
    """By group, a line an evaluation of the task's (first) validation split, as tools.evaluate wrote it, with
    "run" and "how". Runs that have none, or an unwanted one, are left out."""

    def rows(run: FinishedRun) -> list[dict]:
        found = evaluations(run, TASKS[run.config["task"]].validation[0])
        return found if wanted(run, found) else []

    groups = {}
    for name, group in groups_of(read_runs(args, rows)).items():
        lines = [
            {"run": run, **row} for run, of in zip(group["run"], group["found"], strict=True) for row in of
        ]
        frame = pd.DataFrame(lines).sort_values(["samples", "temperature"], kind="stable")
        frame["how"] = [
            f"{n} draws, τ = {tau:g}" if n else "mean"
            for n, tau in zip(frame["samples"], frame["temperature"], strict=True)
        ]
        frame.attrs |= {"task": group["task"].iloc[0], "row": group["row"].iloc[0]}
        groups[name] = frame
    return groups


def calibration_table(found: Mapping[str, pd.DataFrame]) -> str:
    """Markdown: mean ± standard deviation over seeds, in percent but for NLL and Brier score."""
    lines = ["|  | prediction | seeds | score | accuracy | NLL | ECE | Brier |", "| --- " * 8 + "|"]
    for frame in found.values():
        task = TASKS[frame.attrs["task"]]
        shown = [(task.metric, 100, 2), ("accuracy", 100, 2), ("nll", 1, 4), ("ece", 100, 2), ("brier", 1, 4)]
        for how, rows in frame.groupby("how", sort=False):
            cells = []
            for metric, scale, digits in shown:
                values = scale * rows[metric] if metric in rows else pd.Series(dtype=float)
                deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.{digits}f}{deviation}" if len(values) else "")
            name = f"{task.folder}, {frame.attrs['row']}"
            lines.append(f"| {name} | {how} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_predictions(row: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, classes) and labels (n,) that belong to an evaluation. Raises UsageError."""
    folder, split = row["run"].folder, row["split"]
    tensors, metadata = read_tensors(folder / "predictions.safetensors")
    rows = json.loads((folder / "evaluation.json").read_text())["evaluations"]
    key = f"tau={row['temperature']:g}" if row["samples"] else "mean"
    p, labels = tensors.get(f"{split}.{key}"), tensors.get(f"{split}.labels")
    there = p is not None and labels is not None and labels.ndim == 1 and p.ndim == 2
    if not there or len(p) != len(labels) or metadata.get("evaluations") != json.dumps(rows):
        mend = "is not of the same evaluation as evaluation.json: tools.evaluate again"
        raise UsageError(f"{folder / 'predictions.safetensors'} {mend}")
    return p.numpy(), labels.numpy()


def print_calibration(args: Namespace) -> None:
    found = evaluated(args, lambda run, _: bool(TASKS[run.config["task"]].labels))
    print(calibration_table(found))
    if args.o:
        panels = {}
        for name, frame in found.items():
            shown = frame[(frame["samples"] == 0) | (frame["temperature"] == 1)]
            panels[name] = {
                how: tuple(
                    map(np.concatenate, zip(*(read_predictions(r) for _, r in rows.iterrows()), strict=True))
                )
                for how, rows in shown.groupby("how", sort=False)
            }
        figures.save(figures.reliability_diagrams(panels), args.o)


def print_temperature(args: Namespace) -> None:
    found = evaluated(args, lambda _, rows: any(row["samples"] for row in rows))
    print(calibration_table(found))
    if args.o:
        lines = {}
        for name, frame in found.items():
            frame["error"] = 100 * (1 - frame[TASKS[frame.attrs["task"]].metric])
            lines[name] = [frame.groupby("temperature")[y] for y in ("error", "nll") if y in frame]
        figures.save(figures.temperature(lines), args.o)


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
    commands.add_argument("--seeds", nargs="+", type=whole(0), default=SEEDS)
    commands.add_argument("--ranks", nargs="+", type=number(0), default=(2, 4))
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
            verb.add_argument(
                "-o", type=picture, metavar="PICTURE", help="where to draw it: .png, .pdf, .svg"
            )
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

"""A finished run: its settings and results, its records, and its model with the best adapter."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fused
from harness import encoder
from harness.files import read_json
from harness.glue import DEMO_FOLDER
from harness.run_folder import IN_RESULTS, fingerprint, load_adapter
from harness.settings import Number, Settings, task_of, whole
from harness.task import Task, UsageError

# Raised by reading files that are damaged, or not a run's.
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
COUNT = whole(0)  # what a step, a rank or a budget can be


class FinishedRun(NamedTuple):
    """A run's folder, config.json and results.json."""

    folder: Path
    config: dict
    results: dict

    @property
    def task(self) -> Task:
        return task_of(Settings.from_config(self.config))


def read_run(folder: Path) -> FinishedRun:
    """Raises UsageError unless both files are there and are as a run writes them."""
    for name, what in (("config.json", "not a run"), ("results.json", "not finished")):
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: {what}, it has no {name}")
    config, results = (read_json(folder / name) for name in ("config.json", "results.json"))
    null = {name for name, value in config.items() if value is None}
    config = {f.name: f.default for f in fields(Settings)} | config  # an earlier run has fewer
    try:
        settings = Settings.from_config(config)
        settled = ("task", "model", "batch_size", "total_steps", "max_length", "eval_every")
        wrong = [f.name for f in fields(Settings) if not is_valid(config[f.name], f)]
        wrong += [name for name in settled if not config[name]]
        own = {settings.method, settings.optimizer}
        wrong += [f.name for f in fields(Settings) if own & {*f.metadata["only"]} and f.name in null]
        wrong += [name for name in ("encoder", "data") if type(config.get(name, "")) is not str]
        wrong += [name for name in IN_RESULTS if config[name] != results[name]]
        wrong += [] if results["metric"] == task_of(settings).metric else ["metric"]
        wrong += [] if math.isfinite(results["best"][results["metric"]]) else ["best"]
        wrong += [name for name, rank in results["ranks"].items() if rank not in COUNT]
        wrong += [] if results["budget"]["b0"] in COUNT else ["budget"]
    except DAMAGED as error:
        wrong = [repr(error)]
    if wrong:
        raise UsageError(f"{folder} is not a run: config.json or results.json is damaged ({wrong[0]})")
    return FinishedRun(folder, config, results)


def is_valid(value: Any, f: Field) -> bool:
    """Whether a JSON value is valid for this setting: a whole number counts as a float, text as a path."""
    if f.name == "temperature":  # a list, in earlier runs
        return True
    kinds = {get_origin(kind) or kind for kind in get_args(f.type) or (f.type,)}
    json_types = {float: {int, float}, Path: {str}}
    if type(value) not in set().union(*(json_types.get(kind, {kind}) for kind in kinds)):
        return False
    if isinstance(value, list):
        return all(isinstance(text, str) for text in value)
    choices = f.metadata["options"].get("choices") if f.name != "task" else None  # it may be the user's own
    possible = f.metadata["parse"] if isinstance(f.metadata["parse"], Number) else choices
    return value is None or possible is None or value in possible


def find_runs(folders: list[Path]) -> Iterator[FinishedRun]:
    """The finished runs in and under `folders`, in the order of their paths; others are named on stderr."""
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder of runs")
    names = ("config.json", "results.json")
    found = {file.parent.resolve(): file.parent for f in folders for name in names for file in f.rglob(name)}
    for folder in sorted(found.values()):
        try:
            yield read_run(folder)
        except UsageError as error:
            skip(folder, error)


def skip(folder: Path, why: Exception | str) -> None:
    text = str(why) if isinstance(why, (str, UsageError)) else repr(why)
    text = text.removeprefix(str(folder)).lstrip(":/ ")
    sys.stderr.write(f"skipped {folder}: {' '.join(text.split())}\n")


def read_lines(run: FinishedRun, name: str) -> pd.DataFrame:
    """One of the run's .jsonl files as a table; nested names are joined by dots."""
    path = run.folder / name
    if not path.exists():
        flag = " (it takes --track_scores)" * (name == "score_agreement.jsonl")
        raise UsageError(f"no {name}{flag}")
    lines = pd.json_normalize([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    if "step" not in lines or not pd.to_numeric(lines["step"]).between(0, COUNT.most).all():
        raise UsageError(f"{name} is empty or damaged")
    return lines


def read_evaluations(run: FinishedRun, split: str | None = None) -> pd.DataFrame:
    """What tools.evaluate found on a split (the task's first validation), one line per evaluation.

    Raises UsageError.
    """
    # With --holdout the task's own validation is among its tests, and is what a study is judged by.
    splits = [name for name in (*run.task.tests, *run.task.validation) if not name.startswith("test")]
    if not (run.folder / "evaluation.json").exists():
        raise UsageError(f"{run.folder}: not evaluated, run tools.evaluate")
    content = read_json(run.folder / "evaluation.json")
    try:
        rows = pd.DataFrame(content["evaluations"])
        first = next((name for name in splits if name in set(rows["split"])), None)
        rows = rows[rows["split"] == (split or first)].copy()
        if "how" not in rows:  # an earlier form
            rows["how"] = [f"tau={row.temperature:g}" if row.samples else "mean" for row in rows.itertuples()]
        numbers = rows.drop(columns=["split", "how", "model", "data_dir"]).astype(float)
        numbers["samples"] = numbers["samples"].astype(int)
        wrong = rows.empty or numbers.isna().any(axis=None) or run.task.metric not in numbers
    except DAMAGED:
        wrong = True
    if wrong:
        raise UsageError(f"evaluation.json has no evaluation of {split or 'validation'}, or is damaged")
    return numbers.assign(split=rows["split"], how=rows["how"].astype(str))


def evaluation_settings(run: FinishedRun, **given: Any) -> Settings:
    """The run's settings, with those that are given and not None in their place: model, data_dir, seed, …"""
    settings = Settings.from_config(run.config)
    place = {"device": "cuda" if torch.cuda.is_available() else "cpu", "processes": 1}
    place |= {"model": task_of(settings).model, "data_dir": DEMO_FOLDER} if settings.demo else {}
    return replace(settings, **place | {name: value for name, value in given.items() if value is not None})


def load_model(
    run: FinishedRun, settings: Settings
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, dict[str, nn.Module], dict[str, Tensor]]:
    """Tokenizer, model with the run's best adapter, its layers by name, and σ by parameter name or {}.

    Raises UsageError where model or files are not the run's.
    """
    torch.manual_seed(settings.seed)
    tokenizer, model = encoder.load_model(settings, task_of(settings))
    layers = encoder.adapt(model, tokenizer, settings)
    if run.config.get("encoder") not in (None, fingerprint(model)):
        raise UsageError(f"--model {settings.model} has other weights than the model of {run.folder}")
    sigma = load_adapter(run.folder, model, settings)
    if not settings.plain:
        fused.fuse(model, layers)
    return tokenizer, model, layers, sigma

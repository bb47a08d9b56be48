"""A finished run: its settings and results, and its model with the best adapter."""

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fused
from harness import encoder
from harness.files import read_json
from harness.run_folder import fingerprint, load_adapter
from harness.settings import DEMO, Settings, task_of
from harness.task import UsageError

SHARED = ("task", "method", "optimizer", "score", "seed", "demo")  # in config.json and in results.json


class FinishedRun(NamedTuple):
    """A run's folder, config.json and results.json."""

    folder: Path
    config: dict
    results: dict


CHECKS = {  # of config.json and results.json: what is wrong unless it holds
    "config.json and results.json differ": lambda c, r: all(c[key] == r[key] for key in SHARED),
    "config.json is incomplete": lambda c, _: c["model"] and c["total_steps"] and "target_rank" in c,
    "results.json has no best score": lambda _, r: math.isfinite(r["best"][r["metric"]]),
    "results.json has no ranks": lambda _, r: all(type(rank) is int for rank in r["ranks"].values()),
    "results.json has no budget": lambda _, r: type(r["budget"]["b0"]) is int,
}


def read_run(folder: Path) -> FinishedRun:
    """Raises UsageError unless everything used here is there, as a run writes it."""
    for name, what in (("config.json", "is not a run"), ("results.json", "is not finished")):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} {what}: it has no {name}")
    run = FinishedRun(folder, read_json(folder / "config.json"), read_json(folder / "results.json"))
    for problem, holds in CHECKS.items():
        try:
            if holds(run.config, run.results):
                continue
        except (KeyError, TypeError, AttributeError):  # something is missing, or is not what it should be
            pass
        raise UsageError(f"{folder} is not a run: {problem}")
    for f in fields(Settings):
        if f.name != "temperature" and not can_be(run.config.get(f.name, f.default), f):
            raise UsageError(f"{folder} is not a run: {f.name} is {run.config[f.name]!r} in config.json")
    settings = Settings.from_config(run.config)
    try:
        task_of(settings).settings(settings.method, settings.optimizer)
    except (TypeError, KeyError) as error:
        raise UsageError(f"{folder}: its settings are not run_glue.py's: {error!r}") from None
    return run


def can_be(value: Any, f: Field) -> bool:
    """Whether JSON's value can be this setting's: a whole number is a float, too, and text a path."""
    choices = f.metadata["options"].get("choices")
    kinds = {get_origin(kind) or kind for kind in get_args(f.type) or (f.type,)}
    json_types = {float: {int, float}, Path: {str}}
    right_type = type(value) in set().union(*(json_types.get(kind, {kind}) for kind in kinds))
    return right_type and (choices is None or value is None or value in choices)


def find_runs(folders: list[Path], skip: Callable[[Path, str], None]) -> list[FinishedRun]:
    """The finished runs in and under `folders`, in the order of their paths; `skip` hears of the others."""
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder of runs")
    names = ("config.json", "results.json")
    found = {file.parent.resolve(): file.parent for f in folders for name in names for file in f.rglob(name)}
    runs = []
    for folder in sorted(found.values()):
        try:
            runs.append(read_run(folder))
        except UsageError as error:
            skip(folder, str(error).removeprefix(f"{folder}").lstrip(": "))
    return runs


def skip(folder: Path, why: str) -> None:
    sys.stderr.write(f"skipped {folder}: {' '.join(why.split())}\n")


def evaluation_settings(run: FinishedRun, **given: Any) -> Settings:
    """The run's settings, but for what is given (None: not given): model, data_dir, seed, device, …"""
    settings = Settings.from_config(run.config)
    place = {"device": "cuda" if torch.cuda.is_available() else "cpu", "processes": 1}
    place |= {"model": str(DEMO / "model"), "data_dir": DEMO} if settings.demo else {}
    return replace(settings, **place | {name: value for name, value in given.items() if value is not None})


def load_model(
    run: FinishedRun, settings: Settings
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, dict[str, nn.Module], dict[str, Tensor]]:
    """Tokenizer, model with the run's best adapter, its layers by name, and σ by parameter name or {}.

    Raises UsageError where model or files are not the run's.
    """
    torch.manual_seed(settings.seed)
    tokenizer, model = encoder.load_encoder(settings.model, task_of(settings).outputs)
    layers = encoder.adapt(model, tokenizer, settings)
    model.to(settings.device)
    if run.config.get("encoder") not in (None, fingerprint(model)):
        raise UsageError(f"--model {settings.model} has other weights than the encoder of {run.folder}")
    sigma = load_adapter(run.folder, model, settings)
    if not settings.plain:
        fused.fuse(model, layers)
    return tokenizer, model, layers, sigma


def check_numbers(rows: list[dict], numbers: Callable[[dict], Iterable], name: str) -> list[dict]:
    """The rows. UsageError unless there are some, and `numbers` finds finite numbers alone in each."""
    try:
        values = [number for row in rows for number in numbers(row)]
        if values and all(map(math.isfinite, values)):
            return rows
    except (TypeError, KeyError, AttributeError):  # not what a run leaves
        pass
    raise UsageError(f"{name} has nothing to use, or is damaged")


def read_lines(run: FinishedRun, name: str, numbers: Callable[[dict], Iterable]) -> list[dict]:
    """The objects of one of the run's .jsonl files, each with finite `numbers`. Raises UsageError."""
    try:
        text = (run.folder / name).read_text(encoding="utf-8")
        return check_numbers([json.loads(line) for line in text.splitlines()], numbers, name)
    except FileNotFoundError:
        flag = " (it takes --track_scores)" * (name == "score_agreement.jsonl")
        raise UsageError(f"no {name}{flag}") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{name} cannot be read: {error}") from None


def read_evaluations(run: FinishedRun, split: str) -> list[dict]:
    """What tools.evaluate found on a split. UsageError if nothing, or with another model or other data."""
    where, path = ("model", "data_dir"), run.folder / "evaluation.json"
    try:
        rows = [row for row in read_json(path)["evaluations"] if row["split"] == split]
        same = all(row[key] == run.config.get(key) for row in rows for key in where)
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be used: {error!r}") from None
    if not same:
        raise UsageError("evaluated with another model or other data than it was trained with")
    return check_numbers(rows, lambda row: [row[key] for key in row.keys() - {"split", *where}], path.name)


def check_same_model(runs: Iterable[FinishedRun]) -> None:
    """Raise UsageError unless all runs have the same model and adapters."""
    first, *others = runs
    for run in others:
        models = first.config["model"], run.config["model"]
        if models[0] != models[1] or first.results["ranks"].keys() != run.results["ranks"].keys():
            which = f"{first.folder} and {run.folder} are of different models or adapters"
            raise UsageError(f"{which} ({models[0]}, {models[1]}): draw them one by one")

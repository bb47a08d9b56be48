"""A finished run: its settings and results, and its model with the best adapter."""

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
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


def read_run(folder: Path) -> FinishedRun:
    """Raises UsageError unless everything used here is there, as a run writes it."""
    for name, what in (("config.json", "is not a run"), ("results.json", "is not finished")):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} {what}: it has no {name}")
    config, results = (read_json(folder / name) for name in ("config.json", "results.json"))
    absent = [key for key in (*SHARED, "target_rank", "total_steps") if key not in config]
    absent += [key for key in (*SHARED, "metric", "best", "ranks", "budget") if key not in results]
    if absent:
        raise UsageError(f"{folder} is not a run: config.json or results.json has no {absent[0]}")
    if any(config[key] != results[key] for key in SHARED):
        raise UsageError(f"{folder}: config.json and results.json are of two different runs")
    used = [f for f in fields(Settings) if f.name != "temperature"]
    odd = [f.name for f in used if not may_be(config.get(f.name, f.default), f.type)]
    choices = {f.name: f.metadata["options"].get("choices") for f in used}
    odd += [k for k, those in choices.items() if those and config.get(k) not in (None, *those)]
    odd += ["model"] * (config.get("model") is None)
    if odd:
        raise UsageError(f"{folder} is not a run: {odd[0]} is {config.get(odd[0])!r} in config.json")
    best = results["best"].get(str(results["metric"])) if isinstance(results["best"], dict) else None
    if type(best) not in (int, float) or not math.isfinite(best):
        raise UsageError(f"{folder}: results.json has no number for the best {results['metric']}")
    ranks, budget = results["ranks"], results["budget"]
    if not isinstance(ranks, dict) or any(type(rank) is not int for rank in ranks.values()):
        raise UsageError(f"{folder}: results.json has no ranks")
    if not isinstance(budget, dict) or type(budget.get("b0")) is not int:
        raise UsageError(f"{folder}: results.json has no budget")
    try:
        settings = Settings.from_config(config)
        task_of(settings).settings(settings.method, settings.optimizer)
    except (TypeError, KeyError) as error:
        raise UsageError(f"{folder}: its settings are not run_glue.py's: {error!r}") from None
    return FinishedRun(folder, config, results)


def may_be(value: Any, kind: Any) -> bool:
    """Whether JSON's value can be a setting of this type: a whole number a float, too, and text a path."""
    kinds = {get_origin(one) or one for one in get_args(kind) or (kind,)}
    json_types = {float: {int, float}, Path: {str}, list: {list}}
    return type(value) in set().union(*(json_types.get(one, {one}) for one in kinds))


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
    place = {"device": None, "processes": 1}
    place |= {"model": str(DEMO / "model"), "data_dir": DEMO} if settings.demo else {}
    place |= {name: value for name, value in given.items() if value is not None}
    place["device"] = place["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    return replace(settings, **place)


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


def read_lines(run: FinishedRun, name: str, numbers: Callable[[dict], list]) -> list[dict]:
    """The objects of one of the run's .jsonl files. UsageError if it has none with finite `numbers`."""
    try:
        lines = [json.loads(line) for line in (run.folder / name).read_text(encoding="utf-8").splitlines()]
        values = [number for line in lines for number in numbers(line) if number is not None]
        if not values or not all(map(math.isfinite, values)):
            raise ValueError("it is not a run's")
        return lines
    except FileNotFoundError:
        flag = " (it takes --track_scores)" * (name == "score_agreement.jsonl")
        raise UsageError(f"no {name}{flag}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{name} cannot be read: {error}") from None


def evaluations(run: FinishedRun, split: str) -> list[dict]:
    """What tools.evaluate found on a split. UsageError if nothing, or with another model or other data."""
    path = run.folder / "evaluation.json"
    rows = read_json(path).get("evaluations")
    try:
        rows = [row for row in rows if row["split"] == split]
        if any(row[key] != run.config.get(key) for row in rows for key in ("model", "data_dir")):
            raise UsageError("evaluated with another model or other data than it was trained with")
        numbers = [row[key] for row in rows for key in row.keys() - {"split", "model", "data_dir"}]
        if not numbers or not all(map(math.isfinite, numbers)):
            raise UsageError(f"no evaluation of {split} in evaluation.json")
        return rows
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be used: {error!r}") from None


def same_model(runs: Iterable[FinishedRun]) -> None:
    """Raise UsageError unless all runs have the same model and adapters."""
    first, *others = runs
    for run in others:
        models = first.config.get("model"), run.config.get("model")
        if models[0] != models[1] or first.results["ranks"].keys() != run.results["ranks"].keys():
            which = f"{first.folder} and {run.folder} are of different models or adapters"
            raise UsageError(f"{which} ({models[0]}, {models[1]}): draw them one by one")

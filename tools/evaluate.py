"""Evaluate a finished run's adapter: at its mean, from posterior draws, or for GLUE's leaderboard.

    python -m tools.evaluate runs/RUN                                            # at the mean
    python -m tools.evaluate runs/RUN --eval_samples 10 --temperature 0 0.5 1    # also from its posterior
    python -m tools.evaluate runs/RUN --split train --data_dir path/to/other/glue
    python -m tools.evaluate runs/RUN --split validation --fit holdout           # with tools/calibrate.py's
    python -m tools.evaluate runs/RUN --predict CoLA.tsv                         # for the test split

Writes evaluation.json and predictions.safetensors into the run's folder, keeping what they hold of other
splits; with --predict, that file alone.
"""

import itertools
import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

from harness import files
from harness.batches import evaluation_split, tokenize
from harness.prediction import judge, predict, predict_from_draws
from harness.run_folder import EVALUATION, POSTERIOR
from harness.settings import Parser, any_seed, check_device, exit_status, few, from_0, task_of, whole
from harness.task import Task, UsageError
from tools.calibrate import FITTED, Predictor, fitted
from tools.finished import evaluation_settings, load_model, read_run

FIT_ON = 400  # examples, about: every k-th


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--eval_samples", type=few(0), default=0, help="draws to average over (0: none)")
    parser.add_argument("--temperature", type=from_0, nargs="+", help="τ: draw with variance τσ² (1)")
    parser.add_argument("--split", help="of the data (the task's validation; for --predict its test)")
    parser.add_argument("--fit", metavar="SPLIT", help="also cheap baselines, fitted on 400 examples of it")
    parser.add_argument("--predict", type=Path, metavar="FILE", help="predictions as GLUE's submission TSV")
    parser.add_argument("--seed", type=any_seed, help="of the draws (the run's)")
    parser.add_argument("--model", help="where the base model is now")
    parser.add_argument("--data_dir", type=Path, help="where the data files are now (where the run had them)")
    parser.add_argument("--test_file", type=Path, help="of your own data, for a run with --train_file")
    parser.add_argument("--eval_batch_size", type=whole(1), help="examples in a forward pass (the run's)")
    parser.add_argument("--device", help="cpu, cuda, … (cuda if there is one)")
    return parser.parse_args(argv)


def check(args: Namespace, task: Task) -> list[str]:
    """The splits to evaluate. Raises UsageError for flags that conflict, or files that cannot be written."""
    if args.temperature and not args.eval_samples:
        raise UsageError("--temperature is for posterior draws: give --eval_samples N, or leave it out")
    if args.eval_samples and not (args.run / POSTERIOR).exists():
        raise UsageError(f"--eval_samples needs a posterior, and {args.run} has none: IVON's runs have one")
    if args.predict and (args.fit or len(args.temperature or ()) > 1):
        raise UsageError("--predict takes one --temperature, and no --fit")
    if args.fit and not task.labels:
        raise UsageError(f"--fit is for classes; {task.name} is a regression")
    if args.predict and not args.predict.absolute().parent.is_dir():
        raise UsageError(f"--predict {args.predict}: there is no folder {args.predict.parent}")
    for path in [args.predict] if args.predict else [args.run / name for name in EVALUATION]:
        files.check_writable(path, path)
    tests = [split for split in task.splits if split.startswith("test")]
    own = tests[:1] if args.predict or args.test_file else list(task.validation)
    names = own if args.split is None else [args.split]
    if not names:
        raise UsageError(f"{task.name} has no test split: give --split (or --test_file, for your own data)")
    for flag, name in {"--split": names[0], "--fit": args.fit}.items():
        if name not in (None, *task.splits):
            raise UsageError(f"{flag} {name}: {task.name} has {', '.join(task.splits)}")
    if args.fit in names:
        raise UsageError(f"--fit {args.fit} is the split to evaluate: give another one")
    return names


def predictors(args: Namespace, model: nn.Module, sigma: dict[str, Tensor], seed: int) -> list[Predictor]:
    """At the mean, and averaged over draws at each temperature."""
    n, found = args.eval_samples, [Predictor("mean", 0, 0.0, lambda of: predict(model, of))]
    for tau in (args.temperature or [1.0]) if n else ():
        draws = partial(predict_from_draws, model, sigma=sigma, samples=n, temperature=tau, seed=seed)
        found.append(Predictor(f"tau={tau:g}", n, tau, draws))
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    run = read_run(args.run)
    given = ("seed", "model", "data_dir", "test_file", "eval_batch_size", "device")
    given = {name: getattr(args, name) for name in given}
    s = evaluation_settings(run, **given)
    if args.test_file and (not s.train_file or args.data_dir):
        raise UsageError("--test_file is for a run with --train_file, and without --data_dir")
    task = task_of(s)
    names = check(args, task)
    check_device(s.device)
    data = task.load(s.data_dir, [*names, *([args.fit] if args.fit else ())])
    tokenizer, model, layers, sigma = load_model(run, s)
    if args.fit:  # every k-th example
        k = max(1, round(len(data[args.fit]) / FIT_ON))
        data[args.fit] = data[args.fit].select(range(0, len(data[args.fit]), k))
    splits, collate = {}, DataCollatorWithPadding(tokenizer)
    for name, examples in data.items():
        features, labels = tokenize(examples, task, tokenizer, s.max_length, s.causal)
        splits[name] = evaluation_split(features, labels, collate, s.eval_batch_size)
    ways: Iterable[Predictor] = predictors(args, model, sigma, s.seed)
    try:
        if args.predict:
            predictions = ways[-1].predict(splits[names[0]])
            write_submission(args.predict.resolve(), data[names[0]]["idx"], predictions, task)
            print(f"predictions of {len(predictions)} examples in {args.predict}")
            return
        for name, split in splits.items():
            if lacks_labels(split.labels):
                raise UsageError(f"{name} has no labels; --predict FILE writes its predictions")
        if args.fit:
            on = splits[args.fit], args.eval_samples or 10, s.seed
            ways = itertools.chain(ways, fitted(model, layers, sigma, *on))
        rows, saved = [], {f"{name}.labels": splits[name].labels for name in names}
        where = {"model": s.model, "data_dir": s.data_dir and str(s.data_dir), "seed": s.seed}
        for way in ways:  # one after the other: the last rewrites the adapters
            for name in names:
                began = time.perf_counter()
                predictions = saved[f"{name}.{way.how}"] = way.predict(splits[name])
                seconds = time.perf_counter() - began
                judged = judge(task, predictions, splits[name].labels, calibrated=True)
                row = {"split": name, "how": way.how, "samples": way.samples, "temperature": way.value}
                rows.append(row | judged | {"seconds": seconds, **where})
                numbers = "  ".join(f"{metric} {value:.4f}" for metric, value in judged.items())
                value = f" ({way.value:.3g})" * (way.how in FITTED)
                print(f"{name} {way.how}{value}:  {numbers}  ({seconds:.2f} s)", flush=True)
    except FloatingPointError as error:
        raise UsageError(f"{error}: is a temperature, given or tried, too high?") from None
    rows.sort(key=lambda row: names.index(row["split"]))
    record(args.run, rows, saved)


def lacks_labels(labels: Tensor) -> bool:
    """A missing class is −1; a missing number NaN, or −1 throughout (GLUE's test split)."""
    if labels.is_floating_point():
        return bool(labels.isnan().any() or (labels == -1).all())
    return bool((labels < 0).any())


def record(folder: Path, rows: list[dict], predictions: dict[str, Tensor]) -> None:
    """evaluation.json and predictions.safetensors; what they hold of other splits stays."""
    evaluation, tensors = (folder / name for name in EVALUATION)
    now = {row["split"] for row in rows}
    with files.locked(folder):
        try:
            others = [row for row in files.read_json(evaluation)["evaluations"] if row["split"] not in now]
            old, _ = files.read_tensors(tensors)
        except (UsageError, KeyError, TypeError):  # none yet, or damaged: nothing to keep
            others, old = [], {}
        rows = others + rows
        predictions = {name: t for name, t in old.items() if name.split(".")[0] not in now} | predictions
        files.write_tensors(tensors, predictions, {"evaluations": json.dumps(rows)})  # which it belongs to
        files.write_json(evaluation, {"evaluations": rows})


def write_submission(path: Path, index: Sequence[int], predictions: Tensor, task: Task) -> None:
    """A file as GLUE's leaderboard takes it: "index" and "prediction", then the classes' probabilities."""
    if task.name == "stsb":
        predictions = predictions.clamp(0, 5)  # the scores there are
    table = {"index": index, "prediction": predictions.tolist()}
    if task.labels:
        table["prediction"] = [task.written[i] for i in predictions.argmax(-1)]
        names = [f"p({label})" if label in table else label for label in task.labels]
        table |= dict(zip(names, predictions.T.tolist(), strict=True))
    files.write_atomically(path, pd.DataFrame(table).to_csv(sep="\t", index=False).encode())


if __name__ == "__main__":
    sys.exit(exit_status(main, "tools.evaluate"))

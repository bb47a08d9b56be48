"""Fine-tune an encoder on a GLUE task with adaptive low-rank adapters, scored by the posterior.

    python run_glue.py --demo                                           # embedded model and data, a minute
    python run_glue.py --task cola --optimizer ivon --score mu          # the paper's setting, from the Hub
    python run_glue.py --task cola --optimizer adamw --score sensitivity            # AdaLoRA's own way
    python run_glue.py --task rte --model path/to/checkpoint --data_dir path/to/glue       # local folders
    python run_glue.py --eval_only runs/RUN --eval_samples 10 --temperature 0 0.5 1     # from its posterior
    python run_glue.py --eval_only runs/RUN --predict CoLA.tsv                       # for GLUE's leaderboard
    python run_glue.py --task cola --optimizer ivon --score mu --resume       # go on where this run stopped
    torchrun --nproc_per_node 2 run_glue.py --task cola --optimizer ivon --score mu     # on two GPUs

Settings that are not given are the papers' for the task (glue.py). What a run leaves behind: README.md.

Exit status: 0 done; 2 a usage or input error; 3 the loss, a gradient, a parameter or the posterior was not
finite; 130 interrupted, 143 terminated (a checkpoint is kept).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers  # its parts are imported on their first use: what is wrong with a command is said sooner
from torch import Tensor, nn
from tqdm import tqdm

import processes
from adalora import (
    HEADS,
    TARGETS,
    add_penalty_gradients,
    inject,
    linear_maps,
    narrow_relative_positions,
)
from budget import CubicBudget
from checkpoint import (
    append,
    checkpoints,
    checksum,
    claimed,
    fingerprint,
    load_adapter,
    load_checkpoint,
    pack_files,
    read_tensors,
    restore,
    save_adapter,
    save_checkpoint,
    sigmas_by_name,
    snapshot,
    unpack_files,
    write_json,
    write_tensors,
)
from glue import LORA_IVON, TASKS, Task, check_hub, load_task, task_of
from ivon import IVON
from metrics import score_agreement
from posterior import (
    Split,
    batched,
    judge,
    judge_probabilities,
    predict,
    predict_from_posterior,
    write_submission,
)
from scores import SCORES
from tokens import tokenize
from vilora import RankAllocator

HERE = Path(__file__).resolve().parent
MODEL = "microsoft/deberta-v3-base"
CHECKPOINT_FILES = {  # what a local checkpoint folder has to have: one of each
    "config": ("config.json",),
    "weights": ("*.safetensors", "pytorch_model*.bin"),
    "tokenizer": ("tokenizer.json", "spm.model", "vocab.txt", "vocab.json", "*.model"),
}
# IVON's in the papers; ess None is the number of training examples.
IVON_SETTINGS = {"mc_samples": 1, "ess": None, "hess_init": 1.0, "beta2": 0.99999, "clip_radius": 1e-3}
IVON_BETA1, IVON_DECAY, IVON_DECAY_FULL = 0.9, 1e-8, 1e-5  # the last in full fine-tuning
# Flags that only some methods have.
ADALORA_FLAGS = ("score", "init_rank", "orth", "squared_orth", "tinit", "tfinal", "delta_t", "track_scores")
OTHER_FLAGS = {
    "adalora": (),
    "lora": ADALORA_FLAGS,
    "full": (*ADALORA_FLAGS, "target_rank", "targets", "alpha"),
}
GROUP = 50  # batches that --group_by_length sorts together
# Flags that only the evaluation of a finished run has, and those it takes from the run's config.json if they
# are not given.
EVAL_ONLY_FLAGS = ("eval_only", "split", "predict", "probabilities")
EVAL_FLAGS = ("seed", "model", "data_dir", "eval_batch_size", "device", "output_dir")
# What a run leaves behind: the files that grow with it, which a checkpoint therefore holds, and the others.
ADAPTER = ("adapter/adapter.safetensors", "adapter/posterior.safetensors")
GROWING = ("metrics.jsonl", "score_agreement.jsonl", *ADAPTER)
EVALUATION = ("evaluation.json", "predictions.safetensors")
LEFT_BEHIND = ("config.json", "results.json", *EVALUATION, *GROWING)
# Settings that follow from others, and those that a resumed run may have otherwise: where things are (its
# weights and data are known by their checksums) and when it is saved.
DERIVED = ("epochs", "lr", "ess", "init_rank", "tinit", "tfinal", "delta_t", "first_lr", "first_steps")
DERIVED += ("total_steps", "warmup_steps")
UNCOMPARED = ("model", "data_dir", "output_dir", "checkpoint_every", "keep_checkpoint", "resume", "overwrite")
FLOAT32_MAX = torch.finfo(torch.float32).max
RANK_SEEDS = 1_000_003  # between the seeds of two processes: no run's seeds are that far apart
LISTEN_EVERY = 10  # updates between two questions whether another process has received a signal
FLUSH_EVERY = 50  # steps between two looks at the losses, each of which waits for the device


class UsageError(Exception):
    """Something the user can mend: one line on stderr, exit status 2."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong as a UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class NotFinite(Exception):
    """Training has broken down: one line on stderr, exit status 3."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM: one line on stderr, exit status 128 + its number."""


# ---- settings ------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with whatever the task's settings say where a flag was not given."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    scores = "; ".join(f"{name}: {score.about}" for name, score in SCORES.items())
    add = parser.add_argument
    # fmt: off
    add("--task", choices=TASKS, help="required unless --demo")
    add("--method", choices=OTHER_FLAGS, default="adalora", help="full: no adapters (adalora)")
    add("--optimizer", choices=["ivon", "adamw"], default="ivon", help="(ivon)")
    add("--score", choices=SCORES, help=f"{scores} (mu)")
    add("--target_rank", type=number(0), help="average rank kept, may be fractional with adalora (2)")
    add("--init_rank", type=whole(0), help="rank at the start (1.5 × target, rounded)")
    add("--targets", nargs="+", metavar="NAME", help="ends of linear maps' names (the architecture's own)")
    add("--model", help=f"a Hub name or a local checkpoint folder ({MODEL})")
    add("--data_dir", type=Path, help="a folder in GLUE's own layout (the Hub's copy)")
    add("--demo", action="store_true", help="the embedded model and data: no download")
    add("--seed", type=whole(0), default=2021, help="of everything random (2021)")
    add("--epochs", type=number(above=0), help="(the task's, as all without a default here)")
    add("--max_steps", type=whole(1), help="updates in all, instead of epochs")
    add("--batch_size", type=whole(1), default=32, help="examples in a forward pass (32)")
    add("--grad_accum", type=whole(1), default=1, help="forward passes in an update (1)")
    add("--group_by_length", action="store_true", help="batches of examples of like length: less padding")
    add("--lr", type=number(above=0), help="peak of one warm-up and linear decay (IVON: no first phase then)")
    add("--max_length", type=whole(4), help="tokens")
    add("--eval_every", type=whole(1), help="updates")
    add("--eval_batch_size", type=whole(1), default=128, help="(128)")
    add("--mc_samples", type=whole(1), help="IVON's draws in an update (1)")
    add("--ess", type=number(above=0), help="IVON's effective sample size (training examples; LoRA 1e10)")
    add("--hess_init", type=number(above=0), help="IVON's h0 (1; LoRA 1e-4)")
    add("--beta2", type=number(0, below=1), help="IVON's (0.99999; LoRA 0.999)")
    add("--clip_radius", type=number(above=0), help="IVON's ξ (0.001)")
    add("--orth", type=number(0), help="γ, weight of the orthogonality penalty")
    add("--squared_orth", action="store_true", help="the penalty as the paper writes it, a sum of squares")
    add("--tinit", type=whole(0), help="t_i, updates before pruning starts")
    add("--tfinal", type=whole(0), help="t_f, updates with the final pattern")
    add("--delta_t", type=whole(1), help="ΔT, updates between two allocations")
    add("--alpha", type=number(above=0), help="adapters are scaled by alpha / rank at the start")
    add("--track_scores", action="store_true", help="record how far the scores agree, at each allocation")
    add("--eval_samples", type=whole(0), default=0, help="average predictions over N draws, too (0)")
    add("--temperature", type=number(0), nargs="+", help="τ: draw with variance τσ² (1)")
    add("--eval_only", type=Path, metavar="RUN", help="evaluate a finished run's adapter, do not train")
    add("--split", help="of the data, with --eval_only (the task's validation; for --predict its test)")
    add("--predict", type=Path, metavar="FILE", help="with --eval_only: predictions as GLUE's submission TSV")
    add("--probabilities", action="store_true", help="with --predict: the classes' probabilities beside them")
    add("--device", help="cpu, cuda, cuda:1, mps, … (cuda if there is one)")
    add("--bf16", action="store_true", help="the frozen backbone's products in bfloat16")
    add("--compile", action="store_true", help="train with torch.compile")
    add("--output_dir", type=Path, help="(runs/<task>-<method>-<optimizer>-<score>-r<target>-s<seed>)")
    add("--overwrite", action="store_true", help="replace the run in the output folder")
    add("--resume", action="store_true", help="go on with the run in the output folder, if there is one")
    add("--checkpoint_every", type=whole(1), help="updates between two checkpoints (at each evaluation)")
    add("--keep_checkpoint", action="store_true", help="keep the last checkpoint of a complete run")
    # fmt: on
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    check_evaluation(args, {word.split("=")[0][2:] for word in words if word.startswith("--")})
    if args.eval_only:
        return args

    if args.demo:
        if args.task not in (None, "cola"):
            raise UsageError(f"--demo has the task cola, not {args.task}: leave --task out, or --demo")
        if args.model or args.data_dir:
            raise UsageError("--demo has its own model and data: leave out --model and --data_dir, or --demo")
        args.task, args.model, args.data_dir = "cola", str(HERE / "demo/model"), HERE / "demo"
    if args.resume and args.overwrite:
        raise UsageError("--resume goes on with a run, --overwrite replaces it: leave one out")
    if args.task is None:
        raise UsageError(f"--task is missing: one of {', '.join(TASKS)} (or --demo)")
    for name in OTHER_FLAGS[args.method]:
        if not (getattr(args, name) is None or getattr(args, name) is False):
            raise UsageError(f"--method {args.method} has no --{name}: leave it out")
    method_ranks(args)
    if args.method == "adalora" and SCORES[args.score].needs == "sigma" and args.optimizer != "ivon":
        raise UsageError(f"--score {args.score} needs σ, a posterior: use --optimizer ivon, or another score")
    args.model = args.model or MODEL
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.processes = processes.count()
    if args.processes > 1:
        if args.device not in ("cpu", "cuda"):
            raise UsageError(f"--device {args.device}: with torchrun it is cuda, a GPU a process, or cpu")
        if args.device == "cuda" and not (torch.cuda.is_available() and dist.is_nccl_available()):
            raise UsageError("--device cuda: there is no GPU, or no NCCL, here")
        args.device += f":{processes.local_rank()}" if args.device == "cuda" else ""
    task = task_of(args.task, args.method, args.demo)
    for name in ("max_length", "epochs", "eval_every", "alpha", "orth"):
        if getattr(args, name) is None and name not in OTHER_FLAGS[args.method]:
            setattr(args, name, getattr(task.settings, name))
    if args.max_steps or args.demo or args.data_dir is None:
        # The length of the run is known before anything is loaded, and so whether it can be.
        plan(argparse.Namespace(**vars(args)), task, task.train_size, modules=1)
    for name, default in IVON_SETTINGS.items():
        if args.optimizer != "ivon" and getattr(args, name) is not None:
            raise UsageError(f"--{name} is a setting of IVON: leave it out, or use --optimizer ivon")
        if args.optimizer == "ivon" and getattr(args, name) is None:
            setattr(args, name, LORA_IVON.get(name, default) if args.method == "lora" else default)
    if args.eval_samples and args.optimizer != "ivon":
        raise UsageError("--eval_samples needs a posterior: use --optimizer ivon, or leave it out")
    args.beta1 = IVON_BETA1 if args.optimizer == "ivon" else None
    args.weight_decay = 0.0 if args.optimizer == "adamw" else IVON_DECAY
    if args.method == "full" and args.optimizer == "ivon":
        args.weight_decay = IVON_DECAY_FULL
    rank = None if args.target_rank is None else f"r{args.target_rank:g}"
    parts = (args.task, args.method, args.optimizer, args.score, rank, f"s{args.seed}")
    args.output_dir = args.output_dir or Path("runs") / "-".join(part for part in parts if part)
    return args


def check_evaluation(args: argparse.Namespace, given: set[str]) -> None:
    """What has to do with evaluation alone, from the names of the flags given; raises UsageError."""
    if args.eval_only is None:
        for name in EVAL_ONLY_FLAGS:
            if getattr(args, name) not in (None, False):
                raise UsageError(f"--{name} is for a finished run: give --eval_only RUN, or leave it out")
        if len(args.temperature or ()) > 1:
            raise UsageError("training evaluates at one --temperature; --eval_only takes several")
    elif others := sorted(given.difference(EVAL_ONLY_FLAGS, EVAL_FLAGS, ("eval_samples", "temperature"))):
        raise UsageError(f"--eval_only trains nothing: leave --{others[0]} out, {args.eval_only} has it")
    elif args.probabilities and not args.predict:
        raise UsageError("--probabilities go beside predictions: give --predict FILE, or leave it out")
    elif args.predict and len(args.temperature or ()) > 1:
        raise UsageError("--predict is for one --temperature")
    elif args.predict and args.output_dir:
        raise UsageError("--predict FILE says where to write: leave --output_dir out")
    if args.temperature and not args.eval_samples:
        raise UsageError("--temperature is of posterior draws: give --eval_samples N, or leave it out")
    if args.eval_only and processes.count() > 1:
        raise UsageError("--eval_only runs in one process: start it with python")
    args.temperature = args.temperature or [1.0]
    for name in EVAL_FLAGS:
        if args.eval_only and name not in given:
            setattr(args, name, None)  # the run's


def method_ranks(args: argparse.Namespace) -> None:
    """Fill in score and ranks of a method that has them."""
    if args.method == "full":
        args.target_rank = args.init_rank = None
        return
    args.target_rank = 2.0 if args.target_rank is None else args.target_rank
    if args.method == "lora":
        if args.target_rank < 1 or args.target_rank % 1:
            raise UsageError(
                f"--target_rank {args.target_rank:g}: with --method lora it is a whole number from 1"
            )
        args.init_rank = int(args.target_rank)
        return
    args.score = args.score or "mu"
    if args.init_rank is None:
        args.init_rank = max(math.floor(1.5 * args.target_rank + 0.5), math.ceil(args.target_rank))
    if args.target_rank > args.init_rank:
        raise UsageError(
            f"--target_rank {args.target_rank:g} is above --init_rank {args.init_rank}, the start"
        )


def number(
    least: float = -math.inf, *, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """An argparse type: a number that float32 has, in [least, below) and above `above`."""

    def parse(text: str) -> float:
        value = float(text)
        if not (abs(value) <= FLOAT32_MAX and least <= value < below and value > above):
            bounds = [f"{least:g} or more"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
            bounds += [f"below {below:g}"] * (below < math.inf)
            bounds += ["of float32's range"] * (math.isfinite(value) and abs(value) > FLOAT32_MAX)
            raise argparse.ArgumentTypeError(f"{text} is not {' and '.join(bounds or ['finite'])}")
        return value

    parse.__name__ = "number"
    return parse


def whole(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `least`."""

    def parse(text: str) -> int:
        value = int(text)
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of {least} or more")
        return value

    parse.__name__ = "whole number"
    return parse


def plan(args: argparse.Namespace, task: Task, train_size: int, modules: int) -> CubicBudget:
    """Fill in what depends on the run's length, and return its budget.

    When the run is longer or shorter than the papers' (epochs, batch size, data), t_i, t_f, ΔT and the phases
    of the learning rate grow or shrink with it, unless they were given by hand.
    """
    per_epoch = math.ceil(train_size / (args.batch_size * args.grad_accum * args.processes))
    args.total_steps = args.max_steps or math.ceil(args.epochs * per_epoch)

    def scaled(steps: int) -> int:
        return steps * args.total_steps // task.total_steps

    settings, ivon = task.settings, args.optimizer == "ivon"
    args.warmup_steps = scaled(settings.warmup_ivon if ivon else settings.warmup_adamw)
    two_phases = ivon and args.lr is None
    args.first_lr = settings.first_lr if two_phases else 0.0
    args.first_steps = scaled(settings.first_steps) if two_phases else 0
    if ivon and args.method == "lora" and args.hess_init and args.lr is None:
        # No setting is published; the largest step, lr·h0·ξ, is then AdamW's.
        args.lr = float(f"{settings.lr_adamw / (args.hess_init * args.clip_radius):.6g}")
    args.lr = args.lr or (settings.lr_ivon if ivon else settings.lr_adamw)
    args.ess = args.ess or (float(train_size) if ivon else None)
    args.epochs = args.total_steps / per_epoch
    if args.method != "adalora":
        triplets = (args.init_rank or 0) * modules  # as many all the time
        return CubicBudget(triplets, triplets, args.total_steps, 0, 0, 1)
    args.tinit = scaled(settings.tinit) if args.tinit is None else args.tinit
    args.tfinal = scaled(settings.tfinal) if args.tfinal is None else args.tfinal
    args.delta_t = max(1, scaled(settings.delta_t)) if args.delta_t is None else args.delta_t
    initial, target = args.init_rank * modules, round(args.target_rank * modules)
    try:
        return CubicBudget(initial, target, args.total_steps, args.tinit, args.tfinal, args.delta_t)
    except ValueError as error:
        raise UsageError(f"{error} (--tinit, --tfinal, --target_rank, --init_rank)") from None


def learning_rate(
    t: int, total_steps: int, peak: float, warmup: int, first_lr: float = 0.0, first_steps: int = 0
) -> float:
    """The learning rate of the update that comes after t finished ones.

    Up from 0 over `warmup` updates, then linearly down to 0. With a first phase: up to `first_lr`, held until
    t is `first_steps`, and down from `peak` there.
    """
    if t < warmup:
        return (first_lr if first_steps else peak) * t / warmup
    if t < first_steps:
        return first_lr
    start = max(warmup, first_steps)
    return peak * (total_steps - t) / (total_steps - start)


# ---- model and data ------------------------------------------------------------------------------------


def load_model(
    name: str, classes: int
) -> tuple[transformers.PreTrainedTokenizerBase, transformers.PreTrainedModel]:
    """Tokenizer, and encoder with a head of `classes` outputs in float32, from the Hub or a local folder."""
    if Path(name).is_dir():
        for what, patterns in CHECKPOINT_FILES.items():
            if not any(any(Path(name).glob(pattern)) for pattern in patterns):
                raise UsageError(
                    f"--model {name} has no {what}: a checkpoint folder has {' or '.join(patterns)}"
                )
    elif len(Path(name).parts) > 2 or name.startswith((".", "~")):
        raise UsageError(f"--model {name} does not exist: give a checkpoint folder, or a name on the Hub")
    else:
        check_hub()
    try:
        safe = {"trust_remote_code": False}  # nothing is asked, no code of a checkpoint is run
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **safe)
        # In float32 whatever the checkpoint is stored in: DeBERTaV3's float16 does not train.
        how = {"num_labels": classes, "dtype": torch.float32, "ignore_mismatched_sizes": True, **safe}
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, **how, output_loading_info=True
        )
    except Exception as error:  # a damaged checkpoint makes the libraries raise all sorts of things
        kind = UsageError if Path(name).is_dir() else ConnectionError
        raise kind(f"--model {name} cannot be loaded: {error}") from error
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if absent := sorted(key for key in absent if HEADS.isdisjoint(key.split("."))):
        raise UsageError(f"--model {name} lacks weights of its encoder: {absent[0]} is missing or misshapen")
    if tokenizer.pad_token is None:
        raise UsageError(f"--model {name}: the tokenizer has no padding token")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UsageError(f"--model {name}: the tokenizer's {len(tokenizer)} tokens do not fit the weights")
    return tokenizer, model


def shuffled_batches(n: int, size: int, seed: int, lengths: Tensor | None = None) -> Iterator[Tensor]:
    """Batches of indices, epoch after epoch; the last of an epoch may be smaller.

    With the examples' `lengths` (n,) a batch has examples of like length: those of GROUP batches are sorted,
    and the batches come in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator)
        if lengths is None:
            yield from order.split(size)
            continue
        groups = [group[lengths[group].argsort(stable=True)] for group in order.split(GROUP * size)]
        batches = [batch for group in groups for batch in group.split(size)]
        yield from (batches[i] for i in torch.randperm(len(batches), generator=generator))


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, or for regression the mean squared error of the one output."""
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels)
    return F.cross_entropy(logits, labels)


def evaluation_splits(
    dataset: Mapping[str, Mapping[str, list]],
    names: Iterable[str],
    task: Task,
    tokenizer: transformers.PreTrainedTokenizerBase,
    args: argparse.Namespace,
) -> dict[str, Split]:
    collate = transformers.DataCollatorWithPadding(tokenizer)
    return {
        name: batched(
            *tokenize(dataset[name], task, tokenizer, args.max_length), collate, args.eval_batch_size
        )
        for name in names
    }


def evaluate(
    model: transformers.PreTrainedModel,
    splits: Mapping[str, Split],
    args: argparse.Namespace,
    sigma: Mapping[str, Tensor],
) -> dict[str, dict]:
    """The task's metrics on each split, at the mean; with --eval_samples also "calibration" of both."""
    scores = {}
    for name, split in splits.items():
        mean = predict(model, split)
        scores[name] = judge(args.task, mean, split.labels)
        if args.eval_samples:
            how = args.eval_samples, args.temperature[0], args.seed
            both = {"mean": mean, "samples": predict_from_posterior(model, split, sigma, *how)}
            scores[name]["calibration"] = {
                key: judge_probabilities(args.task, predictions, split.labels)
                for key, predictions in both.items()
            }
    return scores


# ---- what a run leaves behind ------------------------------------------------------------------------------


def record_agreement(path: Path, allocator: RankAllocator) -> None:
    """A line for each allocation since the last call: how far the scores agree (metrics.score_agreement)."""
    for record in allocator.tracked:
        scores = {name: S.cpu().numpy() for name, S in record["scores"].items()}
        cv = record["sigma_cv"] if record["sigma_cv"] is None else float(record["sigma_cv"])
        line = {"step": record["step"], "budget": record["budget"], "sigma_cv": cv}
        append(path, json.dumps(line | score_agreement(scores, record["budget"])) + "\n")
    allocator.tracked.clear()


def rank_rows(ranks: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Ranks by adapter → by layer ("" where a name has no number) and module."""
    rows: dict[str, dict[str, float]] = {}
    for name, rank in ranks.items():
        parts = name.split(".")
        number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
        rows.setdefault(parts[number] if number >= 0 else "", {})[".".join(parts[number + 1 :])] = rank
    return rows


def rank_grid(ranks: Mapping[str, float]) -> str:
    """Ranks by adapter as a table, a row a layer and a column a module."""
    rows = rank_rows(ranks)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["layer  " + "  ".join(columns)]
    for layer, row in rows.items():
        cells = (f"{row[column]:g}" if column in row else "" for column in columns)
        padded = (cell.rjust(len(column)) for cell, column in zip(cells, columns, strict=True))
        lines.append(f"{layer:>5}  " + "  ".join(padded))
    return "\n".join(lines)


def provenance(device: torch.device) -> dict:
    """What else decides a result: versions, code, hardware."""
    commit = None
    if shutil.which("git") and (HERE / ".git").exists():
        command = ["git", "-C", HERE, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    packages = ("torch", "transformers", "datasets", "numpy", "scipy", "safetensors")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "git_commit": commit,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def peak_memory_mb(device: torch.device) -> float:
    """The most memory that tensors took on a CUDA device, or on others that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 2 ** (20 if sys.platform == "darwin" else 10)


# ---- the run -------------------------------------------------------------------------------------------


class Adapted(NamedTuple):
    """A model with its adapters, on its device."""

    tokenizer: transformers.PreTrainedTokenizerBase
    model: transformers.PreTrainedModel
    layers: dict[str, nn.Module]  # adapters by name
    head: set[nn.Parameter]
    encoder: str  # fingerprint of what is frozen


def load_data(args: argparse.Namespace, splits: Collection[str]) -> dict:
    """Splits of the task's data. Raises UsageError."""
    with mendable():
        return load_task(args.task, args.data_dir, splits)


def adapted_model(args: argparse.Namespace, task: Task) -> Adapted:
    """Load the model and inject adapters: the encoder is frozen, or in full fine-tuning nothing is."""
    torch.manual_seed(args.seed)
    with mendable():
        tokenizer, model = load_model(args.model, len(task.labels) or 1)
    layers = {}
    if args.method == "full":
        narrow_relative_positions(model)
    else:
        args.targets = args.targets or TARGETS.get(model.config.model_type)
        if args.targets is None:
            maps = ", ".join(linear_maps(model))
            raise UsageError(f"a {model.config.model_type} model needs --targets; its linear maps are {maps}")
        widest = max(min(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear))
        if args.init_rank > widest:
            flag = "init_rank" if args.method == "adalora" else "target_rank"
            raise UsageError(f"--{flag} {args.init_rank} is above {widest}, the most a map of this model has")
        kind = "svd" if args.method == "adalora" else "lora"
        try:
            layers = inject(model, args.targets, args.init_rank, args.alpha, kind=kind)
        except ValueError as error:
            raise UsageError(f"--targets: {error}") from None
    head = {p for name, p in model.named_parameters() if not HEADS.isdisjoint(name.split("."))}
    for p in head:
        p.requires_grad_(True)
    longest = min(
        getattr(model.config, "max_position_embeddings", None) or math.inf, tokenizer.model_max_length
    )
    if args.max_length > longest:
        raise UsageError(f"--max_length {args.max_length} is above the model's {longest} tokens")
    return Adapted(tokenizer, model.to(args.device), layers, head, fingerprint(model))


@contextmanager
def mendable() -> Iterator[None]:
    """What goes wrong in loading, as a UsageError."""
    try:
        yield
    except ConnectionError as error:
        cached = ", or HF_HUB_OFFLINE=1 for what was downloaded before"
        raise UsageError(
            f"{error}; use --demo, or local folders with --model and --data_dir{cached}"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None


def check_device(args: argparse.Namespace) -> None:
    """Try what the flags ask of the device. Raises UsageError."""
    trials = {f"--device {args.device}": lambda: torch.zeros(1, device=args.device).cpu()}
    if args.bf16:
        trials["--bf16"] = lambda: bf16_product(args)
    if args.compile:
        trials["--compile"] = lambda: torch.compile(torch.neg)(torch.zeros(1, device=args.device))
    for flag, trial in trials.items():
        try:
            trial()
        except Exception as error:  # every backend that is not there says so in its own way
            why = str(error).strip().splitlines()[0]
            raise UsageError(f"{flag} cannot be used on {args.device}: {why}") from None
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)  # it wants a number
    # TF32, on GPUs that have it: float32 products are several times faster there.
    torch.set_float32_matmul_precision("high" if args.device.startswith("cuda") else "highest")


def bf16_product(args: argparse.Namespace) -> None:
    if args.device.startswith("cuda") and not torch.cuda.is_bf16_supported():
        raise ValueError("this GPU has no bfloat16")
    x = torch.ones(2, 2, device=args.device)
    with backbone_precision(args):
        if (x @ x).dtype != torch.bfloat16:
            raise ValueError("products stay in float32")


def backbone_precision(args: argparse.Namespace) -> torch.autocast:
    """With --bf16, for the length of a block, products in bfloat16; adapters keep to float32."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


def is_finished(folder: Path) -> bool:
    try:
        return "best" in json.loads((folder / "results.json").read_text())
    except (OSError, ValueError, TypeError):  # none, or damaged: what it said can be found again
        return False


def check_free(args: argparse.Namespace) -> None:
    """Raise UsageError if a run in the output folder would be lost, or cannot be gone on with."""
    folder, finished = args.output_dir, is_finished(args.output_dir)
    saved = checkpoints(folder / "checkpoint")
    there = [path for path in (*(folder / name for name in LEFT_BEHIND), *saved) if path.exists()]
    if there and not (args.overwrite or args.resume):
        kind, mend = ("a finished run", "") if finished else ("an unfinished run", "--resume to go on, ")
        mend += "--overwrite or another --output_dir"
        raise UsageError(f"{folder} holds {kind} ({there[0].name}): give {mend}")
    if args.resume and (folder / "config.json").exists() and not (finished or saved):
        raise UsageError(f"{folder} has lost its checkpoint: give --overwrite to start anew")


def recorded_settings(args: argparse.Namespace, **checksums: str) -> dict:
    """The settings as config.json and a checkpoint have them."""
    settings = {name: value for name, value in vars(args).items() if name not in EVAL_ONLY_FLAGS}
    return json.loads(json.dumps(settings | checksums, default=str))


def check_same(settings: dict, config: dict, folder: Path) -> None:
    """Raise UsageError for the first setting that differs from those of the run in the folder."""
    config = {"processes": 1} | config
    for name in sorted(settings, key=lambda name: name in DERIVED):
        now, then = settings[name], config.get(name)
        if name == "device":
            now, then = torch.device(now).type, torch.device(then).type
        if name in UNCOMPARED or name not in config or now == then:
            continue
        if name == "encoder":
            raise UsageError(f"--model {settings['model']} has other weights than the run in {folder} had")
        if name == "data":
            raise UsageError(f"the data are not those that the run in {folder} had: check --data_dir")
        if name == "processes":
            raise UsageError(
                f"this is {now} process(es) of torchrun, the run in {folder} had {then}: do the same"
            )
        if name in ("first_lr", "first_steps"):  # they follow from whether --lr was given
            raise UsageError(f"--lr was {'' if now else 'not '}given to the run in {folder}: do the same")
        now, then = ("not given" if value is None else value for value in (now, then))
        raise UsageError(f"--{name} is {now}, but was {then} for the run in {folder}: do the same")


def read_config(folder: Path) -> dict:
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{folder / 'config.json'} cannot be read: {error}") from None


def take_up(folder: Path, settings: dict) -> dict | None:
    """The checkpoint to go on from, and the files of its step put back; None if no run was begun here.

    Raises UsageError where none is whole, or a setting differs.
    """
    state, damaged = load_checkpoint(folder / "checkpoint")
    names = ", ".join(map(str, damaged))
    if state is None and damaged:
        raise UsageError(f"{names}: damaged, and no earlier checkpoint is there: start anew with --overwrite")
    if state is None:
        return None
    check_same(settings, state["config"], folder)
    if damaged:
        print(f"run_glue.py: {names}: damaged, going on from an earlier checkpoint", file=sys.stderr)
    unpack_files(folder, GROWING, state["files"])
    return state


def begin(args: argparse.Namespace, settings: dict) -> tuple[bool, dict | None]:
    """Whether the run is finished, and else the checkpoint to go on from, if there is one."""
    folder = args.output_dir
    check_free(args)  # once more, alone with it
    if args.resume and is_finished(folder):
        config = read_config(folder)
        check_same(settings, config, folder)
        if not config.get("keep_checkpoint"):  # of a run that was killed between its last two deeds
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        print(f"the run in {folder} is finished")
        return True, None
    return False, take_up(folder, settings) if args.resume else None


def going_on(config: dict, step: int, now: dict) -> dict:
    """The run's config.json with where and with what it goes on; warns if that is not what it had."""
    history = config.get("resumed", [])
    then = history[-1] if history else config
    if other := [name for name in now if now[name] != then.get(name)]:
        warning = f"other {', '.join(other)} than so far: the results may differ by rounding"
        print(f"run_glue.py: going on with {warning}", file=sys.stderr)
    return config | {"resumed": [*history, {"step": step, **now}]}


def watched(trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What has to be finite after an update, by what it is called (a parameter stands in for no gradient)."""
    key, what = ("h", "posterior") if isinstance(optimizer, IVON) else ("exp_avg_sq", "second moment")
    tensors = {}
    for name, p in trained.items():
        if p.numel():
            tensors[f"the gradient of {name}"] = p.detach() if p.grad is None else p.grad
            tensors[f"the {what} of {name}"] = optimizer.state[p].get(key, p.detach())
            tensors[f"the parameter {name}"] = p.detach()
    return tensors


class Update(NamedTuple):
    """What is known of an update before the device is asked: its record, and how large some tensors are."""

    record: dict
    names: list[str]  # of the tensors; the loss is the first
    magnitudes: Tensor  # (n,)


def write_losses(path: Path, pending: list[Update]) -> list[float]:
    """A line for each update: its record, with its loss. Returns the losses.

    Stops and raises NotFinite at the first update in which something is not finite. Of several processes,
    the first writes the mean of their losses.
    """
    magnitudes = processes.average(torch.cat([update.magnitudes for update in pending])).tolist()
    lines, losses, error = [], [], None
    for update in pending:
        own, magnitudes = magnitudes[: len(update.names)], magnitudes[len(update.names) :]
        bad = [name for name, size in zip(update.names, own, strict=True) if not math.isfinite(size)]
        if bad:
            step, lr = update.record["step"], update.record["lr"]
            error = NotFinite(f"{bad[0]} is not finite at step {step} (lr {lr:g})")
            break
        losses.append(own[0])
        lines.append(json.dumps(update.record | {"loss": own[0]}) + "\n")
    with processes.together():
        if processes.rank() == 0:
            append(path, "".join(lines))
    if error:
        raise error
    return losses


@contextmanager
def on_signals(handler: Callable) -> Iterator[None]:
    """For the length of the block SIGINT and SIGTERM call `handler`, if this is the main thread."""
    main_thread = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if main_thread else ()
    before = [signal.signal(which, handler) for which in signals]
    try:
        yield
    finally:
        for which, old in zip(signals, before, strict=True):
            signal.signal(which, old)


def end_at_once(signum: int, _frame: object) -> NoReturn:
    raise Interrupted(signum, "")


@contextmanager
def signals_received() -> Iterator[list[int]]:
    """For the length of the block signals are only noted; but a second Ctrl-C ends the program."""
    received: list[int] = []

    def note(signum: int, frame: object) -> None:
        if received and signum == signal.SIGINT:
            end_at_once(signum, frame)
        received.append(signum)

    with on_signals(note):
        yield received


def run(args: argparse.Namespace) -> None:
    # Load and inject.
    task, folder = task_of(args.task, args.method, args.demo), args.output_dir
    first = processes.rank() == 0  # of several processes; it alone writes
    with processes.together():
        if first:
            check_free(args)
            for name in ("config.json", "adapter/x", "checkpoint/x"):
                check_writable(folder / name, f"--output_dir {folder}")
        check_device(args)
        dataset = load_data(args, ("train", *task.validation))
        tokenizer, model, layers, head, encoder = adapted_model(args, task)
        model.train()
        features, labels = tokenize(dataset["train"], task, tokenizer, args.max_length)
        validation = evaluation_splits(dataset, task.validation, task, tokenizer, args)
        budget = plan(args, task, len(features), len(layers))

    # Optimize: the learning rate is set before each update.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    counted = [p for p in trained.values() if p not in head]
    trainable = sum(p.numel() for p in counted)
    if args.optimizer == "ivon":
        ivon = {name: getattr(args, name) for name in (*IVON_SETTINGS, "beta1", "weight_decay")}
        optimizer = IVON(trained.values(), args.lr, **ivon, sync=processes.count() > 1)
    else:
        optimizer = torch.optim.AdamW(trained.values(), args.lr, weight_decay=args.weight_decay, fused=True)
    allocator = None
    if args.method == "adalora":
        allocator = RankAllocator(layers, budget, args.score, optimizer, track=args.track_scores and first)

    tokens = torch.tensor([token for example in features for token in example["input_ids"]])
    judged = [batch["input_ids"] for split in validation.values() for batch in split.batches]
    judged += [split.labels for split in validation.values()]
    checksums = {"encoder": encoder, "data": checksum([tokens, labels, *judged])}
    start = [*checksums.values(), checksum(trained.values()) if args.processes > 1 else None]
    with processes.together():
        if any(others != start for others in processes.from_all(start)):
            raise UsageError("the processes have not the same weights and data: check --model and --data_dir")
    settings, here = recorded_settings(args, **checksums), provenance(model.device)
    if not first:
        torch.manual_seed(args.seed + processes.rank() * RANK_SEEDS)  # draws and dropout of its own
    with ExitStack() as until_the_end:
        received = until_the_end.enter_context(signals_received())
        with processes.together():
            if first:
                folder.mkdir(parents=True, exist_ok=True)
                until_the_end.enter_context(claimed(folder))

        # Begin, or go on.
        finished, state = processes.from_first(lambda: begin(args, settings))
        if finished:
            return
        progress = {"step": 0, "best": None, "last": None, "seconds": 0.0, "evaluating": 0.0}

        def save_all(files: Iterable[str]) -> None:
            state = {"config": config, "progress": progress, **snapshot(model, optimizer, allocator)}
            with processes.together():
                if first:
                    state["files"] = pack_files(folder, files)
                    save_checkpoint(folder / "checkpoint", progress["step"], state)

        def heard() -> int:
            """The signal that a process has received, or 0."""
            return max(processes.from_all(received[0] if received else 0))

        if state:
            with processes.together(), mendable():
                restore(state, model, optimizer, allocator)
            config, progress = state["config"], state["progress"]
            if first:
                config = going_on(config, progress["step"], here)
                print(f"going on after step {progress['step']} of {args.total_steps}")
        else:
            config = settings | here
            save_all(())  # first: the new run can be gone on with before anything of an old one goes
        with processes.together():
            for name in ("results.json", *LEFT_BEHIND) if first and not state else ():
                (folder / name).unlink(missing_ok=True)
            if first:
                write_json(folder / "config.json", config)

        # Train, and record.
        best, last, evaluating = (progress[name] for name in ("best", "last", "evaluating"))
        started, pending = time.perf_counter() - progress["seconds"], []
        first_phase, draws = (args.first_lr, args.first_steps), args.mc_samples or 1
        forward = torch.compile(model) if args.compile else model
        collate, labels = transformers.DataCollatorWithPadding(tokenizer), labels.to(model.device)
        lengths = torch.tensor([len(example["input_ids"]) for example in features])
        by_length = lengths if args.group_by_length else None
        size = args.batch_size * args.grad_accum * processes.count()
        batches = shuffled_batches(len(features), size, args.seed, by_length)
        batches = islice(batches, progress["step"], None)
        steps = range(progress["step"] + 1, args.total_steps + 1)
        shown = {"initial": progress["step"], "unit": "step", "mininterval": 1, "disable": not first}
        bar = tqdm(steps, args.task, args.total_steps, **shown)
        for t in bar:
            # One update: a number of draws, each over the same grad_accum micro-batches.
            lr = learning_rate(t - 1, args.total_steps, args.lr, args.warmup_steps, *first_phase)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = next(batches)
            batch = batch[lengths[batch].argsort()]  # micro-batches of like length need less padding
            own = processes.shared(batch)
            loss = torch.zeros((), device=model.device)
            for _ in range(draws):
                with optimizer.sampled_params(train=True) if args.optimizer == "ivon" else nullcontext():
                    for micro in own.split(args.batch_size) if len(own) else ():
                        inputs = collate([features[i] for i in micro]).to(model.device)
                        share = len(micro) * processes.count() / len(batch)
                        with backbone_precision(args):
                            logits = forward(**inputs).logits.float()
                        micro_loss = task_loss(logits, labels[micro]) * share
                        micro_loss.backward()
                        loss += micro_loss.detach() / draws
                    if args.orth:
                        add_penalty_gradients(layers, args.orth, squared=args.squared_orth)
            if args.optimizer != "ivon":  # which does so with its curvature, too
                processes.average_gradients(trained.values())
            optimizer.step()
            if allocator:
                allocator.step(t)
            finite = watched(trained, optimizer)  # looked at together with the loss, so that nothing waits
            magnitudes = torch.stack([loss, *torch._foreach_norm(list(finite.values()), math.inf)])
            record = {"step": t, "loss": None, "lr": lr, "budget": budget(t)}
            pending.append(Update(record, ["the loss", *finite], magnitudes))
            optimizer.zero_grad()

            final = t == args.total_steps
            at_evaluation = final or t % args.eval_every == 0
            at_checkpoint = t % args.checkpoint_every == 0 if args.checkpoint_every else at_evaluation
            listening = processes.count() == 1 or t % LISTEN_EVERY == 0
            stopping = heard() if listening else 0  # all processes stop at the same step
            if at_evaluation or at_checkpoint or stopping or len(pending) == FLUSH_EVERY:
                losses = write_losses(folder / "metrics.jsonl", pending)
                so_far = best and f"{best[task.metric]:.4f}"
                bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", best=so_far)
                pending = []
                if args.track_scores:
                    record_agreement(folder / "score_agreement.jsonl", allocator)
            if at_evaluation:
                began = time.perf_counter()
                last = {"step": t}
                sigma = sigmas_by_name(model, optimizer)
                try:
                    with backbone_precision(args):
                        evaluated = evaluate(model, validation, args, sigma)
                except FloatingPointError as error:
                    raise NotFinite(f"{error} at step {t} (lr {lr:g})") from None
                lines = [json.dumps({"step": t, "split": name, **found}) for name, found in evaluated.items()]
                for split, scores in evaluated.items():
                    ending = "" if split == task.validation[0] else "_" + split.removeprefix("validation_")
                    last |= {metric + ending: score for metric, score in scores.items()}
                better = best is None or last[task.metric] > best[task.metric]
                best = last if better else best
                with processes.together():
                    if first:
                        append(folder / "metrics.jsonl", "\n".join([*lines, ""]))
                    if first and better:
                        save_adapter(folder / "adapter", model, layers, sigma)
                evaluating += time.perf_counter() - began
            seconds = time.perf_counter() - started
            progress = {"step": t, "best": best, "last": last, "seconds": seconds, "evaluating": evaluating}
            if at_evaluation:
                stopping = heard()  # it may have come meanwhile
            if args.keep_checkpoint if final else at_checkpoint or stopping:
                save_all(GROWING)
            if stopping and not final:
                where = f"after step {t}; --resume goes on from there"
                raise Interrupted(stopping, where) if first else processes.Elsewhere

        if not first:
            return
        ranks = allocator.ranks() if allocator else dict.fromkeys(layers, args.init_rank)
        same = ("task", "method", "optimizer", "score", "seed", "demo")
        results = {
            **{name: settings[name] for name in same},
            "metric": task.metric,
            "best": progress["best"],
            "last": progress["last"],
            "ranks": ranks,
            "budget": {"b0": budget.initial, "bT": budget.target, "kept": sum(ranks.values())},
            "trainable_parameters": trainable,
            "kept_parameters": sum(p.numel() for p in counted),
            "seconds": progress["seconds"],
            "steps_per_second": args.total_steps / (progress["seconds"] - progress["evaluating"]),
            "peak_memory_mb": peak_memory_mb(model.device),
        }
        write_json(folder / "results.json", results)
        if not args.keep_checkpoint:
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    score, at = f"best {task.metric} {best[task.metric]:.4f} at step {best['step']}", last[task.metric]
    print(f"{score}, last {at:.4f}")
    if allocator:
        print(f"kept {budget.target} of {budget.initial} triplets; rank of each adapter:\n{rank_grid(ranks)}")
    print(f"results in {folder}")


# ---- a finished run ------------------------------------------------------------------------------------


def run_settings(run: Path, given: Mapping[str, object]) -> argparse.Namespace:
    """The settings of a finished run, but for what was given instead. Raises UsageError."""
    path = run / "config.json"
    try:
        config = json.loads(path.read_text())
        names = "task method optimizer score target_rank init_rank targets alpha max_length".split()
        flags = {name: config[name] for name in names if name not in OTHER_FLAGS[config["method"]]}
        flags |= {name: config[name] for name in ("model", "data_dir", "seed", "eval_batch_size")}
        flags["bf16"] = config.get("bf16", False)
        if config["demo"]:
            flags |= {"model": HERE / "demo/model", "data_dir": HERE / "demo"}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{run} is not a run: {path} cannot be used ({error!r})") from None
    if not (run / "results.json").exists():
        raise UsageError(f"{run} is not finished, it has no results.json")
    argv = []
    for name, value in (flags | given).items():
        if value is True:
            argv.append(f"--{name}")
        elif value is not None and value is not False:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    settings = parse_args(argv)
    settings.encoder = config.get("encoder")
    return settings


def load_run(
    run: Path, settings: argparse.Namespace
) -> tuple[transformers.PreTrainedTokenizerBase, transformers.PreTrainedModel, dict, dict[str, Tensor]]:
    """Tokenizer, model with a finished run's best adapter, its layers, and σ by name or {}."""
    tokenizer, model, layers, _, encoder = adapted_model(settings, TASKS[settings.task])
    if settings.encoder not in (None, encoder):
        raise UsageError(f"--model {settings.model} has other weights than the encoder of {run}")
    with mendable():
        return tokenizer, model, layers, load_adapter(run / "adapter", model, layers)


def evaluate_run(args: argparse.Namespace) -> None:
    """Evaluate a finished run's best adapter at its mean and, with --eval_samples, from its posterior."""
    given = {name: getattr(args, name) for name in EVAL_FLAGS if getattr(args, name) is not None}
    settings, folder = run_settings(args.eval_only, given), args.output_dir or args.eval_only
    task = TASKS[settings.task]
    tests = [split for split in task.splits if split.startswith("test")]
    names = tests[:1] if args.predict else list(task.validation)
    names = names if args.split is None else [args.split]
    if names[0] not in task.splits:
        raise UsageError(f"--split {names[0]}: {settings.task} has {', '.join(task.splits)}")
    if args.eval_samples and not (args.eval_only / "adapter/posterior.safetensors").exists():
        raise UsageError(
            f"--eval_samples needs a posterior, and {args.eval_only} has none: IVON's runs have one"
        )
    if args.probabilities and not task.labels:
        raise UsageError(f"--probabilities: {settings.task} has no classes")
    if folder.resolve() != args.eval_only.resolve() and (folder / "config.json").exists():
        raise UsageError(f"--output_dir {folder} is another run's: give a folder of its own")
    if args.predict and not args.predict.absolute().parent.is_dir():
        raise UsageError(f"--predict {args.predict}: there is no folder {args.predict.parent}")
    for path in [args.predict] if args.predict else [folder / name for name in EVALUATION]:
        check_writable(path, path)

    check_device(settings)
    dataset = load_data(settings, names)
    tokenizer, model, _, sigma = load_run(args.eval_only, settings)
    splits = evaluation_splits(dataset, names, task, tokenizer, settings)
    draws = [(args.eval_samples, tau) for tau in args.temperature] if args.eval_samples else []

    def predictions_of(split: Split, samples: int, tau: float) -> Tensor:
        try:
            with backbone_precision(settings):
                if samples:
                    return predict_from_posterior(model, split, sigma, samples, tau, settings.seed)
                return predict(model, split)
        except FloatingPointError as error:
            raise UsageError(f"{error} ({f'--temperature {tau:g}' if samples else 'at the mean'})") from None

    if args.predict:
        predictions = predictions_of(splits[names[0]], *(draws or [(0, 0.0)])[0])
        columns = task.labels if args.probabilities else ()
        index = dataset[names[0]]["idx"]
        write_submission(args.predict.resolve(), index, predictions, task.file_labels, columns)
        print(f"predictions of {len(predictions)} examples in {args.predict}")
        return
    where = {
        "model": settings.model,
        "data_dir": settings.data_dir and str(settings.data_dir),
        "seed": settings.seed,
    }
    rows, saved = [], {}
    for name, split in splits.items():
        if (split.labels < 0).any():
            raise UsageError(f"--split {name} has no labels; --predict FILE writes its predictions")
        saved[f"{name}.labels"] = split.labels
        for samples, tau in [(0, 0.0), *draws]:
            began = time.perf_counter()
            predictions = predictions_of(split, samples, tau)
            seconds = time.perf_counter() - began
            judged = judge_probabilities(settings.task, predictions, split.labels)
            how = f"tau={tau:g}" if samples else "mean"
            saved[f"{name}.{how}"] = predictions
            row = {"split": name, "samples": samples, "temperature": tau, **judged, "seconds": seconds}
            rows.append(row | where)
            numbers = "  ".join(f"{metric} {value:.4f}" for metric, value in judged.items())
            print(f"{name} {how}:  {numbers}  ({seconds:.2f} s)", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder):
        record_evaluation(folder, rows, saved)


def check_writable(path: Path, what: object) -> None:
    """Raise UsageError, of `what`, unless a file can be written at the path, or its folder be made."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)) or (path.exists() and not path.is_file()):
        raise UsageError(f"{what} cannot be written")


def record_evaluation(folder: Path, rows: list[dict], predictions: dict[str, Tensor]) -> None:
    """evaluation.json and predictions.safetensors; what they hold of other splits stays."""
    evaluation, tensors = (folder / name for name in EVALUATION)
    now = {row["split"] for row in rows}
    try:
        before = json.loads(evaluation.read_text())["evaluations"]
        others = [row for row in before if row["split"] not in now]
        old = {name: t for name, t in read_tensors(tensors)[0].items() if name.split(".")[0] not in now}
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: nothing to keep
        others, old = [], {}
    rows, predictions = others + rows, old | predictions
    write_tensors(tensors, predictions, {"evaluations": json.dumps(rows)})  # so that they can be told apart
    write_json(evaluation, {"evaluations": rows})


def main(argv: list[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with on_signals(end_at_once):
            with processes.alike():
                args = parse_args(argv)
            if args.eval_only:
                evaluate_run(args)
            else:
                with processes.joined(args.device):
                    run(args)
    except processes.Elsewhere:  # that process's status is the run's
        return 0
    except UsageError as error:
        # One line, whatever a library says.
        print("run_glue.py: error:", *str(error).split(), file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        mend = "a smaller --batch_size and as much more --grad_accum, or a smaller --eval_batch_size"
        where = f" in process {processes.rank()}" if processes.count() > 1 else ""
        print(f"run_glue.py: error: out of memory{where}: give {mend}", file=sys.stderr)
        return 2
    except NotFinite as error:  # in all processes
        if processes.rank():
            return 0
        kept = next(iter(checkpoints(args.output_dir / "checkpoint").values()), "no")
        mend = f"the checkpoint of step {kept} is kept; a smaller --lr, with --overwrite, may help"
        print(f"run_glue.py: stopped: {error}; {mend}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"run_glue.py: error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if processes.count() == 1 or not processes.is_of_another(error):
            raise
        print(f"run_glue.py: process {processes.rank()} ends: another one has gone", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        signum, where = interruption.args
        if processes.rank() == 0:
            print(f"run_glue.py: {signal.Signals(signum).name} {where}".rstrip(), file=sys.stderr)
        return 128 + signum
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every setting of a run, once: the command line, config.json, what --resume compares and the table's rows.

    settings = Settings.from_command_line(argv, description)      # what the command line alone decides
    settings = settings.resolve(len(train), default_targets)      # what depends on data and model, once

A setting is a field of `Settings`. Its role says what it is for, its parser what values it can have.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch

from harness import choice, glue, own_data, processes
from harness.task import EndsRun, Task, UsageError, hold_out
from scores import SCORES

OPTIMIZERS = {"adamw": False, "ivon": True}  # by name, whether it has a posterior
TASKS: dict[str, Task] = {**glue.TASKS, **choice.TASKS}
DEMOS = {"cola": glue.DEMO, "boolq": choice.DEMO}
METHODS = ("adalora", "lora", "full")
DEFAULTS = {"batch_size": 32, "eval_batch_size": 128, "eval_samples": 0, "target_rank": 2.0, "dropout": 0.0}

# Roles. All but the last have to be the same in a run that is resumed.
IDENTITY = "identity"  # decides the result: a row of the table
SHAPE = "shape"  # the run's length, batches and measure: in the table's caption
NUMERICS = "numerics"  # decides rounding, or what is recorded: not in the table
NOTHING = "nothing"  # has no influence (folders: weights and data are known by their checksums)


@dataclass(frozen=True)
class Number:
    """A range, and the parser of a flag that has it."""

    least: float
    most: float = 1e15  # so that a product of two is within float32
    kind: type = float

    def __call__(self, text: str) -> float:
        if (value := self.kind(text)) not in self:
            raise argparse.ArgumentTypeError(f"{text} is not from {self.least:g} to {self.most:g}")
        return value

    def __contains__(self, value: Any) -> bool:
        return type(value) in (int, self.kind) and self.least <= value <= self.most

    @property
    def __name__(self) -> str:  # in argparse's message
        return "whole number" if self.kind is int else "number"


def whole(least: int, most: int = 10**9) -> Number:
    return Number(least, most, int)


def path(text: str) -> Path:
    """The parser of a path: an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def setting(group: str | None, default: Any, role: str, parse=None, about="", only=(), **options):
    """A field. `only`: the methods or optimizers that have it; `options`: argparse's; no group: no flag."""
    return field(default=default, metadata=locals())


positive, from_0, any_ess = Number(1e-15), Number(0), Number(1e-15, 1e30)
count, few, any_seed = whole(1), partial(whole, most=10**4), whole(0, 2**63 - 1)
run, ivon = partial(setting, "the run"), partial(setting, "IVON", only=("ivon",))
OWN = "data of your own"
own = partial(setting, OWN)
adapters = partial(setting, "adapters", only=("adalora", "lora"))
adalora, evaluation = partial(setting, "AdaLoRA", only=("adalora",)), partial(setting, "evaluation")
machine, derived = partial(setting, "device and files"), partial(setting, None)
SCORE_HELP = "; ".join(f"{name}: {score.about}" for name, score in SCORES.items())
TARGETS_HELP = "module-name suffixes to adapt (the architecture's own)"
PROMPT_HELP = "for a causal language model: 'is it good {sentence1} Answer:'"
CHOICES_HELP = "the answers, one for each label, in their order (the labels' names)"
COLUMNS_HELP = "one or two of text, then the label (sentence1 [sentence2] label; text label)"
METRIC_HELP = "that decides (accuracy; pearson_spearman, the mean of both)"
BASE_DTYPES = ("float32", "bfloat16", "int8")
BASE_HELP = "of a causal language model's frozen weights"
YES_OR_NO = argparse.BooleanOptionalAction
FOLDER = "(runs/<task>-<method>-<optimizer>-<score>-r<target>-s<seed>)"


@dataclass(frozen=True)
class Settings:
    """None stands for what is not given, or what the method or optimizer does not have."""

    # fmt: off
    task: str | None = run(None, IDENTITY, None, "required without --demo, --train_file", choices=list(TASKS))
    method: str = run("adalora", IDENTITY, None, "full: no adapters", choices=METHODS)
    optimizer: str = run("ivon", IDENTITY, choices=list(OPTIMIZERS))
    model: str | None = run(None, NOTHING, None, "a Hub name or a local checkpoint folder (the papers')")
    data_dir: Path | None = run(None, NOTHING, path, "folder with the data sets' own files (the Hub's copy)")
    holdout: float = run(0.0, SHAPE, Number(0, 0.9), "share of train to hold out, and to evaluate on")
    holdout_seed: int = run(0, SHAPE, any_seed, "seed of that split")
    demo: bool = run(False, IDENTITY, None, "the bundled model and data: no download")
    seed: int = run(2021, IDENTITY, any_seed, "of everything random")
    epochs: float | None = run(None, NOTHING, positive, "set by the task, like every flag without a default")
    max_steps: int | None = run(None, NOTHING, count, "updates in all, instead of epochs")
    processes: int = derived(1, SHAPE)
    train_size: int | None = derived(None, SHAPE)
    total_steps: int | None = derived(None, SHAPE)
    batch_size: int | None = run(None, SHAPE, count, "examples in a forward pass")
    grad_accum: int = run(1, SHAPE, count, "forward passes in an update")
    group_by_length: bool = run(False, SHAPE, None, "batches of examples of similar length: less padding")
    max_length: int | None = run(None, SHAPE, whole(4), "tokens")
    rescale_lr: bool | None = ivon(None, IDENTITY, None, "α is lr·(h0 + δ), else lr", action=YES_OR_NO)
    lr: float | None = run(None, IDENTITY, positive, "peak: one warm-up, one linear decay")
    weight_decay: float | None = run(None, IDENTITY, from_0, "of AdamW, or IVON's δ")
    mc_samples: int | None = ivon(None, IDENTITY, few(1), "draws in an update (1)")
    ess: float | None = ivon(None, IDENTITY, any_ess, "effective sample size (training examples; LoRA 1e8)")
    hess_init: float | None = ivon(None, IDENTITY, positive, "h0 (1; LoRA 1e-4)")
    beta2: float | None = ivon(None, IDENTITY, Number(0, 1), "(0.99999; LoRA 0.999; at 1, h stays h0)")
    clip_radius: float | None = ivon(None, IDENTITY, positive, "ξ (0.001)")
    target_rank: float | None = adapters(None, IDENTITY, from_0, "average rank kept; may be fractional")
    targets: list[str] | None = adapters(None, IDENTITY, None, TARGETS_HELP, nargs="+", metavar="NAME")
    alpha: float | None = adapters(None, IDENTITY, positive, "scale: alpha / rank at the start")
    dropout: float | None = adapters(None, IDENTITY, Number(0, 0.999), "of the adapters' input")
    score: str | None = adalora(None, IDENTITY, None, f"{SCORE_HELP} (mu)", choices=list(SCORES))
    init_rank: int | None = adalora(None, IDENTITY, whole(0), "rank at the start (1.5 × target, rounded)")
    orth: float | None = adalora(None, IDENTITY, from_0, "γ, weight of the orthogonality penalty")
    squared_orth: bool = adalora(False, IDENTITY, None, "the penalty as the paper has it, a sum of squares")
    tinit: int | None = adalora(None, IDENTITY, whole(0), "t_i, updates before pruning starts")
    tfinal: int | None = adalora(None, IDENTITY, whole(0), "t_f, updates with the final pattern")
    delta_t: int | None = adalora(None, IDENTITY, count, "ΔT, updates between two allocations")
    track_scores: bool = adalora(False, NUMERICS, None, "record how far the scores agree, at each allocation")
    eval_every: int | None = evaluation(None, SHAPE, count, "updates between two evaluations")
    eval_batch_size: int | None = evaluation(None, NUMERICS, count, "examples in a forward pass")
    eval_samples: int | None = evaluation(None, NUMERICS, few(0), "draws to average over (0: none)")
    temperature: float | None = evaluation(None, NUMERICS, from_0, "τ: draw with variance τσ² (1)")
    train_file: Path | None = own(None, NOTHING, path, "instead of --task: .csv, .tsv, .json(l), .parquet")
    validation_file: Path | None = own(None, NOTHING, path, "or --holdout")
    test_file: Path | None = own(None, NOTHING, path, "for tools.evaluate --predict")
    columns: list[str] | None = own(None, NUMERICS, None, COLUMNS_HELP, nargs="+", metavar="NAME")
    prompt: str | None = own(None, IDENTITY, None, PROMPT_HELP)
    choices: list[str] | None = own(None, IDENTITY, None, CHOICES_HELP, nargs="+", metavar="WORD")
    regression: bool = own(False, NUMERICS, None, "treat labels as numbers, even if all are whole")
    metric: str | None = own(None, SHAPE, None, METRIC_HELP, choices=sum(own_data.METRICS.values(), ()))
    name: str | None = own(None, NOTHING, None, "of the task and its output folder (the training file's)")
    device: str | None = machine(None, NUMERICS, None, "cpu, cuda, cuda:1, mps, … (cuda if there is one)")
    bf16: bool = machine(False, NUMERICS, None, "the frozen backbone's products in bfloat16")
    base_dtype: str = machine("float32", IDENTITY, None, BASE_HELP, choices=BASE_DTYPES)
    checkpointing: bool = machine(False, NUMERICS, None, "recompute activations: less memory, more time")
    compile: bool = machine(False, NUMERICS, None, "train with torch.compile")
    plain: bool = machine(False, NUMERICS, None, "adapters and penalty without fused.py")
    output_dir: Path | None = machine(None, NOTHING, path, FOLDER)
    overwrite: bool = machine(False, NOTHING, None, "replace the run in the output folder")
    resume: bool = machine(False, NOTHING, None, "continue the run in the output folder, if there is one")
    checkpoint_every: int | None = machine(None, NOTHING, count, "updates between checkpoints (eval_every)")
    # These follow from the others.
    warmup_steps: int | None = derived(None, IDENTITY)
    first_lr: float | None = derived(None, IDENTITY)
    first_steps: int | None = derived(None, IDENTITY)
    labels: list[str] | None = derived(None, NUMERICS)
    causal: bool = derived(False, NUMERICS)  # a causal language model, which answers by choosing
    # fmt: on

    @classmethod
    def from_command_line(cls, argv: list[str] | None, description: str) -> "Settings":
        """Raises UsageError for settings out of range, or that do not go together."""
        parser, flags = Parser(description), [f for f in fields(cls) if f.metadata["group"]]
        names = dict.fromkeys(f.metadata["group"] for f in flags)
        groups = {name: parser.add_argument_group(name) for name in names}
        for f in flags:
            how = {"type": f.metadata["parse"]} if f.metadata["parse"] else {}
            how = {"action": "store_true"} if f.default is False else how | f.metadata["options"]
            about = f.metadata["about"] + (f" ({f.default})" if f.default else "")
            groups[f.metadata["group"]].add_argument(f"--{f.name}", default=f.default, help=about, **how)
        return cls(**vars(parser.parse_args(argv))).completed()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Settings from a run's config.json; other keys are ignored."""
        values = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        paths = [f.name for f in fields(cls) if Path in get_args(f.type)]
        return cls(**values | {name: Path(values[name]) for name in paths if values.get(name)})

    def completed(self) -> "Settings":
        """Fill in what does not depend on the data. Raises UsageError for settings that conflict."""
        s = self
        if s.demo:
            if s.task not in (None, *DEMOS) or s.model or s.data_dir:
                has = f"--demo takes --task {' or '.join(DEMOS)}, and has models and data of its own"
                raise UsageError(f"{has}: leave out --model and --data_dir, or --demo")
            s = replace(s, task=s.task or "cola", data_dir=glue.DEMO_FOLDER)
        s = s._with_own_data() if s.train_file else s
        for f in fields(s):
            if not s.train_file and f.metadata["group"] == OWN and getattr(s, f.name):
                raise UsageError(f"--{f.name} is for data of your own: give --train_file, or leave it out")
        if s.task is None:
            raise UsageError(f"--task is missing: one of {', '.join(TASKS)} (or --demo, or --train_file)")
        values = s.values()
        s = replace(s, **{name: values[name] for name in ("batch_size", "eval_batch_size", "eval_samples")})
        if s.resume and s.overwrite:
            raise UsageError("--resume continues a run, --overwrite replaces it: leave one out")
        for f in fields(s):
            only, value = f.metadata["only"], getattr(s, f.name)
            given = value is not None and (value is not False or f.default is None)  # 0 is given
            if given and only and not {s.method, s.optimizer}.intersection(only):
                kind = "method" if only[0] in METHODS else "optimizer"
                raise UsageError(f"--{kind} {getattr(s, kind)} has no --{f.name}: leave it out")
        if s.temperature is not None and not s.eval_samples:
            raise UsageError("--temperature is for posterior draws: give --eval_samples N, or leave it out")
        if s.eval_samples and not OPTIMIZERS[s.optimizer]:
            raise UsageError("--eval_samples needs a posterior: use --optimizer ivon, or leave it out")
        device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if processes.count() > 1:
            if device not in ("cpu", "cuda"):
                raise UsageError(f"--device {device}: with torchrun it is cuda, a GPU a process, or cpu")
            device = f"cuda:{processes.local_rank()}" if device == "cuda" else device
        s = replace(s.with_ranks(), device=device, processes=processes.count())
        s = replace(s, model=task_of(s).model if s.model is None else s.model)
        s = replace(s, temperature=1.0 if s.temperature is None else s.temperature)
        if s.max_steps or s.data_dir is None or s.demo:
            s.resolve(task_of(s).train_size)  # the run's length is known: so is whether it can be
        rank = None if s.target_rank is None else f"r{s.target_rank:g}"
        name = f"demo-{s.task}".removesuffix("-cola") if s.demo else s.task
        parts = (name, s.method, s.optimizer, s.score, rank, f"s{s.seed}")
        return replace(s, output_dir=s.output_dir or Path("runs") / "-".join(part for part in parts if part))

    def _with_own_data(self) -> "Settings":
        """Fill in what the training file says: columns, labels, metric, size. Raises UsageError."""
        s = self
        if s.task or s.demo or s.data_dir:
            raise UsageError("--train_file is instead of --task, --demo and --data_dir: leave these out")
        if not s.validation_file and not s.holdout:
            raise UsageError("--validation_file is missing: give one, or --holdout 0.1 for a share of train")
        name = s.train_file.stem if s.name is None else s.name
        taken = {"demo", *TASKS, *(task.folder.lower() for task in TASKS.values())}
        if name.lower() in taken or not re.fullmatch(r"[\w.-]+", name):
            wanted = "letters, digits, '.', '-' or '_', and no task's name"
            raise UsageError(f"the task cannot be called {name!r}: give --name with {wanted}")
        if s.columns and not 2 <= len(set(s.columns)) == len(s.columns) <= 3:
            raise UsageError(f"--columns {' '.join(s.columns)}: give one or two of text, then the label")
        for file in filter(None, (s.train_file, s.validation_file, s.test_file)):
            own_data.check_file(file)
        columns, labels, size = own_data.describe(s.train_file, s.columns, s.regression)
        metrics = own_data.METRICS["classes" if labels else "numbers"]
        metric = s.metric or metrics[0]
        if metric not in metrics:
            raise UsageError(f"--metric {metric}: with these labels it is {' or '.join(metrics)}")
        own_data.check_prompt(s.prompt, s.choices, columns, labels)
        found = {"task": name, "name": name, "columns": columns, "labels": labels, "metric": metric}
        return replace(s, **found, regression=not labels, train_size=size)

    def values(self) -> dict[str, Any]:
        """The task's published settings, replaced by those that are given."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {**DEFAULTS, **task_of(self).settings(self.method, self.optimizer), **given}

    def with_ranks(self) -> "Settings":
        if self.method == "full":
            return self
        values = self.values()
        ranks = {name: values[name] for name in ("target_rank", "dropout")}
        target = ranks["target_rank"]
        if self.method == "lora":
            if target < 1 or target % 1:
                raise UsageError(f"--target_rank {target:g}: with --method lora it is a whole number from 1")
            return replace(self, **ranks, init_rank=int(target))
        score, initial = self.score or "mu", self.init_rank
        if SCORES[score].needs == "sigma" and not OPTIMIZERS[self.optimizer]:
            raise UsageError(f"--score {score} needs σ, a posterior: use --optimizer ivon, or another score")
        if initial is None:
            initial = max(math.floor(1.5 * target + 0.5), math.ceil(target))
        if target > initial:
            raise UsageError(f"--target_rank {target:g} is above --init_rank {initial}, the start")
        return replace(self, **ranks, score=score, init_rank=initial)

    def resolve(
        self, train_size: int, default_targets: list[str] | None = None, causal: bool = False
    ) -> "Settings":
        """Fill in what depends on the data and the model.

        A run that is longer or shorter than the published one has its t_i, t_f, ΔT and the phases of its
        learning rate scaled with it, unless they were given. Raises UsageError for a schedule that cannot be.
        """
        values = self.values()
        per_epoch = math.ceil(train_size / (values["batch_size"] * self.grad_accum * self.processes))
        T = values.get("max_steps") if self.epochs is None or self.max_steps else None
        T = T or math.ceil(values["epochs"] * per_epoch)
        if T not in count:
            raise UsageError(f"--epochs {values['epochs']:g} makes {T} updates; at most {count.most} can be")
        for name in ("warmup_steps", "first_steps", "tinit", "tfinal", "delta_t"):
            if getattr(self, name) is None:
                values[name] = values[name] * T // values["total_steps"]
        values |= {"train_size": train_size, "total_steps": T, "epochs": T / per_epoch, "causal": causal}
        values["delta_t"] = max(1, values["delta_t"])
        if self.optimizer == "ivon":
            values.setdefault("ess", float(train_size))
            values.setdefault("rescale_lr", True)
            if self.lr is not None:
                values |= {"first_lr": 0.0, "first_steps": 0}
            elif values["lr"] is None:
                unit = values["hess_init"] + values["weight_decay"] if values["rescale_lr"] else 1
                values["lr"] = float(f"{values['largest_step'] / (unit * values['clip_radius']):.3g}")
        values.setdefault("mc_samples", 1)
        values.setdefault("targets", default_targets)
        if self.method != "adalora":
            values |= dict.fromkeys(("orth", "tinit", "tfinal", "delta_t"))
        elif values["tinit"] + values["tfinal"] >= T:
            phases = f"t_i + t_f = {values['tinit']} + {values['tfinal']}"
            raise UsageError(f"{phases} leaves no step to prune in: the run has {T} (--tinit, --tfinal)")
        if self.method == "full":
            values |= dict.fromkeys(("alpha", "targets", "target_rank", "dropout"))
        return replace(self, **{f.name: values.get(f.name) for f in fields(self)})


def task_of(settings: Settings) -> Task:
    s = settings
    if s.train_file:
        files = {"train": s.train_file, "validation": s.validation_file, "test": s.test_file}
        about = s.columns, s.labels, s.metric, s.train_size, s.prompt, s.choices
        task = own_data.own_task(s.task, files, *about)
    else:
        task = DEMOS[s.task] if s.demo else TASKS[s.task]
    return hold_out(task, s.holdout, s.holdout_seed) if s.holdout else task


def learning_rate(t: int, settings: Settings) -> float:
    """The learning rate of update t, counted from 1.

    Up from 0 over the warm-up, then linearly down to 0. With a first phase (IVON): up to `first_lr`, which is
    held until `first_steps` updates are done, and down from `lr` there.
    """
    s, done = settings, t - 1
    if done < s.warmup_steps:
        return (s.first_lr if s.first_steps else s.lr) * done / s.warmup_steps
    if done < s.first_steps:
        return s.first_lr
    start = max(s.warmup_steps, s.first_steps)
    return s.lr * (s.total_steps - done) / (s.total_steps - start)


def check_device(device: str) -> None:
    """Try it, and make it the current one. Raises UsageError."""
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # every missing backend reports that in its own way
        why = str(error).strip().splitlines()[0]
        raise UsageError(f"--device {device} cannot be used: {why}") from None
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # it wants a number
    # TF32, on GPUs that have it: float32 products are several times faster there.
    torch.set_float32_matmul_precision("high" if device.startswith("cuda") else "highest")


class Parser(argparse.ArgumentParser):
    """Raises UsageError; shows the description as it is; takes no abbreviations."""

    def __init__(self, description: str | None = None, **options: Any):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def exit_status(main: Callable[[], None], program: str) -> int:
    """Run `main`; what the user can correct is one line on stderr. Returns the exit status."""
    try:
        main()
    except EndsRun as error:
        message, status = str(error), error.status
    except torch.OutOfMemoryError:
        smaller = "a smaller --batch_size and more --grad_accum, or a smaller --eval_batch_size"
        message, status = f"out of memory: give {smaller}", 2
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        status = 2
    except RuntimeError as error:
        if not processes.another_has_ended(error):
            raise
        return 1  # that one says why
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    else:
        return 0
    kind = "error: " if status == 2 else ""
    line = " ".join(message.split())[:2000]  # one, whatever a library says
    sys.stderr.write(f"{program}: {kind}{line}\n")
    return status

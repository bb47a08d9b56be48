"""What a run has on disk: settings, records, best adapter, checkpoints; and resuming from them.

    check_free(settings)                                   # before anything is loaded
    with Run(settings, model, objects, evaluate, checksums) as run:
        for t in run.updates():
            ...
            run.after_update(t, loss, lr, budget)          # record, evaluate, checkpoint, stop
        run.finish(...)

A checkpoint is one file, `step-200-1c291ca3.pt`: its step and the CRC-32 of its bytes. It is written beside
and renamed into place, and the one before it is kept. So a process may be killed at any moment, and one file
be damaged, without the run being lost.
"""

import contextlib
import io
import itertools
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from harness import processes
from harness.files import (
    append,
    check_writable,
    checksum,
    cut_records,
    locked,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_whole,
)
from harness.metrics import score_agreement
from harness.settings import NOTHING, Settings, task_of
from harness.task import EndsRun, UsageError

HERE = Path(__file__).resolve().parent.parent
CHECKPOINT = re.compile(r"step-(\d+)-([0-9a-f]{8})\.pt")
RECORDS = ("metrics.jsonl", "score_agreement.jsonl")
ADAPTER, POSTERIOR = "adapter/adapter.safetensors", "adapter/posterior.safetensors"  # with the head; its σ
EVALUATION = ("evaluation.json", "predictions.safetensors")
FLUSH_EVERY = 50  # updates between two looks at the losses, each of which waits for the device
RANK_SEEDS = 1_000_003  # between the seeds of two processes


class NotFinite(EndsRun):
    """Training has broken down."""

    status = 3


class Interrupted(EndsRun):
    """SIGINT or SIGTERM, after the checkpoint is written."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name} after step {step}; --resume continues from there")
        self.status = 128 + signum


class Run:
    """A training run in its folder.

    Args:
        objects: what has a state besides the model, by name: `state_dict()` and `load_state_dict()`.
        evaluate: () → metrics by split, and σ by parameter name ({} without a posterior).
        checksums: of what a resumed run must share besides its settings, by name.
    """

    def __init__(
        self, settings: Settings, model: nn.Module, objects: Mapping, evaluate: Callable, checksums: Mapping
    ):
        self.settings, self.model, self.objects, self.evaluate = settings, model, objects, evaluate
        self.folder, self.task, self.first = settings.output_dir, task_of(settings), processes.rank() == 0
        self.config = json.loads(json.dumps({**vars(settings), **checksums}, default=str))
        self.progress = {"step": 0, "best": None, "last": None, "seconds": 0.0, "evaluating": 0.0}
        self.pending: list[tuple[dict, Tensor]] = []  # records and losses not written yet
        self.signal: int | None = None

    def __enter__(self) -> "Run":
        """Lock the folder; begin, or resume. Raises UsageError."""
        with contextlib.ExitStack() as stack:
            if self.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder))
            check_free(self.settings)  # once more, alone with it
            here = provenance(self.model.device)
            self.finished, state = self.settings.resume and is_finished(self.folder), None
            config = self.folder / "config.json"  # checkpoints are of no use without it
            if self.settings.resume and (config.exists() or checkpoints(self.folder / "checkpoint")):
                before = read_json(config)
                check_same(self.config, before, self.folder)
                state = None if self.finished else load_checkpoint(self.folder / "checkpoint")
                self.config = before if state or self.finished else self.config
            if processes.rank():  # draws and dropout of its own
                torch.manual_seed(self.settings.seed + processes.rank() * RANK_SEEDS)
            if state:
                self._restore(state, here)
            else:
                self.config |= here
            processes.wait_for_all()  # the others have read the folder
            if self.first and self.finished:  # it may have been killed just before this
                shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
            elif self.first:
                self._write_start(anew=state is None)
            if processes.count() == 1:
                stack.enter_context(self._noting_signals())
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def updates(self) -> Iterator[int]:
        """The updates that are left, counted from 1, with a progress bar."""
        T, done = self.settings.total_steps, self.progress["step"]
        self.began = time.perf_counter() - self.progress["seconds"]
        how = {"initial": done, "total": T, "unit": "step", "mininterval": 1, "disable": not self.first}
        self.bar = tqdm(range(done + 1, T + 1), self.settings.task, **how)
        yield from self.bar

    def after_update(self, t: int, loss: Tensor, lr: float, budget: int, tracked: dict | None = None) -> None:
        """Record the update; evaluate and write a checkpoint when it is time; stop when a signal has come.

        `tracked` is what --track_scores records of an allocation: step, budget, sigma_cv, scores by name.
        Raises NotFinite, Interrupted.
        """
        s, final = self.settings, t == self.settings.total_steps
        evaluating = final or t % s.eval_every == 0
        saving = (t % s.checkpoint_every == 0 if s.checkpoint_every else evaluating) and not final
        self.pending.append(({"step": t, "loss": None, "lr": lr, "budget": budget}, loss))
        if tracked and tracked["step"] == t and self.first:
            self._record_agreement(**tracked)
        stopping = self.signal
        looking = evaluating or saving or stopping
        if looking or len(self.pending) == FLUSH_EVERY:
            self._write_losses()
        if looking:
            self._check_finite(t)
        self.progress |= {"step": t, "seconds": time.perf_counter() - self.began}
        if evaluating:
            self._evaluate(t, lr)
            stopping = self.signal  # it may have come meanwhile
        if saving or (stopping and not final):
            self._save()
        if stopping and not final:
            raise Interrupted(stopping, t)

    def finish(self, ranks: Mapping[str, int], budget: tuple[int, int], parameters: tuple[int, int]) -> dict:
        """Write and return results.json; the checkpoints go.

        Args:
            budget: triplets at the start and the target.
            parameters: of the adapters, at the start and at the end.
        """
        p = self.progress
        same = ("task", "method", "optimizer", "score", "seed", "demo")
        results = {name: self.config[name] for name in same} | {"metric": self.task.metric}
        results |= {"best": p["best"], "last": p["last"], "ranks": dict(ranks)}
        results |= {"budget": {"b0": budget[0], "bT": budget[1], "kept": sum(ranks.values())}}
        results |= {"trainable_parameters": parameters[0], "kept_parameters": parameters[1]}
        training = p["seconds"] - p["evaluating"]
        results |= {"seconds": p["seconds"], "steps_per_second": self.settings.total_steps / training}
        results |= {"peak_memory_mb": peak_memory_mb(self.model.device)}
        if self.first:
            write_json(self.folder / "results.json", results)
            shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
        return results

    def _write_start(self, anew: bool) -> None:
        """Remove what is left of another run, or records after the checkpoint's step; write config.json."""
        if anew:
            write_json(self.folder / "next.json", self.config)  # on a full disk the other run stays whole
            for name in ("results.json", "config.json", *EVALUATION, *RECORDS, ADAPTER, POSTERIOR):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
            os.replace(self.folder / "next.json", self.folder / "config.json")
        else:
            for name in RECORDS:
                cut_records(self.folder / name, self.progress["step"])
            write_json(self.folder / "config.json", self.config)

    def _restore(self, state: dict, here: dict) -> None:
        """Raises UsageError if the checkpoint is of another model."""
        different = state["model"].keys() ^ trained(self.model).keys()
        try:
            self.model.load_state_dict(state["model"], strict=False)
        except RuntimeError as error:
            different = {str(error)}
        if different:
            raise UsageError(f"the checkpoint is of another model: {min(different)}")
        for name, thing in self.objects.items():
            thing.load_state_dict(state["objects"][name])
        set_random_states(state["random"][processes.rank()], self.model.device)
        self.progress = state["progress"]
        last = (self.config.get("resumed") or [self.config])[-1]
        other = [name for name in here if here[name] != last.get(name)]
        if other and self.first:
            message = f"other {', '.join(other)} than so far: results may differ by rounding"
            tqdm.write(f"run_glue.py: {message}", sys.stderr)
        step = self.progress["step"]
        self.config["resumed"] = [*self.config.get("resumed", []), {"step": step, **here}]

    def _write_losses(self) -> None:
        """Losses are read together, since that waits for the device: averaged over processes, and checked."""
        losses = processes.average(torch.stack([loss for _, loss in self.pending])).tolist()
        lines = [record | {"loss": loss} for (record, _), loss in zip(self.pending, losses, strict=True)]
        finite = list(itertools.takewhile(lambda line: math.isfinite(line["loss"]), lines))
        if self.first:
            append(self.folder / "metrics.jsonl", finite)
        if bad := lines[len(finite) :]:
            raise self._not_finite(f"the loss is not finite at step {bad[0]['step']} (lr {bad[0]['lr']:g})")
        best = self.progress["best"] and f"{self.progress['best'][self.task.metric]:.4f}"
        self.bar.set_postfix(loss=f"{statistics.fmean(losses):.3f}", best=best)
        self.pending = []

    def _check_finite(self, t: int) -> None:
        """Everything that a checkpoint or the best adapter would have in it."""
        tensors = {f"the parameter {name}": p.detach() for name, p in trained(self.model).items()}
        for name, thing in self.objects.items():
            tensors |= {f"the {name}'s {key}": x for key, x in tensors_in(thing.state_dict())}
        finite = torch.stack([x.isfinite().all().to(self.model.device) for x in tensors.values()]).tolist()
        if not all(finite):
            raise self._not_finite(f"{list(tensors)[finite.index(False)]} is not finite at step {t}")

    def _not_finite(self, what: str) -> NotFinite:
        kept = next(iter(checkpoints(self.folder / "checkpoint").values()), "no")
        mend = f"the checkpoint of step {kept} is kept; a smaller --lr, with --overwrite, may help"
        return NotFinite(f"{what}; {mend}")

    def _evaluate(self, t: int, lr: float) -> None:
        """Judge; record; keep the adapter if it is the best so far."""
        began = time.perf_counter()
        try:
            scores, sigma = self.evaluate()
        except FloatingPointError as error:
            raise self._not_finite(f"{error} at step {t} (lr {lr:g})") from None
        last, (decisive, *_) = {"step": t}, self.task.validation
        for split, found in scores.items():
            ending = "" if split == decisive else "_" + split.removeprefix("validation_")
            last |= {metric + ending: score for metric, score in found.items()}
        best, metric = self.progress["best"], self.task.metric
        better = best is None or last[metric] > best[metric]
        if self.first:
            append(self.folder / "metrics.jsonl", [{"step": t, "split": n, **f} for n, f in scores.items()])
            if better:
                (self.folder / "adapter").mkdir(exist_ok=True)
                for name, tensors in ((ADAPTER, trained(self.model)), (POSTERIOR, sigma)):
                    if tensors:
                        write_tensors(self.folder / name, tensors, scale(self.settings))
        self.progress |= {"last": last, "best": last if better else best}
        self.progress["evaluating"] += time.perf_counter() - began

    def _record_agreement(self, step: int, budget: int, sigma_cv: Tensor | None, scores: dict) -> None:
        arrays = {name: S.cpu().numpy() for name, S in scores.items()}
        line = {"step": step, "budget": budget, "sigma_cv": None if sigma_cv is None else float(sigma_cv)}
        append(self.folder / "score_agreement.jsonl", [line | score_agreement(arrays, budget)])

    def _save(self) -> None:
        state = {"progress": self.progress, "model": trained(self.model)}
        state["objects"] = {name: thing.state_dict() for name, thing in self.objects.items()}
        state["random"] = processes.from_all(random_states(self.model.device))
        if self.first:
            save_checkpoint(self.folder / "checkpoint", self.progress["step"], state)

    @contextlib.contextmanager
    def _noting_signals(self) -> Iterator[None]:
        """Signals are noted, and stop the run after the update; a second Ctrl-C ends it at once."""

        def note(signum: int, _frame: object) -> None:
            if self.signal and signum == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = signum

        before = {which: signal.signal(which, note) for which in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)


# ---- the folder ----------------------------------------------------------------------------------------


def check_free(settings: Settings) -> None:
    """Raise UsageError if a run in the output folder would be lost, or the folder cannot be written."""
    folder = settings.output_dir
    there = [name for name in ("config.json", "results.json", *RECORDS) if (folder / name).exists()]
    if there and not (settings.overwrite or settings.resume):
        finished = is_finished(folder)
        kind, mend = ("a finished run", "") if finished else ("an unfinished run", "--resume to continue, ")
        mend += "--overwrite or another --output_dir"
        raise UsageError(f"{folder} holds {kind} ({there[0]}): give {mend}")
    for name in ("config.json", ADAPTER, "checkpoint/x"):
        check_writable(folder / name, f"--output_dir {folder}")


def is_finished(folder: Path) -> bool:
    try:
        return "best" in json.loads((folder / "results.json").read_text())
    except (OSError, ValueError, TypeError):  # none, or damaged: training again finds the same
        return False


def check_same(settings: Mapping[str, Any], before: Mapping[str, Any], folder: Path) -> None:
    """Raise UsageError for the first setting or checksum that differs from the run's in the folder."""
    flags = {f.name: f.metadata for f in fields(Settings)}
    model = f"--model {settings.get('model')}"
    own = {"encoder": f"{model} has other weights", "data": "--data_dir has other data"}
    derived = {"total_steps": "--max_steps", "processes": "the number of torchrun's processes"}
    for name in sorted(settings, key=lambda name: name not in ("total_steps", "processes")):  # others follow
        now, then, flag = settings[name], before.get(name), flags.get(name, {})
        if name == "device":
            now, then = (str(device).split(":")[0] for device in (now, then))
        if name not in before or now == then or flag.get("role") == NOTHING:
            continue
        if name in own:
            raise UsageError(f"{own[name]} than the run in {folder} had")
        now, then = ("not given" if value is None else value for value in (now, then))
        name = f"--{name}" if flag["group"] else derived.get(name, name)
        raise UsageError(f"{name} is {now}, but was {then} for the run in {folder}: give the same")


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
    """The most memory that tensors took on a CUDA device, or that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 2 ** (20 if sys.platform == "darwin" else 10)


# ---- checkpoints ---------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> dict[Path, int]:
    """The checkpoints in a folder, by file, and their steps; the latest first."""
    names = {path: CHECKPOINT.fullmatch(path.name) for path in folder.glob("step-*.pt")}
    steps = {path: int(name[1]) for path, name in names.items() if name}
    return dict(sorted(steps.items(), key=lambda item: -item[1]))


def save_checkpoint(folder: Path, step: int, state: dict) -> None:
    """Write a checkpoint and remove the others, but for the one of the latest step before."""
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = folder / f"step-{step}-{zlib.crc32(buffer.getbuffer()):08x}.pt"
    write_whole(path, buffer.getbuffer())
    earlier = [other for other, s in checkpoints(folder).items() if s < step]
    for other in {*folder.glob("step-*")} - {path, *earlier[:1]}:
        other.unlink()


def load_checkpoint(folder: Path) -> dict | None:
    """The latest undamaged checkpoint, its tensors on the CPU; None if there is no checkpoint.

    Damaged ones are named on stderr. Raises UsageError if all are damaged.
    """
    damaged: list[str] = []
    for path in checkpoints(folder):
        try:
            content = path.read_bytes()  # torch.load would not notice a flipped byte
            if path.name.endswith(f"-{zlib.crc32(content):08x}.pt"):
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                if state.keys() >= {"progress", "model", "objects", "random"}:
                    if damaged and processes.rank() == 0:
                        names = ", ".join(damaged)
                        tqdm.write(f"run_glue.py: {names}: damaged; using an earlier checkpoint", sys.stderr)
                    return state
        except MemoryError:
            raise
        except Exception:  # no file, no state, or one that needs code to be read: damaged as well
            pass
        damaged.append(str(path))
    if damaged:
        mend = "there is no earlier checkpoint: start again with --overwrite"
        raise UsageError(f"{', '.join(damaged)}: damaged, and {mend}")
    return None


def tensors_in(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in a nested state, with the path to each."""
    if torch.is_tensor(state) and state.is_floating_point():
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))


def random_states(device: torch.device) -> list[Tensor]:
    """Of torch's generators on the CPU and the device."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state()]


def set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])


# ---- adapters ------------------------------------------------------------------------------------------


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fingerprint(model: nn.Module) -> str:
    """A checksum of the frozen weights: an adapter fits no others."""
    return checksum(p for p in model.parameters() if not p.requires_grad)


def scale(settings: Settings) -> dict[str, str]:
    """s = alpha / rank: without it the tensors of an adapter say too little."""
    return {"scaling": f"{settings.alpha} / {settings.init_rank}"}


def load_adapter(folder: Path, model: nn.Module, settings: Settings) -> dict[str, Tensor]:
    """Put a run's best adapter and head into a model that was made as the run's was; return its σ, or {}.

    Raises UsageError where the files are damaged or of another model.
    """
    tensors, metadata = read_tensors(folder / ADAPTER)
    if metadata != scale(settings):
        raise UsageError(f"{folder}/adapter does not fit config.json: it has {metadata}")
    sigma = read_tensors(folder / POSTERIOR)[0] if (folder / POSTERIOR).exists() else {}
    different = trained(model).keys() ^ tensors.keys() or (sigma.keys() ^ tensors.keys() if sigma else ())
    if different:
        raise UsageError(f"{folder}/adapter does not fit the model: {min(different)} is only in one of them")
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UsageError(f"{folder}/adapter does not fit the model: {error}") from None
    for name, p in trained(model).items():
        for tensor in (tensors[name], sigma.get(name, p)):
            if tensor.shape != p.shape or tensor.dtype != p.dtype:
                raise UsageError(f"{folder}/adapter does not fit the model: {name} is {tuple(tensor.shape)}")
    return {name: tensor.to(trained(model)[name].device) for name, tensor in sigma.items()}

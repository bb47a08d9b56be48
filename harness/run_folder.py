"""What a run has on disk: settings, records, best adapter, checkpoints; and resuming from them.

    check_output_dir(settings)                             # before anything is loaded
    with Run(settings, model, objects, evaluate, checksums) as run:
        for t in run.updates():
            ...
            run.after_update(t, loss, lr, budget)          # record, evaluate, checkpoint, stop
        run.finish(...)

A checkpoint is one file, `step-200-1c291ca3.pt`: its step and the CRC-32 of its bytes. It is written
atomically, and the one before it is kept: neither a kill nor a damaged file loses the run.
"""

import contextlib
import io
import itertools
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from harness import files, processes
from harness.metrics import score_agreement
from harness.settings import NOTHING, Settings, task_of
from harness.task import EndsRun, UsageError

HERE = Path(__file__).resolve().parent.parent
RECORDS = ("metrics.jsonl", "score_agreement.jsonl")
ADAPTER, POSTERIOR = "adapter/adapter.safetensors", "adapter/posterior.safetensors"  # with the head; its σ
EVALUATION = ("evaluation.json", "predictions.safetensors")
OURS = ("results.json", "config.json", *EVALUATION, *RECORDS, ADAPTER, POSTERIOR, "checkpoint")
IN_RESULTS = ("task", "method", "optimizer", "score", "seed", "demo")  # as in config.json
FLUSH_EVERY = 50  # updates between two looks at the losses, each of which waits for the device
RANK_SEEDS = 1_000_003  # between the seeds of two processes


class Run:
    """A training run in its folder.

    Args:
        objects: what has a state besides the model, by name: `state_dict()` and `load_state_dict()`.
        evaluate: () → metrics by split; σ by parameter name, and what the optimizer is doing ({} without a
            posterior).
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
                stack.enter_context(files.locked(self.folder))
            check_output_dir(self.settings)  # again, now with the lock
            self._begin_or_resume()
            if processes.count() == 1:  # under torchrun a signal ends the run
                for which in (signal.SIGINT, signal.SIGTERM):
                    stack.callback(signal.signal, which, signal.signal(which, self._note_signal))
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
        Raises EndsRun with status 3 where something is not finite, 128 + the signal's number after a signal.
        """
        s, final = self.settings, t == self.settings.total_steps
        evaluating = final or t % s.eval_every == 0
        saving = t % s.checkpoint_every == 0 if s.checkpoint_every else evaluating
        self.pending.append(({"step": t, "loss": None, "lr": lr, "budget": budget}, loss))
        if tracked and tracked["step"] == t and self.first:
            self._record_agreement(**tracked)
        stopping = self.signal
        if evaluating or saving or stopping or len(self.pending) == FLUSH_EVERY:
            self._write_losses()
            self._check_finite(t)
        self.progress["step"] = t
        if evaluating:
            saving |= self._evaluate(t, lr)  # the best adapter with its checkpoint
            stopping = self.signal  # it may have come meanwhile
        self.progress["seconds"] = time.perf_counter() - self.began
        if final:
            return
        if saving or stopping:
            self._save()
        if stopping:
            name = signal.Signals(stopping).name
            raise EndsRun(f"{name} after step {t}; --resume continues from there", 128 + stopping)

    def finish(self, ranks: Mapping[str, int], budget: tuple[int, int], parameters: tuple[int, int]) -> dict:
        """Write and return results.json; the checkpoints go.

        Args:
            budget: triplets at the start and the target.
            parameters: of the adapters, at the start and at the end.
        """
        p = self.progress
        results = {name: self.config[name] for name in IN_RESULTS} | {"metric": self.task.metric}
        results |= {"best": p["best"], "last": p["last"], "ranks": dict(ranks)}
        results |= {"budget": {"b0": budget[0], "bT": budget[1], "kept": sum(ranks.values())}}
        results |= {"trainable_parameters": parameters[0], "kept_parameters": parameters[1]}
        training = p["seconds"] - p["evaluating"]
        results |= {"seconds": p["seconds"], "steps_per_second": self.settings.total_steps / training}
        results |= {"peak_memory_mb": peak_memory_mb(self.model.device)}
        if self.first:
            files.write_json(self.folder / "results.json", results)
            shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
        return results

    def _begin_or_resume(self) -> None:
        folder, config, state = self.folder, self.folder / "config.json", None
        here = provenance(self.model.device)
        resuming = self.settings.resume and config.exists()
        self.finished = resuming and is_finished(folder)
        if resuming:
            before = files.read_json(config)
            check_same(self.config, before, folder)
            state = None if self.finished else load_checkpoint(folder / "checkpoint")
        if processes.rank():  # draws and dropout of its own
            torch.manual_seed(self.settings.seed + processes.rank() * RANK_SEEDS)
        if state:
            self._restore(state)
            resumed = {"step": self.progress["step"], **here}
            self.config = before | self.config | {"resumed": [*before.get("resumed", []), resumed]}
        else:
            self.config |= here
        processes.wait_for_all()  # the others have read the folder
        if not self.first:
            return
        if self.finished:  # it may have been killed just before this
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            return
        if state:
            for name in RECORDS:
                files.truncate_records(folder / name, self.progress["step"])
        files.write_json(folder / "next.json", self.config)  # if the disk is full, the old run stays intact
        if not state:
            for name in OURS[:-1]:
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        os.replace(folder / "next.json", config)

    def _restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"], strict=False)
        for name, thing in self.objects.items():
            thing.load_state_dict(state["objects"][name])
        set_random_states(state["random"][processes.rank()], self.model.device)
        self.progress = state["progress"]

    def _note_signal(self, signum: int, _frame: object) -> None:
        """A signal stops the run after the update; a second Ctrl-C at once."""
        if self.signal and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signum

    def _write_losses(self) -> None:
        """Losses are read together, since that waits for the device: averaged over processes, and checked."""
        losses = processes.average(torch.stack([loss for _, loss in self.pending])).tolist()
        lines = [record | {"loss": loss} for (record, _), loss in zip(self.pending, losses, strict=True)]
        finite = list(itertools.takewhile(lambda line: math.isfinite(line["loss"]), lines))
        if self.first:
            files.append(self.folder / "metrics.jsonl", finite)
        if bad := lines[len(finite) :]:
            raise self._not_finite(f"the loss is not finite at step {bad[0]['step']} (lr {bad[0]['lr']:g})")
        best = self.progress["best"] and f"{self.progress['best'][self.task.metric]:.4f}"
        self.bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", best=best)
        self.pending = []

    def _check_finite(self, t: int) -> None:
        """Everything that a checkpoint or the best adapter would have in it."""
        tensors = [(f"the parameter {name}", p) for name, p in trained_parameters(self.model).items()]
        for name, thing in self.objects.items():
            leaves = filter(torch.is_tensor, tree_leaves(thing.state_dict()))
            tensors += [(f"a tensor of the {name}", x) for x in leaves]
        finite = torch.stack([x.isfinite().all().to(self.model.device) for _, x in tensors]).tolist()
        if not all(finite):
            raise self._not_finite(f"{tensors[finite.index(False)][0]} is not finite at step {t}")

    def _not_finite(self, what: str) -> EndsRun:
        steps = list(checkpoints(self.folder / "checkpoint").values())
        kept = f"the checkpoint of step {steps[0]} is kept; " if steps else ""
        return EndsRun(f"{what}; {kept}a smaller --lr, with --overwrite, may help", 3)

    def _evaluate(self, t: int, lr: float) -> bool:
        """Judge; record; keep the adapter if it is the best so far, and return whether it is."""
        began = time.perf_counter()
        try:
            scores, sigma, diagnostics = self.evaluate()
        except FloatingPointError as error:
            raise self._not_finite(f"{error} at step {t} (lr {lr:g})") from None
        last, (decisive, *_) = {"step": t}, self.task.validation
        for split, found in scores.items():
            ending = "" if split == decisive else "_" + split.removeprefix("validation_")
            last |= {metric + ending: score for metric, score in found.items()}
        best, metric = self.progress["best"], self.task.metric
        better = best is None or last[metric] > best[metric]
        self.progress |= {"last": last, "best": last if better else best}
        self.progress["evaluating"] += time.perf_counter() - began
        if self.first:
            lines = [{"step": t, "split": split, **found} for split, found in scores.items()]
            lines[0] |= {"optimizer": diagnostics} if diagnostics else {}
            files.append(self.folder / "metrics.jsonl", lines)
            if better:
                (self.folder / "adapter").mkdir(exist_ok=True)
                for name, tensors in ((ADAPTER, trained_parameters(self.model)), (POSTERIOR, sigma)):
                    if tensors:
                        files.write_tensors(self.folder / name, tensors, scale(self.settings))
        return better

    def _record_agreement(self, step: int, budget: int, sigma_cv: Tensor | None, scores: dict) -> None:
        arrays = {name: S.cpu().numpy() for name, S in scores.items()}
        line = {"step": step, "budget": budget, "sigma_cv": None if sigma_cv is None else float(sigma_cv)}
        files.append(self.folder / "score_agreement.jsonl", [line | score_agreement(arrays, budget)])

    def _save(self) -> None:
        state = {"progress": self.progress, "model": trained_parameters(self.model)}
        state["objects"] = {name: thing.state_dict() for name, thing in self.objects.items()}
        state["random"] = processes.from_all(random_states(self.model.device))
        if self.first:
            save_checkpoint(self.folder / "checkpoint", self.progress["step"], state)


# ---- the folder ----------------------------------------------------------------------------------------


def check_output_dir(settings: Settings) -> None:
    """Raise UsageError if a run in the output folder would be lost, or the folder cannot be written."""
    folder = settings.output_dir
    there = [name for name in OURS if (folder / name).exists()]
    if there and not any(is_config(folder / name) for name in ("config.json", "next.json")):
        lost = f"is missing or not a run's, and {there[0]} would be lost"
        raise UsageError(f"{folder / 'config.json'} {lost}: give another --output_dir")
    if (folder / "config.json").exists() and not (settings.overwrite or settings.resume):
        kind = "a finished run" if is_finished(folder) else "an unfinished run (--resume continues it)"
        raise UsageError(f"{folder} holds {kind}: give --overwrite or another --output_dir")
    for name in ("config.json", ADAPTER, "checkpoint/x"):
        files.check_writable(folder / name, f"--output_dir {folder}")


def is_config(path: Path) -> bool:
    """Whether a file is a run's config.json, and not a model's, say."""
    try:
        return "total_steps" in files.read_json(path)
    except UsageError:
        return False


def is_finished(folder: Path) -> bool:
    return (folder / "results.json").exists()


def check_same(settings: Mapping, before: Mapping, folder: Path) -> None:
    """Raise UsageError for the first setting or checksum that differs from the run's in the folder.

    Settings that decide weights and tokens are compared before checksums; train_size and the like after.
    """
    own = settings["train_file"] is not None
    data = "a file of --train_file or --validation_file" if own else "--data_dir"
    other = {"encoder": f"--model {settings['model']} has other weights", "data": f"{data} has other data"}
    compared = [f for f in fields(Settings) if f.metadata["role"] != NOTHING]
    said = {f.name: f"--{f.name}" if f.metadata["group"] else f.name for f in compared}
    said |= {"total_steps": "--max_steps", "processes": "the number of torchrun's processes"}
    said |= {"task": "--name"} if own else {}
    first = ["task", "holdout", "holdout_seed", "base_dtype", "prompt", "choices", "max_length"]
    for name in dict.fromkeys([*first, *other, *said]):
        now = settings.get(name)
        then = before.get(name, now)
        if name == "device":  # any GPU is as good
            now, then = (str(device).split(":")[0] for device in (now, then))
        if now != then and name in other:
            raise UsageError(f"{other[name]} than the run in {folder}")
        if now != then:
            raise UsageError(f"{said[name]} is {now}, but was {then} for the run in {folder}: use the same")


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
    steps = {path: int(path.name.split("-")[1]) for path in folder.glob("step-*-*.pt")}
    return dict(sorted(steps.items(), key=lambda item: -item[1]))


def save_checkpoint(folder: Path, step: int, state: dict) -> None:
    """Write a checkpoint; remove the others but for the one before."""
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = folder / f"step-{step}-{zlib.crc32(buffer.getbuffer()):08x}.pt"
    files.write_atomically(path, buffer.getbuffer())
    earlier = [other for other, s in checkpoints(folder).items() if s < step]
    for other in {*folder.glob("step-*")} - {path, *earlier[:1]}:
        other.unlink()


def load_checkpoint(folder: Path) -> dict | None:
    """The latest undamaged checkpoint, its tensors on the CPU; None if there is no checkpoint.

    Damaged ones are named on stderr. Raises UsageError if all are damaged.
    """
    damaged: list[str] = []
    for path in checkpoints(folder):
        content = path.read_bytes()  # torch.load would not notice a flipped byte
        if path.name.endswith(f"-{zlib.crc32(content):08x}.pt"):
            if damaged and processes.rank() == 0:
                message = f"{', '.join(damaged)}: damaged; using an earlier checkpoint"
                tqdm.write(f"run_glue.py: {message}", sys.stderr)
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        damaged.append(str(path))
    if damaged:
        raise UsageError(f"{', '.join(damaged)}: damaged; start again with --overwrite")
    return None


def random_states(device: torch.device) -> list[Tensor]:
    """Of torch's generators on the CPU and the device."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state()]


def set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])


# ---- adapters ------------------------------------------------------------------------------------------


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def fingerprint(model: nn.Module) -> str:
    """A checksum of the frozen weights: an adapter fits no others."""
    return files.checksum(p for p in model.parameters() if not p.requires_grad)


def scale(settings: Settings) -> dict[str, str]:
    """s = alpha / rank: without it the tensors of an adapter say too little."""
    return {"scaling": f"{settings.alpha} / {settings.init_rank}"}


def load_adapter(folder: Path, model: nn.Module, settings: Settings) -> dict[str, Tensor]:
    """Put a run's best adapter and head into a model that was made as the run's was; return its σ, or {}.

    Raises UsageError where the files are damaged or of another model.
    """
    tensors, metadata = files.read_tensors(folder / ADAPTER)
    sigma = files.read_tensors(folder / POSTERIOR)[0] if (folder / POSTERIOR).exists() else {}
    try:
        if metadata != scale(settings):
            raise RuntimeError("its scaling differs")
        model.load_state_dict(tensors, strict=False)
        kinds = {name: (p.shape, torch.float32) for name, p in trained_parameters(model).items()}
        for found in (tensors, sigma or tensors):
            if kinds != {name: (x.shape, x.dtype) for name, x in found.items() if x.isfinite().all()}:
                raise RuntimeError("something in it is missing, misshapen or not a finite float32")
    except RuntimeError as error:
        raise UsageError(f"{folder}/adapter does not fit config.json and the model: {error}") from None
    return {name: x.to(model.device) for name, x in sigma.items()}

"""Prediction: at the posterior's mean, averaged over draws from it, judged, written down.

    split = batched(features, labels, collate, size=128)
    mean = predict(model, split)
    average = predict_from_posterior(model, split, sigma, samples=10, temperature=1.0, seed=0)
    judge_probabilities("cola", average, split.labels)

A posterior is N(m, diag(σ²)): m is what the model's parameters are, σ a tensor by parameter name. Draws are
from N(m, diag(τσ²)) with a temperature τ.

[V] Cong et al., "Variational Low-Rank Adaptation Using IVON", 2024.
"""

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoint import write_whole
from metrics import calibration, task_metrics
from processes import gathered, shared


class Split(NamedTuple):
    """Examples to predict: batches of like length, where in them each example is, and the labels (n,)."""

    batches: list[Mapping[str, Tensor]]
    position: Tensor
    labels: Tensor


def batched(features: list[dict], labels: Tensor, collate: Callable, size: int) -> Split:
    """Examples as a tokenizer gives them ("input_ids", …), sorted by length and padded by `collate`."""
    order = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
    batches = [collate([features[i] for i in order[j : j + size]]) for j in range(0, len(order), size)]
    return Split(batches, torch.tensor(order).argsort(), labels)


@torch.inference_mode()
def predict(model: nn.Module, split: Split) -> Tensor:
    """What the model says of each example, in float64: probabilities (n, classes), or numbers (n,).

    Several processes share the batches; all of them have the answer.

    Raises FloatingPointError where that is not finite.
    """
    training = model.training
    model.eval()
    inputs = ({name: x.to(model.device) for name, x in batch.items()} for batch in shared(split.batches))
    logits = torch.cat(gathered([model(**batch).logits for batch in inputs])).cpu().double()[split.position]
    model.train(training)
    if not torch.isfinite(logits).all():
        raise FloatingPointError("a prediction is not finite")
    return logits.squeeze(-1) if split.labels.is_floating_point() else logits.softmax(-1)


@contextmanager
def drawn(
    model: nn.Module, sigma: Mapping[str, Tensor], temperature: float, generator: torch.Generator
) -> Iterator[None]:
    """For the length of the block the parameters that have a σ are a draw from N(m, diag(τσ²)).

    Afterwards they are exactly m again. The generator is on the model's device.
    """
    parameters = {name: p for name, p in model.named_parameters() if name in sigma}
    means = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                noise = torch.randn(p.shape, generator=generator, device=p.device)
                p += math.sqrt(temperature) * sigma[name] * noise
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(means[name])


def predict_from_posterior(
    model: nn.Module,
    split: Split,
    sigma: Mapping[str, Tensor],
    samples: int,
    temperature: float,
    seed: int,
) -> Tensor:
    """`predict`, averaged over draws: probabilities, not logits. At τ = 0 one draw does. Source: [V]."""
    generator, total = torch.Generator(model.device).manual_seed(seed), 0
    samples = samples if temperature else 1
    for _ in range(samples):
        with drawn(model, sigma, temperature, generator):
            total = total + predict(model, split)
    return total / samples


def judge(task: str, predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """The task's metrics of what `predict` gave."""
    classes = predictions.argmax(-1) if predictions.ndim == 2 else predictions
    return task_metrics(task, classes.numpy(), labels.numpy())


def judge_probabilities(task: str, predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """`judge`, and for a task with classes accuracy, NLL, ECE and Brier score."""
    scores = judge(task, predictions, labels)
    return scores | calibration(predictions.numpy(), labels.numpy()) if predictions.ndim == 2 else scores


def write_submission(
    path: Path,
    index: Sequence[int],
    predictions: Tensor,
    written: Sequence[str],
    probabilities: Sequence[str] = (),
) -> None:
    """A file as GLUE's leaderboard takes it: "index" and "prediction"; all of it or nothing.

    Args:
        predictions: what `predict` gave; numbers are cut to stsb's 0 to 5.
        written: what the task's files write for each class.
        probabilities: names of columns for the classes' probabilities, if they are wanted.
    """
    rows = predictions.clamp(0, 5).tolist()
    if predictions.ndim == 2:
        rows = [written[i] for i in predictions.argmax(-1)]
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    writer.writerow(["index", "prediction", *probabilities])
    for i, row, p in zip(index, rows, predictions.tolist(), strict=True):
        writer.writerow([i, row, *(p if probabilities else ())])
    write_whole(path, file.getvalue().encode())

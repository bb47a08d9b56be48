"""Prediction: at the posterior's mean, averaged over draws from it, and judged.

A posterior is N(m, diag(σ²)): m is what the model's parameters are, σ a dict of tensors by parameter name.
Draws are from N(m, diag(τσ²)) with a temperature τ.

[V] Cong et al., "Variational Low-Rank Adaptation Using IVON", 2024.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness import processes
from harness.metrics import calibration
from harness.settings import Settings, task_of
from harness.task import Task


@torch.inference_mode()
def predict(model: nn.Module, split: Any, dropout: bool = False) -> Tensor:
    """What the model predicts for each example of a batches.Split, in its order, float64: probabilities
    (n, classes), or for regression numbers (n,).

    Several processes share the batches; all of them get the answer. Raises FloatingPointError where it is not
    finite.
    """
    training, outputs = model.training, []
    model.train(dropout)
    for batch in processes.own_share(split.batches):
        inputs = {name: x.to(model.device) for name, x in batch.items()}
        outputs.append(model(**inputs).logits)
    model.train(training)
    logits = torch.cat(processes.gathered(outputs)).cpu().double()[split.position]
    predictions = logits.squeeze(-1) if split.labels.is_floating_point() else logits.softmax(-1)
    if not torch.isfinite(predictions).all():
        raise FloatingPointError("a prediction is not finite")
    return predictions


@contextmanager
def drawn(
    model: nn.Module, sigma: Mapping[str, Tensor], generator: torch.Generator, temperature: float
) -> Iterator[None]:
    """Inside the block the parameters that have a σ are a draw from N(m, diag(τσ²)); then exactly m again.

    The generator is on the model's device.
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


def predict_from_draws(
    model: nn.Module, split: Any, sigma: Mapping[str, Tensor], samples: int, temperature: float, seed: int
) -> Tensor:
    """`predict`, averaged over draws: probabilities, not logits. At τ = 0 one draw is enough. Source: [V]."""
    generator, total = torch.Generator(model.device).manual_seed(seed), 0
    samples = samples if temperature else 1
    for _ in range(samples):
        with drawn(model, sigma, generator, temperature):
            total = total + predict(model, split)
    return total / samples


def judge(task: Task, predictions: Tensor, labels: Tensor, calibrated: bool = False) -> dict[str, float]:
    """The task's metrics of what `predict` returned; with `calibrated`, accuracy, NLL, ECE and Brier score of
    probabilities, too."""
    classes = predictions.argmax(-1) if predictions.ndim == 2 else predictions
    scores = task.metrics(classes.numpy(), labels.numpy())
    if calibrated and predictions.ndim == 2:
        scores |= calibration(predictions.numpy(), labels.numpy())
    return scores


def evaluate(
    model: nn.Module, splits: Mapping[str, Any], settings: Settings, sigma: Mapping[str, Tensor]
) -> dict[str, dict]:
    """By split, the task's metrics at the mean; with --eval_samples also "calibration" of mean and draws."""
    task, scores = task_of(settings), {}
    for name, split in splits.items():
        mean = predict(model, split)
        scores[name] = judge(task, mean, split.labels)
        if settings.eval_samples:
            how = settings.eval_samples, settings.temperature, settings.seed
            both = {"mean": mean, "samples": predict_from_draws(model, split, sigma, *how)}
            scores[name]["calibration"] = {
                key: judge(task, predictions, split.labels, calibrated=True)
                for key, predictions in both.items()
            }
    return scores


def sigma_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """σ of everything that is trained; {} for an optimizer that has no posterior."""
    if not hasattr(optimizer, "sigma"):
        return {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    together = getattr(optimizer, "sigmas", lambda params: [optimizer.sigma(p) for p in params])
    return dict(zip(trained, together(list(trained.values())), strict=True))

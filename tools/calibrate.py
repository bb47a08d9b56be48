"""Cheap calibration baselines for a posterior's draws.

[G] Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (temperature scaling).
[D] Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016 (MC dropout).
[F] Shi et al., "Training-Free Bayesianization for Low-Rank Adapters of Large Language Models", 2024 (TFB).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from adalora import SVDLinear
from budget import keep_top
from harness.batches import Split
from harness.metrics import calibration
from harness.prediction import predict, predict_from_draws

FITTED = ("temperature scaling", "draws at the fitted τ", "pruned", "TFB")
TAUS = (0.1, 0.3, 1.0, 3.0)
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TFB_RANGE, TFB_BISECTIONS, TFB_TOLERANCE = (0.001, 0.2), 5, 1.003  # [F]: NLL at most 0.3% above the mean's


class Predictor(NamedTuple):
    """A way to predict. `value` is its one setting, given or fitted: τ, a temperature, σ_q, a share."""

    how: str
    samples: int
    value: float
    predict: Callable[[Split], Tensor]


def fitted(
    model: nn.Module, layers: Mapping[str, nn.Module], sigma: Mapping[str, Tensor], split: Split,
    samples: int, seed: int,
) -> Iterator[Predictor]:  # fmt: skip
    """The baselines, each fitted by its NLL on `split`. The last rewrites the adapters: use each in turn."""
    mean = predict(model, split)
    T = fit_scaling(mean, split.labels)
    yield Predictor("temperature scaling", 0, T, lambda of: scaled(predict(model, of), T))
    yield Predictor("MC dropout", samples, 0.0, lambda of: dropout_average(model, of, samples, seed))
    if sigma:
        draws = partial(predict_from_draws, model, sigma=sigma, samples=samples, seed=seed)
        tau = min(TAUS, key=lambda tau: nll(draws(split, temperature=tau), split.labels))
        draws = partial(draws, temperature=tau)
        yield Predictor("draws at the fitted τ", samples, tau, draws)
    if own := {name: x for name, x in sigma.items() if name.rpartition(".")[0] in layers}:
        share = min(SHARES, key=lambda share: nll(predict_pruned(model, split, own, share), split.labels))
        yield Predictor("pruned", 0, share, lambda of: predict_pruned(model, of, own, share))
    if layers:
        unit = prepare_tfb_(layers)
        q = fit_tfb(model, split, unit, TFB_TOLERANCE * nll(mean, split.labels), samples, seed)
        draws = partial(predict_from_draws, model, sigma=unit, samples=samples, temperature=q**2, seed=seed)
        yield Predictor("TFB", samples, q, draws)


def nll(probabilities: Tensor, labels: Tensor) -> float:
    return calibration(probabilities.numpy(), labels.numpy())["nll"]


def scaled(probabilities: Tensor, T: float) -> Tensor:
    """softmax(logits / T); the logits are known up to a constant."""
    return (probabilities.clamp_min(torch.finfo(torch.float64).tiny).log() / T).softmax(-1)


def fit_scaling(probabilities: Tensor, labels: Tensor) -> float:
    """The temperature T in [1/20, 20] with the least NLL. Source: [G] section 4.2."""

    def loss(log_T: float) -> float:
        return nll(scaled(probabilities, math.exp(log_T)), labels)

    return math.exp(minimize_scalar(loss, bounds=(-math.log(20), math.log(20)), method="bounded").x)


def dropout_average(model: nn.Module, split: Split, passes: int, seed: int) -> Tensor:
    """Probabilities averaged over passes with the model's own dropout. Source: [D]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return sum(predict(model, split, dropout=True) for _ in range(passes)) / passes


@torch.no_grad()
def prepare_tfb_(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Rewrite each adapter's product as U·diag(d)·A' by an SVD of its left factor; ΔW is unchanged.

    Returns, by parameter name, 1/d_i for the entries of row i of A' (0 if d_i is 0). TFB's σ is σ_q times
    that; other parameters have none.
    """
    sigma = {}
    for name, layer in layers.items():
        svd = isinstance(layer, SVDLinear)
        left, right, part = (layer.P, layer.Q, "Q") if svd else (layer.B, layer.A, "A")
        factor = layer.scaling * (left * layer.lam if svd else left)
        d_out, r = factor.shape
        U, d, V = torch.linalg.svd(F.pad(factor, (0, 0, 0, max(0, r - d_out))), full_matrices=False)
        U, live = U[:d_out], d > d[:1] * torch.finfo(d.dtype).eps * max(d_out, r)  # d is in descending order
        left.copy_(U * d / layer.scaling)
        if svd:
            layer.lam.fill_(1)
        right.copy_(V @ right)
        sigma[f"{name}.{part}"] = torch.where(live, 1 / d, 0).unsqueeze(1).expand_as(right)
    return sigma


def fit_tfb(
    model: nn.Module, split: Split, unit: Mapping[str, Tensor], most: float, samples: int, seed: int
) -> float:
    """The largest σ_q, by bisection, at which the NLL averaged over draws is at most `most`. Source: [F]."""
    low, high = TFB_RANGE
    for _ in range(TFB_BISECTIONS):
        middle = (low + high) / 2
        draws = predict_from_draws(model, split, unit, samples, middle**2, seed)  # σ = σ_q·unit
        fine = nll(draws, split.labels) <= most
        low, high = (middle, high) if fine else (low, middle)
    return low


def predict_pruned(model: nn.Module, split: Split, sigma: Mapping[str, Tensor], share: float) -> Tensor:
    """`predict` with the share of entries of smallest |μ|/σ, among those that have a σ, set to 0."""
    parameters = {name: p.data for name, p in model.named_parameters() if name in sigma}
    before = {name: p.clone() for name, p in parameters.items()}
    ratios = torch.cat([(p.abs() / sigma[name]).flatten() for name, p in parameters.items()])
    keep = keep_top(ratios, len(ratios) - int(share * len(ratios)))
    try:
        masks = keep.split([p.numel() for p in before.values()])
        for p, mask in zip(parameters.values(), masks, strict=True):
            p.mul_(mask.view(p.shape))
        return predict(model, split)
    finally:
        for name, p in parameters.items():
            p.copy_(before[name])

"""Which triplets are kept: scores + budget + posterior, for all adapters of a model at once.

    allocator = RankAllocator(layers, CubicBudget(...), score="mu", optimizer=optimizer)
    for t in range(1, T + 1):
        ...backward...
        optimizer.step()
        allocator.step(t)
        optimizer.zero_grad()

[A] Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023.
[C] Chen and Garner, "A Bayesian Interpretation of Adaptive Low-Rank Adaptation", arXiv 2409.10673.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from adalora import SVDLinear, check_state_is_prunable, remove_triplets
from budget import CubicBudget, keep_top
from scores import SCORES, SensitivityEMA

PARTS = ("P", "lam", "Q")


class Posterior(Protocol):
    """A torch optimizer with a posterior N(μ, σ²) over its parameters.

    If it has `sigmas(params)`, a list of σ in few operations, that replaces a call of `sigma` per parameter.
    """

    def sigma(self, param: Tensor) -> Tensor:
        """σ of a parameter, in its shape, without a graph."""

    def sampled_params(self, train: bool = False) -> AbstractContextManager[None]:
        """A block in which the parameters are a draw; with `train`, its gradients are what `step` uses."""


class RankAllocator:
    """Scores every triplet and keeps the b(t) best of the whole model; the others' λ becomes 0.

    Source: algorithm 1 of [A] and [C]. Until the last allocation, at t = T − t_f, λ keeps its
    gradient, so a dropped triplet can come back; then the dropped ones are taken out of P, λ, Q and of the
    optimizer's state of them.

    Args:
        layers: SVD adapters by name, as `inject` returns them, on one device.
        score: a name in SCORES.
        optimizer: any torch optimizer over P, λ and Q; a score that needs σ needs a `Posterior`.
        beta1, beta2: of the smoothed sensitivity.
        track: at each allocation set `tracked` to a dict of its "step" and "budget", the "scores" before
            pruning (every computable one, by name) and "sigma_cv", σ's coefficient of variation.

    Raises ValueError for adapters without P, λ and Q, an unknown score, one that cannot be computed, a budget
    above the number of triplets, or optimizer state that cannot be cut.
    """

    def __init__(
        self, layers: Mapping[str, SVDLinear], budget: CubicBudget, score: str,
        optimizer: torch.optim.Optimizer, beta1: float = 0.85, beta2: float = 0.85, track: bool = False,
    ):  # fmt: skip
        if other := [name for name, layer in layers.items() if not isinstance(layer, SVDLinear)]:
            raise ValueError(f"{other[0]} has no triplets: RankAllocator needs adapters of kind='svd'")
        if score not in SCORES:
            raise ValueError(f"there is no score called {score}: choose from {', '.join(SCORES)}")
        computable = [name for name in SCORES if SCORES[name].needs != "sigma" or hasattr(optimizer, "sigma")]
        if score not in computable:
            raise ValueError(f"the score {score} needs σ, so an optimizer that has a posterior, such as IVON")
        if budget.initial > (triplets := sum(layer.rank for layer in layers.values())):
            raise ValueError(f"the budget starts at {budget.initial} triplets; the adapters have {triplets}")
        check_state_is_prunable(layers, optimizer)
        self.layers, self.budget, self.score, self.optimizer = layers, budget, score, optimizer
        self.track = computable if track else []
        self.tracked: dict | None = None
        self.ema = SensitivityEMA(beta1, beta2)
        self.smoothing = any(SCORES[name].needs == "smoothed" for name in [score, *self.track])
        self.kept = {name: torch.ones_like(layer.lam, dtype=torch.bool) for name, layer in layers.items()}

    @torch.no_grad()
    def step(self, t: int) -> None:
        """Call after the optimizer's step of update t (from 1), before gradients are cleared."""
        if self.smoothing and t <= self.budget.last_allocation:
            for key, layers in self._by_shape().items():
                for part in PARTS:
                    self.ema.update((*key, part), *_stacked(layers, part, grad=True))
        if self.budget.due(t):
            if self.track:
                self.tracked = {"step": t, "budget": self.budget(t), "scores": self.scores(self.track)}
                self.tracked["sigma_cv"] = self._sigma_variation()
            S, lam = self.scores([self.score])[self.score], [layer.lam for layer in self.layers.values()]
            kept = keep_top(S, self.budget(t)).split([x.numel() for x in lam])
            self.kept = dict(zip(self.layers, kept, strict=True))
            torch._foreach_mul_(lam, kept)  # the others' λ ← 0
        if t == self.budget.last_allocation:
            remove_triplets(self.layers, self.kept, self.optimizer)

    @torch.no_grad()
    def scores(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Each named score of all triplets, (n,), in the order of the adapters.

        `sensitivity` can be asked for from the first `step` (before it: KeyError) until triplets are removed.
        """
        found = {}
        for name in names:
            of_layer = {}
            for key, layers in self._by_shape().items():  # scored as one stack: (n, d_out, r), (n, r), …
                s = [self._elementwise(name, (*key, part), layers) for part in PARTS]
                of_layer.update(zip(layers, SCORES[name].triplet(*s), strict=True))
            found[name] = torch.cat([of_layer[layer] for layer in self.layers.values()])
        return found

    def _elementwise(self, name: str, key: tuple, layers: list[SVDLinear]) -> Tensor:
        """s(θ) of one part, P, λ or Q, of all adapters of one shape."""
        needs, part = SCORES[name].needs, key[-1]
        if needs == "gradient":
            return SCORES[name].elementwise(*_stacked(layers, part, grad=True))
        (theta,) = _stacked(layers, part)
        if needs == "sigma":
            sigma = sigmas(self.optimizer, [getattr(layer, part) for layer in layers])
            return SCORES[name].elementwise(theta, torch.stack(sigma))
        return SCORES[name].elementwise(theta, self.ema.score(key) if needs == "smoothed" else None)

    def _sigma_variation(self) -> Tensor | None:
        """σ's standard deviation over its mean, over all entries of the adapters; None without σ."""
        if not hasattr(self.optimizer, "sigma") or not any(layer.rank for layer in self.layers.values()):
            return None
        parts = [getattr(layer, part) for part in PARTS for layer in self.layers.values()]
        sigma = torch.cat([x.flatten() for x in sigmas(self.optimizer, parts)])
        return sigma.std(correction=0) / sigma.mean()

    def _by_shape(self) -> dict[tuple[int, int, int], list[SVDLinear]]:
        """The adapters by shape, (d_out, r, d_in)."""
        groups = defaultdict(list)
        for layer in self.layers.values():
            groups[(*layer.P.shape, layer.Q.shape[1])].append(layer)
        return groups

    def ranks(self) -> dict[str, int]:
        """How many triplets of each adapter the last allocation kept (before the first: all)."""
        return {name: int(kept.sum()) for name, kept in self.kept.items()}

    def state_dict(self) -> dict:
        return {"ema": self.ema.state_dict(), "kept": dict(self.kept)}

    def load_state_dict(self, state: dict) -> None:
        device = next(iter(self.layers.values())).P.device
        ema = {name: {key: x.to(device) for key, x in of.items()} for name, of in state["ema"].items()}
        self.ema.load_state_dict(ema)
        self.kept = {name: kept.to(device) for name, kept in state["kept"].items()}


def sigmas(optimizer: Posterior, params: list[Tensor]) -> list[Tensor]:
    together = getattr(optimizer, "sigmas", None)
    return together(params) if together else [optimizer.sigma(p) for p in params]


class FixedRanks:
    """RankAllocator's interface for adapters that keep their rank, or for none."""

    tracked = None

    def __init__(self, layers: Mapping[str, nn.Module]):
        self.kept = {name: layer.rank for name, layer in layers.items()}

    def budget(self, t: int) -> int:
        return sum(self.kept.values())

    def ranks(self) -> dict[str, int]:
        return dict(self.kept)

    def step(self, t: int) -> None:
        """Every adapter keeps its rank."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """There is nothing to load."""


def _stacked(layers: list[SVDLinear], part: str, grad: bool = False) -> list[Tensor]:
    """One part of adapters of one shape as a stack; with `grad` its gradient, too (0 where there is none)."""
    params = [getattr(layer, part) for layer in layers]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params] if grad else None
    return [torch.stack(tensors) for tensors in (params, grads) if tensors]

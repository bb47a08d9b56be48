"""Which triplets live: scores + budget + posterior, for all adapters of a model at once.

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
from collections.abc import Mapping

import torch
from torch import Tensor

from adalora import SVDLinear
from budget import CubicBudget, keep_top
from scores import SCORES, SensitivityEMA, triplet_scores

PARTS = ("P", "lam", "Q")


class RankAllocator:
    """Scores every triplet and keeps the budget's number of them; the others' λ becomes 0. Source: [A]
    algorithm 1, [C].

    Between two allocations λ keeps its gradient, so a dropped triplet can come back. With the last
    allocation, at t = T − t_f, the pattern is fixed: the dropped triplets are taken out of P, λ and Q, and of
    the optimizer's state of them, so that they cost nothing any more. (Without an optimizer whose state can
    follow they are masked.)

    Adapters of one shape are scored as one stack: n of them give tensors (n, d_out, r), (n, r), (n, r, d_in).

    Args:
        layers: what `inject` returned.
        score: a name in SCORES.
        optimizer: the adapters' one. Needed by a score that looks at σ, then it has `sigma(param)` as IVON
            does; and to take dropped triplets out: it then has P, λ and Q, and state of their shapes.
        beta1, beta2: of the smoothed sensitivity.
        track: before each allocation append to `tracked` its "step" and "budget", "scores" (name → every
            triplet's score, (n,)) for each score in SCORES that can be had here, and "sigma_cv", the
            coefficient of variation of σ over all entries of P, λ and Q (None if there are none). The
            tensors stay on their device; whoever reads them empties the list.

    Raises ValueError for an unknown score, one that cannot be had, or a budget above the number of triplets.
    """

    def __init__(
        self,
        layers: Mapping[str, SVDLinear],
        budget: CubicBudget,
        score: str,
        optimizer: torch.optim.Optimizer | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        track: bool = False,
    ):
        if score not in SCORES:
            raise ValueError(f"there is no score called {score}; there are {', '.join(SCORES)}")
        self.computable = [s for s in SCORES if SCORES[s].needs != "sigma" or hasattr(optimizer, "sigma")]
        if score not in self.computable:
            raise ValueError(f"the score {score} needs σ, so an optimizer that has a posterior, such as IVON")
        triplets = sum(layer.lam.numel() for layer in layers.values())
        if budget.initial > triplets:
            raise ValueError(
                f"the budget starts at {budget.initial} triplets, but the adapters have {triplets}"
            )
        self.layers, self.budget, self.score, self.optimizer = layers, budget, score, optimizer
        self.ema = SensitivityEMA(beta1, beta2)
        self.followed = self.computable if track else [score]
        self.track, self.tracked = track, []
        self.kept = {name: torch.ones_like(layer.alive) for name, layer in layers.items()}
        # From T − t_f on: each P, λ and Q that is masked, and its mask.
        self._masked: tuple[list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def step(self, t: int) -> None:
        """After the optimizer's step of update t (counted from 1), while `p.grad` is still there."""
        if "sensitivity" in self.followed and t <= self.budget.last_allocation:
            for group, layers in self._groups().items():
                for part in PARTS:
                    theta, grad = _parameters(layers, part)
                    self.ema.update((*group, part), torch.stack(theta), torch.stack(grad))
        if self.budget.due(t):
            self._allocate(t)
        if t == self.budget.last_allocation:
            self._fix()
        if t >= self.budget.last_allocation:
            self._hold_masked_at_zero()

    def ranks(self) -> dict[str, int]:
        """How many triplets of each adapter the last allocation kept (before the first: all)."""
        return {name: int(kept.sum()) for name, kept in self.kept.items()}

    @torch.no_grad()
    def triplet_scores(self) -> dict[str, Tensor]:
        """Every triplet's score now, (r,) by adapter. KeyError for sensitivity after the last allocation."""
        S = self._scores([self.score])[self.score]
        return dict(zip(self.layers, S.split(self._sizes()), strict=True))

    def state_dict(self) -> dict:
        return {"ema": self.ema.state_dict(), "kept": dict(self.kept)}

    def load_state_dict(self, state: dict) -> None:
        self.ema.load_state_dict(state["ema"])
        for averages in (self.ema.I_bar, self.ema.U_bar):
            for key, value in averages.items():  # from wherever the state was loaded to
                averages[key] = value.to(next(iter(self.layers.values())).P.device)
        for name, kept in self.kept.items():
            kept.copy_(state["kept"][name])
        self._masked = None

    def _groups(self) -> dict[tuple[int, int, int], list[SVDLinear]]:
        """The adapters of one shape: (d_out, r, d_in) → them."""
        groups = defaultdict(list)
        for layer in self.layers.values():
            groups[(*layer.P.shape, layer.Q.shape[1])].append(layer)
        return groups

    def _sizes(self) -> list[int]:
        return [layer.lam.numel() for layer in self.layers.values()]

    def _scores(self, names: list[str]) -> dict[str, Tensor]:
        """Of each score named, all triplets' in the order of the adapters: (n,)."""
        of_layer = {}
        for group, layers in self._groups().items():
            s_P, s_lam, s_Q = (self._elementwise(group, layers, part, names) for part in PARTS)
            S = [
                s_lam[name] if name == "lambda" else triplet_scores(s_P[name], s_lam[name], s_Q[name])
                for name in names
            ]
            of_layer.update(zip(layers, torch.stack(S).unbind(1), strict=True))  # (len(names), r) each
        S = torch.cat([of_layer[layer] for layer in self.layers.values()], dim=1)
        return dict(zip(names, S, strict=True))

    def _elementwise(
        self, group: tuple[int, int, int], layers: list[SVDLinear], part: str, names: list[str]
    ) -> dict[str, Tensor]:
        """s(θ) of one part of all adapters in a group, stacked, of each score named."""
        params, grads = _parameters(layers, part)
        needs = {SCORES[name].needs for name in names if name != "sensitivity"}
        theta, given = torch.stack(params), {"nothing": None}
        if "gradient" in needs:
            given["gradient"] = torch.stack(grads)
        if "sigma" in needs:
            given["sigma"] = torch.stack(self._sigmas(params))
        return {
            name: self.ema.score((*group, part))
            if name == "sensitivity"
            else SCORES[name].function(theta, given[SCORES[name].needs])
            for name in names
        }

    def _sigmas(self, params: list[Tensor]) -> list[Tensor]:
        """IVON computes many σ together; sigma() alone is all that is asked of another optimizer."""
        together = getattr(self.optimizer, "sigmas", None)
        return together(params) if together else [self.optimizer.sigma(p) for p in params]

    def _allocate(self, t: int) -> None:
        """Keep the b(t) best triplets of the model and set the others' λ to 0."""
        scores, b = self._scores(self.followed), self.budget(t)
        if self.track:
            self.tracked.append(
                {"step": t, "budget": b, "scores": scores, "sigma_cv": self._sigma_variation()}
            )
        kept = keep_top(scores[self.score], b).split(self._sizes())
        torch._foreach_copy_(list(self.kept.values()), kept)
        torch._foreach_mul_([layer.lam for layer in self.layers.values()], kept)

    def _sigma_variation(self) -> Tensor | None:
        """Standard deviation of σ over its mean, over all entries of the adapters: a scalar."""
        if not hasattr(self.optimizer, "sigma") or not sum(self._sizes()):
            return None
        params = [getattr(layer, part) for layer in self.layers.values() for part in PARTS]
        sigma = torch.cat([sigma.flatten() for sigma in self._sigmas(params)])
        return (sigma / sigma.mean()).std(correction=0)

    def _fix(self) -> None:
        """The pattern is final: what is dropped is taken out, or masked where the optimizer cannot follow."""
        follows = self._optimizer_follows()
        for name, layer in self.layers.items():
            if follows:
                layer.shrink(self.kept[name], self.optimizer)
            else:
                layer.mask(self.kept[name])

    def _optimizer_follows(self) -> bool:
        """Whether all state of P, λ and Q is known here, in tensors of their shapes (Adafactor's are not)."""
        groups = getattr(self.optimizer, "param_groups", [])
        own = {p for group in groups for p in group["params"]}
        params = [getattr(layer, part) for layer in self.layers.values() for part in PARTS]
        if not own.issuperset(params):
            return False
        states = [(p, value) for p in params for value in self.optimizer.state[p].values()]
        return all(value.shape in (p.shape, ()) for p, value in states if torch.is_tensor(value))

    def _hold_masked_at_zero(self) -> None:
        """Momentum and decay must not move what is masked, whatever the optimizer."""
        if self._masked is None:
            masked = [(layer, self.kept[name]) for name, layer in self.layers.items() if layer.masked]
            params = [p for layer, _ in masked for p in (layer.P, layer.lam, layer.Q)]
            self._masked = params, [mask for _, kept in masked for mask in (kept, kept, kept.unsqueeze(1))]
        if self._masked[0]:
            torch._foreach_mul_(*self._masked)


def _parameters(layers: list[SVDLinear], part: str) -> tuple[list[Tensor], list[Tensor]]:
    """One part ("P", "lam" or "Q") of each adapter, and its gradient (0 where it has none)."""
    params = [getattr(layer, part) for layer in layers]
    return params, [torch.zeros_like(p) if p.grad is None else p.grad for p in params]

"""A small regression with six adapters, trained by the loop that vilora.py describes; random adapters."""

from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor, nn

import adalora
from adalora import SVDLinear, inject
from budget import CubicBudget
from ivon import IVON
from vilora import FixedRanks, RankAllocator

T, T_I, T_F, DELTA_T = 40, 6, 10, 3
RANK, MAPS = 3, 6


class Run:
    """`form` is adalora, or fused, which has the same adapters and the same penalty."""

    def __init__(
        self,
        score: str = "mu",
        optimizer: str = "ivon",
        target: int = 8,
        seed: int = 0,
        track: bool = False,
        kind: str = "svd",
        form: ModuleType = adalora,
        squared: bool = False,
    ):
        torch.manual_seed(seed)
        sizes = [6, 8, 8, 8, 6, 6, 4]
        self.model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
        self.layers = inject(self.model, [str(i) for i in range(MAPS)], RANK, alpha=6, kind=kind)
        if form is not adalora:
            form.fuse(self.model, self.layers)
        self.add_penalty_gradients, self.squared = form.add_penalty_gradients, squared
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        if optimizer == "ivon":
            self.optimizer = IVON(self.params, lr=0.1, ess=100, hess_init=0.1, beta2=0.9, weight_decay=1e-3)
        else:
            self.optimizer = torch.optim.AdamW(self.params, lr=0.01, weight_decay=0.01)
        self.budget = CubicBudget(RANK * MAPS, target, T, T_I, T_F, DELTA_T)
        self.allocator = (
            RankAllocator(self.layers, self.budget, score, self.optimizer, track=track)
            if kind == "svd"
            else FixedRanks(self.layers)
        )
        self.x, self.y = torch.randn(32, 6), torch.randn(32, 4)

    def loss(self) -> Tensor:
        return (self.model(self.x) - self.y).square().mean()

    def update(self, t: int, allocate: bool = True) -> None:
        if hasattr(self.optimizer, "sampled_params"):
            with self.optimizer.sampled_params(train=True):
                self._backward()
        else:
            self._backward()
        self.optimizer.step()
        if allocate:
            self.allocator.step(t)
            self.optimizer.zero_grad()

    def _backward(self) -> None:
        self.loss().backward()
        self.add_penalty_gradients(self.layers, 0.1, self.squared)


def random_adapter(
    rank: int = 3, d_out: int = 5, d_in: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> SVDLinear:
    """An adapter in the midst of training, over a frozen base with a bias."""
    torch.manual_seed(seed)
    layer = SVDLinear(nn.Linear(d_in, d_out).requires_grad_(False), rank, alpha=6).to(dtype)
    with torch.no_grad():
        for p in (layer.P, layer.lam, layer.Q):
            p.normal_()
    return layer


def mixed_adapters() -> dict[str, SVDLinear]:
    """Of several shapes and ranks: square ones, P square, Q square, both, and rank 0."""
    shapes = [(3, 5, 4), (3, 4, 5), (3, 5, 4), (3, 8, 8), (5, 5, 7), (4, 7, 4), (2, 2, 2), (0, 5, 4)]
    return {str(i): random_adapter(*shape, seed=i) for i, shape in enumerate(shapes)}

"""How many triplets are kept at step t, and which.

[A] Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023.
"""

import torch
from torch import Tensor


class CubicBudget:
    """The number of triplets the whole model keeps after t finished updates. Source: [A] eq. 12.

        b(t) = b0                                                        t ≤ t_i
        b(t) = floor(bT + (b0 − bT)·(1 − (t − t_i)/(T − t_f − t_i))³)    t_i < t ≤ T − t_f
        b(t) = bT                                                        afterwards

    Args:
        initial: b0, triplets at the start.
        target: bT ≤ b0, triplets at the end.
        total_steps: T, updates in the whole run.
        warmup_steps: t_i, updates before the first triplet goes.
        final_steps: t_f, updates trained with the final pattern.
        interval: ΔT, updates between two allocations.

    Raises ValueError for an impossible schedule.
    """

    def __init__(
        self, initial: int, target: int, total_steps: int, warmup_steps: int, final_steps: int, interval: int
    ):
        if min(target, warmup_steps, final_steps) < 0 or interval < 1:
            names = f"target {target}, t_i {warmup_steps} and t_f {final_steps}"
            raise ValueError(f"{names} cannot be negative, and ΔT {interval} is at least 1")
        if target > initial:
            raise ValueError(f"the target budget ({target} triplets) is above the start ({initial})")
        if warmup_steps + final_steps >= total_steps:
            phases = f"t_i + t_f = {warmup_steps} + {final_steps}"
            raise ValueError(f"{phases} leaves no step to prune in: the run has {total_steps}")
        self.initial, self.target = initial, target
        self.warmup_steps, self.interval = warmup_steps, interval
        self.last_allocation = total_steps - final_steps  # T − t_f

    def __call__(self, t: int) -> int:
        """b(t), in whole-number arithmetic: the floor of an exact value."""
        if t <= self.warmup_steps:
            return self.initial
        if t >= self.last_allocation:
            return self.target
        span = self.last_allocation - self.warmup_steps
        left = self.last_allocation - t  # left/span = 1 − (t − t_i)/(T − t_f − t_i)
        return self.target + (self.initial - self.target) * left**3 // span**3

    def due(self, t: int) -> bool:
        """Whether update t is followed by an allocation: multiples of ΔT in (t_i, T − t_f), and T − t_f."""
        return t == self.last_allocation or (
            self.warmup_steps < t < self.last_allocation and t % self.interval == 0
        )


def keep_top(scores: Tensor, k: int) -> Tensor:
    """A bool mask, (n,) like `scores`, that is True at exactly the k highest scores.

    Ties go to the earlier position; a threshold at the k-th value would keep or drop them all together.
    Raises ValueError unless 0 ≤ k ≤ n.
    """
    if not 0 <= k <= scores.numel():
        raise ValueError(f"cannot keep {k} of {scores.numel()} triplets")
    order = torch.sort(scores, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, order[:k], True)

"""IVON: the optimizer that has a posterior. A drop-in for the public `ivon-opt`.

    opt = IVON(model.parameters(), lr=0.4, ess=len(train_set))
    for x, y in batches:
        with opt.sampled_params(train=True):    # θ = m + σ·ε for the length of the block
            opt.zero_grad()
            loss(model(x), y).backward()        # several micro-batches in one block share one draw
        opt.step()                              # several blocks before a step: the mean of these samples

The posterior is q(θ) = N(m, diag(σ²)) with σ² = 1/(ess·(h + δ)). Outside a sampled block the parameters are
the mean m. Per parameter, `state[p]` holds the momentum `g` and the Hessian estimate `h`. The arithmetic is
done on one flat vector for all parameters of one group, dtype and device, so a step is a few dozen operations
whatever the model.

[S] Shen et al., "Variational Learning is Effective for Large Deep Networks", ICML 2024.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from math import inf, sqrt

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten
from torch._utils import _unflatten_dense_tensors as unflatten


def posterior_sigma(h: Tensor, ess: float, delta: float) -> Tensor:
    """σ = 1/√(ess·(h + δ)). Source: [S] algorithm 1."""
    return (ess * (h + delta)).rsqrt()


def hessian_estimate(g_hat: Tensor, deviation: Tensor, sigma: Tensor) -> Tensor:
    """ĥ = ĝ·(θ − m)/σ², Price's (or Stein's) identity for one draw. Source: [S] algorithm 1."""
    return g_hat * deviation / sigma**2


def updated_hessian(h: Tensor, h_hat: Tensor, beta2: float, delta: float) -> Tensor:
    """h ← β2 h + (1 − β2) ĥ + ½(1 − β2)²(h − ĥ)²/(h + δ): positive whatever ĥ is. Source: [S] algorithm 1."""
    change = (1 - beta2) * (h_hat - h)
    return h + change + 0.5 * change**2 / (h + delta)


def updated_mean(m: Tensor, g_bar: Tensor, h: Tensor, alpha: float, delta: float, xi: float) -> Tensor:
    """m ← m − α·clip((ḡ + δ m)/(h + δ), ±ξ). Source: [S] algorithm 1, with the clip of its released code."""
    return m - alpha * ((g_bar + delta * m) / (h + delta)).clamp(-xi, xi)


class IVON(torch.optim.Optimizer):
    """Improved variational online Newton.

    Args:
        params: parameters, or groups of them, which can differ in every setting but mc_samples and sync.
        lr: step size; α = lr·(h0 + δ) with `rescale_lr`, else α = lr.
        ess: effective sample size λ; in the papers the training set's. Larger: a narrower posterior.
        hess_init: h0 > 0. Larger: a narrower posterior at the start.
        beta1: decay of the gradient's average g.
        beta2: decay of the Hessian's average h. Its memory is 1/(1 − beta2) steps: for σ to become
            informative within a run that should be well below the run's length.
        weight_decay: δ ≥ 0, the prior's precision divided by ess.
        mc_samples: how often `step` calls a closure; without one it averages the blocks it finds.
        hess_approx: "price", ĥ = ĝ·(θ − m)/σ², or "gradsq", ĥ = ess·ĝ².
        clip_radius: ξ, the largest change of a parameter in one step, in units of α.
        sync: average ĝ and ĥ over the processes of torch.distributed, each of which draws for itself.
        debias: ḡ = g/(1 − β1^t), else ḡ = g.
        rescale_lr: see lr.

    Raises ValueError for a setting out of range. Source: [S] algorithm 1.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        ess: float,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        hess_approx: str = "price",
        clip_radius: float = inf,
        sync: bool = False,
        debias: bool = True,
        rescale_lr: bool = True,
    ):
        if mc_samples < 1:
            raise ValueError(f"mc_samples must be at least 1, not {mc_samples}")
        self.mc_samples, self.sync = mc_samples, sync
        self._sampled = False  # whether inside a block
        # Of each block since the last step: every parameter's ĝ and θ − m.
        self._draws: list[dict[Tensor, tuple[Tensor, Tensor]]] = []
        defaults = {"lr": lr, "ess": ess, "hess_init": hess_init, "beta1": beta1, "beta2": beta2}
        defaults |= {"weight_decay": weight_decay, "hess_approx": hess_approx, "clip_radius": clip_radius}
        super().__init__(params, defaults | {"debias": debias, "rescale_lr": rescale_lr, "step": 0})

    def add_param_group(self, param_group: dict) -> None:
        setting = self.defaults | param_group
        for name, allowed in {
            "lr": setting["lr"] >= 0,
            "ess": setting["ess"] > 0,
            "hess_init": setting["hess_init"] > 0,
            "beta1": 0 <= setting["beta1"] < 1,
            "beta2": 0 <= setting["beta2"] < 1,
            "weight_decay": setting["weight_decay"] >= 0,
            "clip_radius": setting["clip_radius"] > 0,
            "hess_approx": setting["hess_approx"] in ("price", "gradsq"),
        }.items():
            if not allowed:
                raise ValueError(f"IVON cannot work with {name} = {setting[name]}")
        super().add_param_group(param_group)

    @contextmanager
    def sampled_params(self, train: bool = False, temperature: float = 1.0) -> Iterator[None]:
        """For the length of the block θ is a draw from N(m, diag(τσ²)); afterwards it is exactly m again.

        With `train`, the gradients that the block leaves in `p.grad` become one Monte-Carlo sample of the
        next `step`. `p.grad` is empty when such a block starts and when it ends: what was there before is
        ignored, and so is a block that raises. Without `train` (prediction), gradients and state are left
        alone.

        Args:
            temperature: τ ≥ 0; 0 is the mean, 1 the posterior (the only one to train with).

        Raises ValueError for another τ, RuntimeError inside another block.
        """
        if not temperature >= 0 or (train and temperature != 1):
            raise ValueError(
                f"temperature must be {'1 in training' if train else '0 or more'}, not {temperature}"
            )
        if self._sampled:
            raise RuntimeError("sampled_params cannot be entered inside another sampled_params block")
        buckets = []  # parameters, their mean and their deviation from it
        grads = {p: p.grad for _, params in self._buckets() for p in params} if train else {}
        self._sampled = True
        try:
            for group, params in self._buckets():
                mean, deviation = self._sample(group, params, temperature)
                buckets.append((params, mean, deviation))
                with torch.no_grad():
                    torch._foreach_copy_(params, unflatten(mean + deviation, params))
            for p in grads:
                p.grad = None
            yield
            if train:
                self._draws.append({
                    p: (p.grad, part)
                    for params, _, deviation in buckets
                    for p, part in zip(params, unflatten(deviation, params), strict=True)
                    if p.grad is not None
                })  # fmt: skip
                grads = dict.fromkeys(grads)
        finally:
            self._sampled = False
            for p, grad in grads.items():
                p.grad = grad
            with torch.no_grad():
                for params, mean, _ in buckets:
                    torch._foreach_copy_(params, unflatten(mean, params))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update g, h and m from the blocks since the last step; `p.grad` is then their average gradient ĝ.

        A closure is called `mc_samples` times; it opens `sampled_params(train=True)` itself, as with the
        public implementation, and the mean of what it returns is returned. A parameter that no block gave a
        gradient is left as it is. Raises RuntimeError if there was no block.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = sum(closure() for _ in range(self.mc_samples)) / self.mc_samples
        if not self._draws:
            raise RuntimeError(
                "IVON's step needs gradients from inside `with optimizer.sampled_params(train=True)`"
            )
        for group in self.param_groups:
            group["step"] += 1
        # Processes that reduce together have to agree on the parameters, whichever got a gradient here.
        for group, params in self._buckets(among=None if self.sync else set().union(*self._draws)):
            self._update(group, params)
        self._draws.clear()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._draws.clear()

    def __getstate__(self) -> dict:
        """For copying; between steps, when there are no draws to take along."""
        return super().__getstate__() | {"mc_samples": self.mc_samples, "sync": self.sync}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({"_sampled": False, "_draws": []} | state)

    def sigma(self, param: Tensor) -> Tensor:
        """The posterior standard deviation σ of one parameter, in its shape. ValueError if it is not ours."""
        return self.sigmas([param])[0]

    @torch.no_grad()
    def sigmas(self, params: Collection[Tensor]) -> list[Tensor]:
        """`sigma` of many parameters, computed together."""
        found = {}
        for group, bucket in self._buckets(among=set(params)):
            h = flatten([self._state(p, group)["h"] for p in bucket])
            sigma = posterior_sigma(h, group["ess"], group["weight_decay"])
            found.update(zip(bucket, unflatten(sigma, bucket), strict=True))
        if any(p not in found for p in params):
            raise ValueError("sigma was asked for a tensor that is not a parameter of this optimizer")
        return [found[p] for p in params]

    def _buckets(self, among: Collection[Tensor] | None = None) -> Iterator[tuple[dict, list[Tensor]]]:
        """Each group's parameters, those in `among` or else the trainable ones, split by device and dtype."""
        for group in self.param_groups:
            buckets = defaultdict(list)
            for p in group["params"]:
                if p.requires_grad if among is None else p in among:
                    buckets[p.device, p.dtype].append(p)
            for params in buckets.values():
                yield group, params

    def _state(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        if not self.state[p]:
            self.state[p]["g"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            self.state[p]["h"] = torch.full_like(p, group["hess_init"], memory_format=torch.contiguous_format)
        return self.state[p]

    @torch.no_grad()
    def _sample(self, group: dict, params: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
        """The mean m and a deviation θ − m = √τ·σ·ε of some parameters of a group, each as a flat vector."""
        mean = flatten(params).clone()  # flattening a single tensor gives a view of it
        h = flatten([self._state(p, group)["h"] for p in params])
        sigma = posterior_sigma(h, group["ess"], group["weight_decay"])
        deviation = torch.randn_like(mean) * sigma * sqrt(temperature)
        return mean, deviation

    def _estimates(self, params: list[Tensor], sigma: Tensor, group: dict) -> tuple[Tensor, Tensor]:
        """ĝ and ĥ, flat: means over blocks and, with `sync`, processes; a gradient not given counts as 0."""
        totals = torch.zeros(2, sigma.numel(), dtype=sigma.dtype, device=sigma.device)
        for draw in self._draws:
            none = {p: (torch.zeros_like(p),) * 2 for p in params if p not in draw}
            grads, deviations = zip(*(draw.get(p) or none[p] for p in params), strict=True)
            g_hat = flatten(grads)
            price = group["hess_approx"] == "price"
            h_hat = hessian_estimate(g_hat, flatten(deviations), sigma) if price else group["ess"] * g_hat**2
            totals += torch.stack([g_hat, h_hat])
        totals /= len(self._draws)
        if self.sync and dist.is_initialized():
            dist.all_reduce(totals)
            totals /= dist.get_world_size()
        return totals[0], totals[1]

    def _update(self, group: dict, params: list[Tensor]) -> None:
        """One step for one bucket: ĝ and ĥ, then g, h, ḡ and m."""
        ess, delta, beta1 = group["ess"], group["weight_decay"], group["beta1"]
        states = [self._state(p, group) for p in params]
        g_state, h_state = [state["g"] for state in states], [state["h"] for state in states]
        g, h = flatten(g_state), flatten(h_state)
        g_hat, h_hat = self._estimates(params, posterior_sigma(h, ess, delta), group)

        g = beta1 * g + (1 - beta1) * g_hat
        h = updated_hessian(h, h_hat, group["beta2"], delta)
        g_bar = g / (1 - beta1 ** group["step"]) if group["debias"] else g
        alpha = group["lr"] * (group["hess_init"] + delta if group["rescale_lr"] else 1)
        m = updated_mean(flatten(params), g_bar, h, alpha, delta, group["clip_radius"])

        for destination, flat in ((g_state, g), (h_state, h), (params, m)):
            torch._foreach_copy_(destination, unflatten(flat, params))
        for p, grad in zip(params, unflatten(g_hat, params), strict=True):
            p.grad = grad

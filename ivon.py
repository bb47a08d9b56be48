"""IVON: the optimizer that has a posterior. Constructor and blocks are those of the public `ivon-opt`.

    opt = IVON(model.parameters(), lr=0.4, ess=len(train_set))
    for x, y in batches:
        with opt.sampled_params(train=True):    # θ = m + σ·ε inside the block
            loss(model(x), y).backward()        # several micro-batches in one block share one draw
        opt.step()                              # several blocks before a step: their average

The posterior is q(θ) = N(m, diag(σ²)) with σ² = 1/(ess·(h + δ)). Outside a sampled block the parameters are
the mean m. `state[p]` holds the momentum `g` and the Hessian estimate `h` of a parameter. No operation
synchronises with the device.

[S] Shen et al., "Variational Learning is Effective for Large Deep Networks", ICML 2024.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from math import inf, sqrt

import torch
import torch.distributed as dist
from torch import Tensor

# ---- [S] algorithm 1. All tensors of a call have one shape; `precision` is h + δ. ----


def posterior_sigma(h: Tensor, ess: float, delta: float, out: Tensor | None = None) -> Tensor:
    """σ = 1/√(ess·(h + δ))."""
    return torch.add(h, delta, out=out).mul_(ess).rsqrt_()


def draw_(theta: Tensor, deviation: Tensor, m: Tensor, sigma: Tensor, tau: float) -> None:
    """θ = m + √τ·σ·ε with ε ~ N(0, 1). Writes `theta` and `deviation`, θ − m, which may be σ's memory."""
    torch.mul(sigma, theta.normal_(), out=deviation).mul_(sqrt(tau))
    torch.add(m, deviation, out=theta)


def price_estimate_(product: Tensor, precision: Tensor, ess: float) -> Tensor:
    """ĥ = ĝ·(θ − m)/σ² with 1/σ² = ess·(h + δ). `product` is ĝ·(θ − m), and becomes ĥ."""
    return product.mul_(ess).mul_(precision)


def gradsq_estimate_(product: Tensor, ess: float) -> Tensor:
    """ĥ = ess·ĝ². `product` is ĝ², and becomes ĥ."""
    return product.mul_(ess)


def update_hessian_(h: Tensor, h_hat: Tensor, precision: Tensor, beta2: float) -> None:
    """h ← β2 h + (1 − β2) ĥ + ½(1 − β2)²(h − ĥ)²/(h + δ).

    The last term keeps h + δ at half its old value or more, whatever ĥ is, so σ stays real. Uses up `h_hat`.
    """
    change = h_hat.sub_(h).mul_(1 - beta2)  # (1 − β2)(ĥ − h)
    h.add_(change)
    h.addcdiv_(change.square_(), precision, value=0.5)  # + ½(1 − β2)²(h − ĥ)²/(h + δ)


def update_mean_(m: Tensor, g_bar: Tensor, precision: Tensor, delta: float, alpha: float, xi: float) -> None:
    """m ← m − α·clip((ḡ + δ m)/(h + δ), ±ξ); the clip is that of the authors' code. Uses up `g_bar`."""
    change = g_bar.add_(m, alpha=delta).div_(precision)
    m.sub_(change.clamp_(-xi, xi), alpha=alpha)


def at_least_float32(x: Tensor) -> torch.dtype:
    """In 16 bits ess·(h + δ) overflows, or h is too coarse to move."""
    return torch.promote_types(x.dtype, torch.float32)


class Flat:
    """The trained parameters of one group, device and dtype as vectors (n,), and their views.

    An update is then some thirty operations, whatever the model. The vectors are kept between steps:
    allocating them would take longer than the arithmetic.
    """

    def __init__(self, group: dict, params: list[Tensor], states: list[dict[str, Tensor]]):
        self.group, self.params = group, params
        self.price = group["hess_approx"] == "price"
        self.g, self.h = (torch.cat([state[name].flatten() for state in states]) for name in ("g", "h"))
        self.m, self.theta, self.deviation = (torch.empty_like(self.h) for _ in range(3))  # deviation: θ − m
        # Sums over the blocks since the last step, then means: ĝ, and ĝ·(θ − m) or ĝ².
        self.estimates = torch.zeros(2, len(self.h), dtype=self.h.dtype, device=self.h.device)
        self.g_hat, self.product = self.estimates
        self.blocks = 0  # how many are in these sums
        names = ("g", "h", "m", "theta", "deviation", "g_hat", "product")
        self.views = {name: self.split(getattr(self, name)) for name in names}
        for state, g, h in zip(states, self.views["g"], self.views["h"], strict=True):
            state.update(g=g, h=h)

    def split(self, vector: Tensor) -> list[Tensor]:
        pieces = vector.split([p.numel() for p in self.params])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.params, strict=True)]

    def is_current(self, params: list[Tensor], states: list[dict[str, Tensor]]) -> bool:
        """Whether each `state["h"]` is still our view; loading, replacing or reshaping ends that."""
        mine = zip(params, states, self.views["h"], strict=False)
        same = all(state.get("h") is h and p.shape == h.shape for p, state, h in mine)
        return same and len(params) == len(self.params)

    def save_mean(self) -> None:
        torch._foreach_copy_(self.views["m"], self.params)

    def restore_mean(self) -> None:
        torch._foreach_copy_(self.params, self.views["m"])

    def draw(self, temperature: float) -> None:
        sigma = posterior_sigma(self.h, self.group["ess"], self.group["weight_decay"], out=self.deviation)
        draw_(self.theta, self.deviation, self.m, sigma, temperature)
        torch._foreach_copy_(self.params, self.views["theta"])

    def add_block(self) -> None:
        """Add one draw's gradients to the sums; a missing gradient counts as 0."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError("IVON does not support sparse gradients")
        if not self.blocks:
            self.estimates.zero_()
        torch._foreach_add_(self.views["g_hat"], grads)
        others = self.views["deviation"] if self.price else grads
        torch._foreach_addcmul_(self.views["product"], grads, others)
        self.blocks += 1

    def update(self) -> None:
        """One step of the group's g, h and m."""
        group, g, h, m, product = self.group, self.g, self.h, self.m, self.product
        ess, delta, beta1, beta2 = (group[name] for name in ("ess", "weight_decay", "beta1", "beta2"))
        if self.blocks > 1:
            self.estimates.div_(self.blocks)
        self.blocks = 0
        if group["sync"] and dist.is_initialized():
            dist.all_reduce(self.estimates)
            self.estimates.div_(dist.get_world_size())
        precision, g_bar = self.theta, self.deviation  # the draw's buffers, which are no longer needed
        g.lerp_(self.g_hat, 1 - beta1)  # g ← β1 g + (1 − β1) ĝ
        torch.add(h, delta, out=precision)
        price = self.price
        h_hat = price_estimate_(product, precision, ess) if price else gradsq_estimate_(product, ess)
        update_hessian_(h, h_hat, precision, beta2)
        torch.add(h, delta, out=precision)
        torch.div(g, 1 - beta1 ** group["step"] if group["debias"] else 1, out=g_bar)  # ḡ = g/(1 − β1^t)
        alpha = group["lr"] * (group["hess_init"] + delta if group["rescale_lr"] else 1)
        self.save_mean()
        update_mean_(m, g_bar, precision, delta, alpha, group["clip_radius"])
        self.restore_mean()
        for p, grad in zip(self.params, self.views["g_hat"], strict=True):
            p.grad = grad.to(p.dtype)  # for scores that use the gradient


class IVON(torch.optim.Optimizer):
    """Improved variational online Newton. Source: [S] algorithm 1.

    Args:
        params: parameters, or groups of them, which can differ in every setting but mc_samples and sync.
        lr: step size; α = lr·(h0 + δ) with `rescale_lr`, else α = lr.
        ess: effective sample size (λ in [S]); in the papers, training examples. Larger: a narrower posterior.
        hess_init: h0 > 0. Larger: a narrower posterior at the start.
        beta1: decay of the gradient's average g.
        beta2: decay of the Hessian's average h. Its memory is 1/(1 − beta2) steps: for σ to become
            informative within a run, that should be well below the run's length. At 1, h stays h0.
        weight_decay: δ ≥ 0, the prior's precision divided by ess.
        mc_samples: how often `step` calls a closure; without one it averages the blocks it finds.
        hess_approx: "price", ĥ = ĝ·(θ − m)/σ², or "gradsq", ĥ = ess·ĝ².
        clip_radius: ξ, the largest change of a parameter in one step, in units of α.
        sync: average ĝ and ĥ over the processes of torch.distributed, each of which draws for itself. With
            DistributedDataParallel, compute gradients in `model.no_sync()`: it would average them first.
        debias: ḡ = g/(1 − β1^t), else ḡ = g.
        rescale_lr: see lr.

    Raises ValueError for a setting out of range.
    """

    def __init__(
        self, params: Iterable, lr: float, ess: float, hess_init: float = 1.0, beta1: float = 0.9,
        beta2: float = 0.99999, weight_decay: float = 1e-4, mc_samples: int = 1, hess_approx: str = "price",
        clip_radius: float = inf, sync: bool = False, debias: bool = True, rescale_lr: bool = True,
    ):  # fmt: skip
        defaults = {
            "lr": lr, "ess": ess, "hess_init": hess_init, "beta1": beta1, "beta2": beta2, "step": 0,
            "weight_decay": weight_decay, "mc_samples": mc_samples, "hess_approx": hess_approx,
            "clip_radius": clip_radius, "sync": sync, "debias": debias, "rescale_lr": rescale_lr,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._drop_vectors()

    def add_param_group(self, param_group: dict) -> None:
        s = self.defaults | param_group
        in_range = {
            "lr": s["lr"] >= 0, "ess": s["ess"] > 0, "hess_init": s["hess_init"] > 0,
            "beta1": 0 <= s["beta1"] < 1, "beta2": 0 <= s["beta2"] <= 1, "clip_radius": s["clip_radius"] > 0,
            "weight_decay": s["weight_decay"] >= 0, "mc_samples": s["mc_samples"] >= 1,
            "hess_approx": s["hess_approx"] in ("price", "gradsq"),
        }  # fmt: skip
        if wrong := [name for name, right in in_range.items() if not right]:
            raise ValueError(f"IVON: {wrong[0]} = {s[wrong[0]]} is out of range")
        super().add_param_group(param_group)

    @contextmanager
    def sampled_params(self, train: bool = False, temperature: float = 1.0) -> Iterator[None]:
        """Inside the block θ is a draw from N(m, diag(τσ²)), τ ≥ 0; afterwards it is exactly m again.

        With `train`, the gradients that the block leaves in `p.grad` become one Monte-Carlo sample of the
        next `step`; `p.grad` is None when such a block starts and when it ends. A block that raises is
        discarded. Without `train` (prediction), gradients and state are left alone. Raises ValueError if
        τ < 0, or τ ≠ 1 with `train`; RuntimeError inside another block, for sparse gradients, and where
        parameters are changed inside the block.
        """
        if not temperature >= 0 or (train and temperature != 1):
            raise ValueError(f"temperature must be at least 0, and 1 in training, not {temperature}")
        if self._sampled:
            raise RuntimeError("sampled_params cannot be entered inside another sampled_params block")
        flats = self._gather(frozen=not train)
        params = [p for flat in flats for p in flat.params]
        trained = params if train else []
        with torch.no_grad():
            for flat in flats:
                flat.save_mean()
        self._sampled = True
        try:
            with torch.no_grad():
                for flat in flats:
                    flat.draw(temperature)
            for p in trained:
                p.grad = None
            versions = [p._version for p in params]
            yield
            if versions != [p._version for p in params]:
                raise RuntimeError("parameters were changed inside a sampled_params block")
            with torch.no_grad():
                for flat in flats if train else ():
                    flat.add_block()
        finally:
            self._sampled = False
            for p in trained:
                p.grad = None
            with torch.no_grad():
                for flat in flats:
                    flat.restore_mean()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update g, h and m from the blocks since the last step; `p.grad` is then their average gradient ĝ.

        A closure is called `mc_samples` times, opens `sampled_params(train=True)` itself, and the mean of
        what it returns is returned. Raises RuntimeError if there was no block, or if the trained parameters
        are no longer those that the blocks had.
        """
        loss = None
        if closure is not None:
            n = self.defaults["mc_samples"]
            with torch.enable_grad():
                loss = sum(closure() for _ in range(n)) / n
        flats = self._gather()
        blocks = {flat.blocks for flat in flats}
        if self._sampled or self._lost or len(blocks) != 1 or blocks == {0}:
            raise RuntimeError(
                "IVON's step comes after `with optimizer.sampled_params(train=True)` around the backward "
                "pass; no parameter may be frozen, added or replaced in between"
            )
        for group in self.param_groups:
            group["step"] += 1
        for flat in flats:
            flat.update()
        return loss

    def discard_samples(self) -> None:
        """Forget the training blocks since the last step, whose step is skipped (by a GradScaler, say)."""
        self._lost = False
        for flat in self._flats.values():
            flat.blocks = 0

    def sigma(self, param: Tensor) -> Tensor:
        """The posterior standard deviation σ of one parameter, in its shape. ValueError if it is not ours."""
        return self.sigmas([param])[0]

    @torch.no_grad()
    def sigmas(self, params: Collection[Tensor]) -> list[Tensor]:
        """`sigma` of many parameters, in few operations. Plain form: `posterior_sigma`, one by one."""
        asked, found = set(params), {}
        for group in self.param_groups:
            if own := [p for p in group["params"] if p in asked]:
                precision = torch._foreach_add(
                    [self._state(p, group)["h"] for p in own], group["weight_decay"]
                )
                torch._foreach_mul_(precision, group["ess"])
                torch._foreach_rsqrt_(precision)  # σ = 1/√(ess·(h + δ))
                found.update(zip(own, precision, strict=True))
        if len(found) < len(asked):
            raise ValueError("sigma was asked for a tensor that is not a parameter of this optimizer")
        return [found[p] for p in params]

    def __setstate__(self, state: dict) -> None:
        """Called by `load_state_dict`, deepcopy and unpickling."""
        super().__setstate__(state)
        for p, own in self.state.items():  # which have the parameter's type now
            own.update({name: x.to(at_least_float32(p)) for name, x in own.items()})
        self._drop_vectors()

    def _drop_vectors(self) -> None:
        self._flats: dict[tuple, Flat] = {}  # by group, device and dtype
        self._sampled = False  # whether inside a block
        self._lost = False  # whether blocks were lost because parameters changed before `step`

    def _state(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            with torch.inference_mode(False):
                how = {"dtype": at_least_float32(p), "memory_format": torch.contiguous_format}
                state["g"] = torch.zeros_like(p, **how)
                state["h"] = torch.full_like(state["g"], group["hess_init"])
        if state["h"].shape != p.shape:
            raise RuntimeError("a parameter's shape is no longer its state's: load the optimizer's state too")
        return state

    def _gather(self, frozen: bool = False) -> list[Flat]:
        """The trainable parameters as vectors: those of the last call where they are still current.

        `frozen`: also those that were trained and no longer are, which have a posterior, too.
        """
        kept = {}
        for i, group in enumerate(self.param_groups):
            buckets = defaultdict(list)
            for p in group["params"]:
                if p.requires_grad or (frozen and self.state.get(p)):
                    buckets[i, p.device, p.dtype].append(p)
            for key, params in buckets.items():
                flat = self._flats.get(key)
                if flat is None or not flat.is_current(params, [self.state[p] for p in params]):
                    with torch.inference_mode(False), torch.no_grad():  # training uses them, too
                        flat = Flat(group, params, [self._state(p, group) for p in params])
                kept[key] = flat
        self._lost |= any(flat.blocks for key, flat in self._flats.items() if kept.get(key) is not flat)
        self._flats = kept
        return list(kept.values())

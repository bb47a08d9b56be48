"""The forward pass of adalora.py's adapters and its penalty's gradient, in fewer operations.

    layers = inject(model, targets, rank=3, alpha=32)
    fuse(model, layers)                              # from here on: same results up to rounding
    ...backward...
    add_penalty_gradients(layers, gamma)             # instead of adalora.add_penalty_gradients

Optional: without this file, and without the blocks of run_glue.py and tools/finished.py that import it, the
plain forms are used. Each docstring names its own; tests/formulas/test_fused.py compares the two.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalora import LoRALinear, SVDLinear, add_low_rank


def fuse(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Give the adapters of `model` the forward pass below. Plain form: SVDLinear.forward, LoRALinear.forward.

    Raises RuntimeError in a backward pass with create_graph=True. One thread at a time can use the model.
    """
    svd = [layer for layer in layers.values() if isinstance(layer, SVDLinear)]
    for layer in layers.values():
        layer.forward = MethodType(forward, layer)
    for layer in svd:
        layer.scaled = None
    if svd:
        together = ScaleTogether(svd)
        model.register_forward_pre_hook(together.before)
        model.register_forward_hook(together.after, always_call=True)


def forward(layer: SVDLinear | LoRALinear, x: Tensor) -> Tensor:
    """Plain form: SVDLinear.forward, LoRALinear.forward."""
    if not layer.rank:
        return layer.base(x)
    if isinstance(layer, LoRALinear):
        B = layer.scaling * layer.B
        factor, A = Scaled(B, B.detach().T), layer.A
    else:
        factor, A = scaled_factor(layer), layer.Q
    base, dropout = layer.base, layer.dropout
    if (
        not _only_multiplies(base)
        or not base.weight.dtype == x.dtype == A.dtype
        or (dropout.training and dropout.p)
        or torch.is_autocast_enabled(x.device.type)
        or torch.compiler.is_compiling()  # torch 2.11 loses AddLowRank's gradients then
    ):
        return add_low_rank(layer, x, factor.B, A)
    y = AddLowRank.apply(x.reshape(-1, x.shape[-1]), base.weight, base.bias, factor.B, A, factor.Bt)
    return y.view(*x.shape[:-1], y.shape[-1])


def _only_multiplies(base: nn.Module) -> bool:
    """Whether base(x) is x Wᵀ + b with W and b frozen, and nothing else happens when it is called."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    frozen = not any(p.requires_grad for p in base.parameters())
    return type(base) is nn.Linear and frozen and not any(hooks) and "forward" not in base.__dict__


class AddLowRank(torch.autograd.Function):
    """y = x Wᵀ + b + (x Aᵀ) Bᵀ with W and b frozen. Plain form: adalora.add_low_rank.

    Two operations more than the frozen map's forward pass, four more than its backward pass. Shapes:
    x (n, d_in), W (d_out, d_in), B (d_out, r), A (r, d_in). `Bt` is Bᵀ without a gradient: products with
    factors of r rows are faster than with factors of r columns, so u is A xᵀ, and Bt is laid out row by row.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, b: Tensor | None, B: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
        u = A @ x.T
        ctx.save_for_backward(x, W, A, Bt, u)
        return F.linear(x, W, b).addmm_(u.T, Bt)

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("fused adapters have no second derivatives: use --plain, or do not call fuse")
        x, W, A, Bt, u = ctx.saved_tensors
        grad_u = Bt @ grad_y.T
        grad_x = (grad_y @ W).addmm_(grad_u.T, A) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, (u @ grad_y).T, grad_u @ x, None


class Scaled(NamedTuple):
    """B = s·P Λ (or s·B), (d_out, r), and its transpose, which has no gradient."""

    B: Tensor
    Bt: Tensor


def scaled_factor(layer: SVDLinear) -> Scaled:
    """ScaleTogether's factor for this layer; a fresh one outside the model's forward pass, under activation
    checkpointing, or if gradients have been switched on or off since."""
    wanted = torch.is_grad_enabled() and (layer.P.requires_grad or layer.lam.requires_grad)
    if layer.scaled is None or layer.scaled.B.requires_grad != wanted or _in_checkpoint():
        return scale([layer])[0]
    return layer.scaled


def _in_checkpoint() -> bool:
    """Whether saved tensors go through hooks: activation checkpointing calls the layer again, on its own."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def scale(same: list[SVDLinear]) -> list[Scaled]:
    """s·P Λ of adapters of one shape and one s, in a few operations. Plain form: s * P * lam, one by one."""
    lam = torch.stack([layer.lam for layer in same])
    B = torch.stack([layer.P for layer in same]) * (same[0].scaling * lam).unsqueeze(1)
    return list(map(Scaled, B.unbind(), B.detach().mT.contiguous().unbind()))


class ScaleTogether:
    """Hooks of a model: during its forward pass each adapter has its `scaled`."""

    def __init__(self, layers: Iterable[SVDLinear]):
        self.layers = list(layers)

    def before(self, _model: nn.Module, _inputs: tuple) -> None:
        by_shape = defaultdict(list)
        for layer in self.layers:
            by_shape[layer.P.shape, layer.P.dtype, layer.P.device, layer.scaling].append(layer)
        for same in by_shape.values():
            for layer, scaled in zip(same, scale(same), strict=True):
                layer.scaled = scaled

    def after(self, *_: object) -> None:
        for layer in self.layers:
            layer.scaled = None


@torch.no_grad()
def add_penalty_gradients(layers: Mapping[str, nn.Module], gamma: float, squared: bool = False) -> None:
    """Add γ·∂R/∂P and γ·∂R/∂Q to the gradients. Plain form: adalora.add_penalty_gradients.

    All P, and all Q, of one shape are one batch. R is the mean of the norms over all `matrices`, or a sum.
    """
    if not gamma:
        return
    stacks = defaultdict(list)
    for layer in layers.values():
        for part in ("P", "Q") if isinstance(layer, SVDLinear) else ():
            p = getattr(layer, part)
            stacks[part, p.shape, p.dtype, p.device].append(p)
    matrices = sum(map(len, stacks.values()))
    params, grads = [], []
    for (part, *_), same in stacks.items():
        half = half_norm_gradient(torch.stack(same), part, squared).unbind()
        moving = [(p, grad) for p, grad in zip(same, half, strict=True) if p.requires_grad]
        params += [p for p, _ in moving]
        grads += [grad for _, grad in moving]
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if params:
        weight = 4 * gamma if squared else 2 * gamma / matrices
        torch._foreach_add_([p.grad for p in params], grads, alpha=weight)


def half_norm_gradient(X: Tensor, part: str, squared: bool) -> Tensor:
    """Half of ∂‖E‖/∂P = 2PE/‖E‖ with E = PᵀP − I, or of ∂‖E‖/∂Q = 2EQ/‖E‖ with E = QQᵀ − I; 0 where E is 0.

    `squared`: a quarter of ∂‖E‖²/∂P = 4PE, or of 4EQ. Shapes: X and the result (n, d_out, r) for P,
    (n, r, d_in) for Q.
    """
    left, right = (X.mT, X) if part == "P" else (X, X.mT)
    I = torch.eye(left.shape[1], dtype=X.dtype, device=X.device).expand(len(X), -1, -1)
    E = torch.baddbmm(I, left, right, beta=-1)
    if not squared:
        norm = torch.linalg.vector_norm(E, dim=(1, 2), keepdim=True)
        E = E / norm.clamp_min(torch.finfo(E.dtype).tiny)
    return X @ E if part == "P" else E @ X

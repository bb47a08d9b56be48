"""Low-rank adapters, SVD-parameterised (AdaLoRA) and plain (LoRA): injection, penalty, removing triplets.

    layers = inject(model, ["query", "value"], rank=3, alpha=32)     # {module name: SVDLinear}
    loss = task_loss + gamma * orthogonality_penalty(layers)

fused.py has the same forward pass and penalty in fewer operations.

[A] Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023.
[H] Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Modules after the encoder: trained in full, never adapted.
HEADS = {"pooler", "classifier", "pre_classifier", "classification_head", "logits_proj", "sequence_summary"}
HEADS |= {"score", "lm_head", "cls", "qa_outputs", "head"}


def add_low_rank(layer: nn.Module, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """base(x) + B A x, where B A x is computed in the adapter's dtype, even under autocast.

    Shapes: x (…, d_in), B (d_out, r), A (r, d_in) → (…, d_out).
    """
    y = layer.base(x)
    with torch.autocast(x.device.type, enabled=False):
        return y + F.linear(F.linear(layer.dropout(x).to(A.dtype), A), B).to(y.dtype)


def merged_weight(layer: nn.Module) -> Tensor:
    """W + ΔW, differentiable: for modules that read a map's weight instead of calling it."""
    return layer.base.weight + layer.delta().to(layer.base.weight.dtype)


class SVDLinear(nn.Module):
    """y = base(x) + s·P Λ Q x with Λ = diag(λ). Source: [A] eq. 3.

    s = alpha/rank is a constant: it does not follow the rank down. Shapes: P (d_out, r), lam = λ (r,),
    Q (r, d_in). P, Q ~ N(0, 0.02²) and λ = 0, so a fresh adapter changes nothing. Rank 0 is allowed.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.scaling, self.dropout = base, alpha / max(rank, 1), nn.Dropout(dropout)
        beside = {"device": base.weight.device, "dtype": torch.float32}
        self.P = nn.Parameter(torch.empty(base.out_features, rank, **beside).normal_(std=0.02))
        self.lam = nn.Parameter(torch.zeros(rank, **beside))
        self.Q = nn.Parameter(torch.empty(rank, base.in_features, **beside).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        return add_low_rank(self, x, self.scaling * self.P * self.lam, self.Q)  # P Λ: column i times λ_i

    def delta(self) -> Tensor:
        """s·P Λ Q, what the adapter adds to the base's weight: (d_out, d_in)."""
        return self.scaling * self.P * self.lam @ self.Q

    rank = property(lambda self: self.lam.numel())
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)
    weight, bias = property(merged_weight), property(lambda self: self.base.bias)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        """A saved adapter may have fewer triplets."""
        lam = state_dict.get(f"{prefix}lam", self.lam)
        if lam.ndim == 1 and len(lam) != self.rank:
            replace_data_(self.P, self.P.data.new_empty(self.P.shape[0], len(lam)))
            replace_data_(self.lam, self.lam.data.new_empty(len(lam)))
            replace_data_(self.Q, self.Q.data.new_empty(len(lam), self.Q.shape[1]))
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoRALinear(nn.Module):
    """y = base(x) + s·B A x with s = alpha/r. Shapes: B = 0 (d_out, r), A (r, d_in). Source: [H] eq. 3."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.scaling, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        beside = {"device": base.weight.device, "dtype": torch.float32}
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **beside))
        self.A = nn.Parameter(torch.empty(rank, base.in_features, **beside))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)  # as the authors' code; the paper says Gaussian

    def forward(self, x: Tensor) -> Tensor:
        return add_low_rank(self, x, self.scaling * self.B, self.A)

    def delta(self) -> Tensor:
        """s·B A, what the adapter adds to the base's weight: (d_out, d_in)."""
        return self.scaling * self.B @ self.A

    rank = property(lambda self: self.A.shape[0])
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)
    weight, bias = property(merged_weight), property(lambda self: self.base.bias)


KINDS = {"svd": SVDLinear, "lora": LoRALinear}


# ---- injection -----------------------------------------------------------------------------------------


def inject(
    model: nn.Module, targets: Iterable[str], rank: int, alpha: float, dropout: float = 0.0, kind: str = "svd"
) -> dict[str, nn.Module]:
    """Freeze `model` and put a trainable adapter around each linear map in `targets`, heads excepted.

    Args:
        targets: ends of module names, whole dotted parts ("output.dense" is not "pooler.dense").
        rank: r at the start; 0, for "svd" alone, gives adapters with nothing in them.
        dropout: of the adapter's input.
        kind: "svd" or "lora".

    Adapters work on any `nn.Linear`, subclasses included. Returns them by module name, in the model's order.
    Raises ValueError, leaving the model unchanged, for a target that names no linear map, one whose weight is
    tied to another's, a model that has adapters already, or an impossible rank.
    """
    if kind not in KINDS or rank < (kind == "lora"):
        raise ValueError(f"there is no {kind} adapter of rank {rank}: svd has 0 or more, lora 1 or more")
    if isinstance(targets, str):
        raise ValueError(f"targets is a list of names: [{targets!r}]")
    if any(isinstance(module, (SVDLinear, LoRALinear)) for module in model.modules()):
        raise ValueError("the model has adapters already: name all targets in one call")
    found = find_targets(model, list(targets))
    model.requires_grad_(False)
    layers = {name: KINDS[kind](base, rank, alpha, dropout) for name, base in found.items()}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return layers


def find_targets(model: nn.Module, targets: list[str]) -> dict[str, nn.Linear]:
    """The linear maps that `targets` name, heads excepted. Raises ValueError as `inject` does."""
    found, missed = {}, set(targets)
    for name, module in model.named_modules():
        matches = [target for target in targets if f".{name}".endswith(f".{target}")]
        if not matches or in_head(name):
            continue
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} is a {type(module).__name__}; adapters go around nn.Linear alone")
        if others := _names_of(model, module.weight) - {f"{name}.weight"}:
            raise ValueError(f"{name} is tied to {min(others)}: an adapter around one of them would be wrong")
        found[name] = module
        missed.difference_update(matches)
    if heads := sorted(filter(in_head, missed)):
        raise ValueError(f"{heads[0]} is part of the head, which is trained in full: leave it out")
    if missed or not targets:
        kinds = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "weight")})
        there = ", ".join(linear_maps(model)) or f"no nn.Linear to adapt, but {', '.join(kinds)}"
        wrong = f"no linear map is called {', '.join(sorted(missed))}" if missed else "targets is empty"
        raise ValueError(f"{wrong}; this model has {there}")
    return found


def linear_maps(model: nn.Module) -> list[str]:
    """What `targets` can be: the last two parts of linear maps' names; no heads, nothing tied."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not in_head(name) and len(_names_of(model, module.weight)) == 1
    ]
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def in_head(name: str) -> bool:
    """Whether a parameter or module belongs to a head, which is trained in full."""
    return not HEADS.isdisjoint(name.split("."))


def _names_of(model: nn.Module, weight: Tensor) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p is weight}


# ---- the penalty ---------------------------------------------------------------------------------------


def orthogonality_penalty(layers: Mapping[str, nn.Module], squared: bool = False) -> Tensor:
    """R(P, Q): how far P's columns and Q's rows are from orthonormal, a scalar.

    The mean of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F over all P and Q, as in the authors' code, on which the published
    γ were tuned; with `squared` the sum of their squares, as the paper writes it ([A] eq. 4). The norm's
    gradient at an orthonormal matrix is 0.
    """
    norms = []
    for layer in layers.values():
        I = torch.eye(layer.rank, dtype=layer.P.dtype, device=layer.P.device)
        norms += [torch.linalg.vector_norm(E) for E in (layer.P.T @ layer.P - I, layer.Q @ layer.Q.T - I)]
    norms = torch.stack(norms)
    return norms.square().sum() if squared else norms.mean()


def add_penalty_gradients(layers: Mapping[str, nn.Module], gamma: float, squared: bool = False) -> None:
    """γ·R(P, Q) backward. Adapters without P and Q, or γ = 0, have no penalty: then nothing happens."""
    svd = {name: layer for name, layer in layers.items() if isinstance(layer, SVDLinear)}
    if svd and gamma:
        (gamma * orthogonality_penalty(svd, squared)).backward()


# ---- removing triplets ---------------------------------------------------------------------------------


@torch.no_grad()
def remove_triplets(
    layers: Mapping[str, SVDLinear], kept: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Cut P, λ and Q, their gradients and the optimizer's state of them down to the triplets that are kept.

    Args:
        kept: bool masks by adapter, (r,) each.

    Raises ValueError, before anything is cut, if the optimizer has state of another shape than its parameter.
    """
    check_state_is_prunable(layers, optimizer)
    for name, layer in layers.items():
        index = kept[name].nonzero().squeeze(1)
        for part, dim in (("P", 1), ("lam", 0), ("Q", 0)):
            p = getattr(layer, part)
            state, grad = optimizer.state.get(p, {}), p.grad
            for key, value in state.items():
                if torch.is_tensor(value) and value.shape == p.shape:
                    state[key] = value.index_select(dim, index)
            replace_data_(p, p.data.index_select(dim, index))
            p.grad = None if grad is None else grad.index_select(dim, index)
            delattr(layer, part)  # torch 2.11's compiler misses new shapes unless the module changes
            setattr(layer, part, p)


def check_state_is_prunable(layers: Mapping[str, SVDLinear], optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for optimizer state that is neither parameter-shaped nor a scalar."""
    for name, layer in layers.items():
        for p in (layer.P, layer.lam, layer.Q):
            for key, value in optimizer.state.get(p, {}).items():
                if torch.is_tensor(value) and value.shape != p.shape and value.numel() != 1:
                    shapes = f"the optimizer's {key} is {tuple(value.shape)}, the parameter {tuple(p.shape)}"
                    raise ValueError(f"triplets of {name} cannot be taken out: {shapes}")


def replace_data_(p: nn.Parameter, new: Tensor) -> None:
    """Give a parameter other data, perhaps of another shape. Clears `p.grad`."""
    p.grad = None
    # While a graph of p is held, autograd keeps p's old shape; a change of type makes it forget.
    p.data = new.to(torch.float32 if new.dtype == torch.float16 else torch.float16)
    p.data = new

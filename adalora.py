"""Low-rank adapters, SVD-parameterised (AdaLoRA) and plain (LoRA): injection and orthogonality penalty.

    layers = inject(model, TARGETS["deberta-v2"], rank=3, alpha=32)     # {module name: SVDLinear}
    loss = task_loss + gamma * orthogonality_penalty(layers)

[A] Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023.
[H] Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The six linear maps of an encoder layer, by the architecture's name in its config.json.
_BERT = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
TARGETS = {
    "deberta-v2": ("query_proj", "key_proj", "value_proj", *_BERT[3:]),  # DeBERTaV3 too
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
}
# Parts of a model behind the encoder: usually new, trained as they are.
HEADS = {"pooler", "classifier", "pre_classifier", "classification_head", "logits_proj", "sequence_summary"}
HEADS |= {"score", "lm_head", "cls", "qa_outputs"}


class SVDLinear(nn.Module):
    """y = base(x) + s·P Λ Q x with Λ = diag(λ), s = alpha/r a constant. Source: [A] eq. 3.

    Shapes: P (d_out, r), lam = λ (r,), Q (r, d_in). P, Q ~ N(0, 0.02²) and λ = 0, so a fresh adapter changes
    nothing. `alive` (r,) says which triplets take part: all of them, until whoever allocates the budget
    decides for good. A triplet that is not alive contributes nothing and gets no gradient, whatever its
    entries are.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base = base
        self.scaling = alpha / rank if rank else 0.0
        self.dropout = nn.Dropout(dropout)
        factory = {"device": base.weight.device, "dtype": torch.float32}
        self.P = nn.Parameter(torch.empty(base.out_features, rank, **factory).normal_(std=0.02))
        self.lam = nn.Parameter(torch.zeros(rank, **factory))
        self.Q = nn.Parameter(torch.empty(rank, base.in_features, **factory).normal_(std=0.02))
        self.register_buffer("alive", torch.ones(rank, dtype=torch.bool, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        s_lam = self.scaling * self.lam * self.alive
        y, x = self.base(x), self.dropout(x).to(self.Q.dtype)  # the base may be of a lower precision
        return y + F.linear(F.linear(x, self.Q) * s_lam, self.P).to(y.dtype)

    def delta(self) -> Tensor:
        """s·P Λ Q, what the adapter adds to the base's weight: (d_out, d_in)."""
        return self.scaling * (self.P * (self.lam * self.alive)) @ self.Q


class LoRALinear(nn.Module):
    """y = base(x) + s·B A x with s = alpha/r. Shapes: B = 0 (d_out, r), A (r, d_in). Source: [H] eq. 3."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base = base
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        factory = {"device": base.weight.device, "dtype": torch.float32}
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **factory))
        self.A = nn.Parameter(torch.empty(rank, base.in_features, **factory))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)  # as the authors' code; the paper says Gaussian

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.base(x), self.dropout(x).to(self.A.dtype)
        return y + (self.scaling * F.linear(F.linear(x, self.A), self.B)).to(y.dtype)

    def delta(self) -> Tensor:
        """s·B A, what the adapter adds to the base's weight: (d_out, d_in)."""
        return self.scaling * self.B @ self.A


KINDS = {"svd": SVDLinear, "lora": LoRALinear}


def inject(
    model: nn.Module, targets: Iterable[str], rank: int, alpha: float, dropout: float = 0.0, kind: str = "svd"
) -> dict[str, nn.Module]:
    """Freeze `model` and put a trainable adapter around each linear map of the encoder in `targets`.

    Args:
        targets: ends of module names, whole dotted parts ("output.dense" is not "pooler.dense"); TARGETS has
            those of the known architectures.
        rank: r at the start; 0, for "svd" alone, gives adapters with nothing in them.
        kind: "svd" or "lora".

    A map that computes y = Wx + b in a way of its own, as quantised ones do, has to be an nn.Linear by
    inheritance; nothing else is asked of it.

    Returns the adapters by module name, in the model's order. Raises ValueError, the model untouched, for a
    target that names no linear map, one whose weight is tied to another's, or a rank that cannot be.
    """
    if rank < (kind == "lora"):
        raise ValueError(f"{kind} adapters cannot have rank {rank}")
    targets = tuple(targets)
    found, missed = {}, set(targets)
    for name, module in model.named_modules():
        if HEADS.isdisjoint(name.split(".")):
            matches = [target for target in targets if f".{name}".endswith(f".{target}")]
            if matches and not isinstance(module, nn.Linear):
                raise ValueError(f"{name} is a {type(module).__name__}; adapters go around nn.Linear alone")
            if matches:
                found[name] = module
            missed.difference_update(matches)
    if missed or not targets:
        missing = ", ".join(sorted(missed)) or "nothing"
        raise ValueError(f"no linear map is called {missing}; this model has {', '.join(linear_maps(model))}")
    owners = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        owners[p].append(name)
    for name, base in found.items():
        for other in sorted({*owners[base.weight]} - {f"{name}.weight"}):
            raise ValueError(f"{name} is tied to {other}: an adapter around one of them would be wrong")
    model.requires_grad_(False)
    layers = {name: KINDS[kind](base, rank, alpha, dropout) for name, base in found.items()}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return layers


def linear_maps(model: nn.Module) -> list[str]:
    """What `targets` can be: names of linear maps outside the heads, without the layer they are in."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in names if HEADS.isdisjoint(name.split("."))]
    # After the last number: "encoder.layer.3.attention.self.key" → "attention.self.key".
    return sorted({".".join(_after_last_number(name.split("."))) for name in inside})


def _after_last_number(parts: list[str]) -> list[str]:
    last = max((i for i, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
    return parts[last + 1 :]


def orthogonality_penalty(layers: Mapping[str, SVDLinear], squared: bool = False) -> Tensor:
    """How far P's columns and Q's rows are from orthonormal: a scalar.

    The mean of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F over all P and Q, as in the authors' code, for which the published
    γ are meant; with `squared` the sum of their squares, as the paper writes it ([A] eq. 4). Triplets that
    are no longer alive are left out of P, Q and I. The norm's gradient at an orthonormal matrix is 0.
    """
    by_shape = defaultdict(list)
    for layer in layers.values():
        for matrix in (layer.P, layer.Q.mT):  # (d, r) both
            by_shape[matrix.shape].append((matrix, layer.alive))
    norms = []
    for same in by_shape.values():
        matrices, alive = (torch.stack(part) for part in zip(*same, strict=True))  # (n, d, r), (n, r)
        X = matrices * alive.unsqueeze(1)
        norms.append(torch.linalg.vector_norm(X.mT @ X - torch.diag_embed(alive.to(X)), dim=(1, 2)))
    norms = torch.cat(norms)
    return norms.square().sum() if squared else norms.mean()

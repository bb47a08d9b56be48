"""Low-rank adapters, SVD-parameterised (AdaLoRA) and plain (LoRA): injection and orthogonality penalty.

    layers = inject(model, TARGETS["deberta-v2"], rank=3, alpha=32)     # {module name: SVDLinear}
    loss = task_loss + gamma * orthogonality_penalty(layers)

[A] Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023.
[H] Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


class AddLowRank(torch.autograd.Function):
    """y = x Wᵀ + b + (x Aᵀ) Bᵀ with W and b frozen: two operations more than the frozen map's, and four more
    in the backward pass. Shapes: x (n, d_in), W (d_out, d_in), B (d_out, r), A (r, d_in).

    `Bt` is Bᵀ without a gradient. Factors of r rows make faster products than those of r columns: u is A xᵀ,
    and Bt is best laid out row by row.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, b: Tensor | None, B: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
        u = A @ x.T
        ctx.save_for_backward(x, W, A, Bt, u)
        return F.linear(x, W, b).addmm_(u.T, Bt)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, Bt, u = ctx.saved_tensors
        grad_u = Bt @ grad_y.T
        grad_x = (grad_y @ W).addmm_(grad_u.T, A) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, (u @ grad_y).T, grad_u @ x, None


def add_low_rank(
    base: nn.Module, x: Tensor, B: Tensor, A: Tensor, dropout: nn.Dropout, Bt: Tensor | None = None
) -> Tensor:
    """base(x) + B A x. `Bt` is Bᵀ, if it is at hand row by row."""
    if (
        _is_plain(base)
        and base.weight.dtype == x.dtype == A.dtype
        and not (dropout.training and dropout.p)
        and not torch.is_autocast_enabled(x.device.type)
    ):
        Bt = B.detach().T if Bt is None else Bt
        y = AddLowRank.apply(x.reshape(-1, base.in_features), base.weight, base.bias, B, A, Bt)
        return y.view(*x.shape[:-1], base.out_features)
    # Any other base (quantised, of a lower precision, with hooks, not frozen), dropout, or autocast, in which
    # the adapter keeps its precision.
    y = base(x)
    with torch.autocast(x.device.type, enabled=False):
        return y + F.linear(F.linear(dropout(x).to(A.dtype), A), B).to(y.dtype)


def _is_plain(base: nn.Module) -> bool:
    """Whether base(x) is x Wᵀ + b with W and b frozen, and nothing else happens when it is called."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    frozen = not any(p.requires_grad for p in base.parameters())
    return type(base) is nn.Linear and frozen and not any(hooks) and "forward" not in base.__dict__


def _replace(p: nn.Parameter, new: Tensor) -> None:
    """Give a parameter other data, of another shape perhaps. Its gradient goes."""
    p.grad = None
    # While a graph of p is held, autograd keeps p's old shape; a change of type makes it forget.
    p.data = new.to(torch.float32 if new.dtype == torch.float16 else torch.float16)
    p.data = new


class Scaled(NamedTuple):
    """s·P Λ, (d_out, r), and its transpose, which has no gradient and is laid out row by row."""

    B: Tensor
    Bt: Tensor


class SVDLinear(nn.Module):
    """y = base(x) + s·P Λ Q x with Λ = diag(λ), s = alpha/r a constant. Source: [A] eq. 3.

    Shapes: P (d_out, r), lam = λ (r,), Q (r, d_in). P, Q ~ N(0, 0.02²) and λ = 0, so a fresh adapter changes
    nothing. Once it is decided for good which triplets stay, the others are taken out (`shrink`), or, where
    that cannot be, held off (`mask`): one that is not `alive` (r,) then contributes nothing and gets no
    gradient, whatever its entries are.
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
        self.masked = False  # whether any is not alive, known without asking the device
        self.scaled: Scaled | None = None  # in a forward pass of the model (`ScaleTogether`)

    def forward(self, x: Tensor) -> Tensor:
        if not self.lam.numel():
            return self.base(x)
        wanted = torch.is_grad_enabled() and (self.P.requires_grad or self.lam.requires_grad)
        usable = self.scaled is not None and self.scaled.B.requires_grad == wanted
        B, Bt = self.scaled if usable else ScaleTogether.scale([self])[0]
        return add_low_rank(self.base, x, B, self.Q, self.dropout, Bt)

    def delta(self) -> Tensor:
        """s·P Λ Q, what the adapter adds to the base's weight: (d_out, d_in)."""
        return ScaleTogether.scale([self])[0].B @ self.Q

    def mask(self, alive: Tensor) -> None:
        """Hold all others off."""
        self.alive.copy_(alive)
        self.masked = not bool(alive.all())

    @torch.no_grad()
    def shrink(self, alive: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Take the others out of P, λ and Q, of their gradients, and of the optimizer's state of them."""
        index = alive.nonzero().squeeze(1)
        for p, dim in ((self.P, 1), (self.lam, 0), (self.Q, 0)):
            state = optimizer.state[p]
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    state[key] = value.index_select(dim, index)
            grad = p.grad
            _replace(p, p.data.index_select(dim, index))
            p.grad = None if grad is None else grad.index_select(dim, index)
        self.alive = self.alive[index]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        """A saved adapter may have been shrunk, or masked."""
        if (lam := state_dict.get(f"{prefix}lam")) is not None and lam.shape != self.lam.shape:
            for p, dim in ((self.P, 1), (self.lam, 0), (self.Q, 0)):
                shape = list(p.shape)
                shape[dim] = len(lam)
                _replace(p, p.data.new_empty(shape))
            self.alive = self.alive.new_ones(len(lam))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.masked = not bool(self.alive.all())


class ScaleTogether:
    """Hooks of a model: for the length of its forward pass each adapter has its `Scaled`, made for all of one
    shape by a few operations. An adapter that is called alone makes its own, and so do all of a transformers
    model that checkpoints activations, which calls them again outside of its forward pass.
    """

    def __init__(self, layers: Iterable[SVDLinear]):
        self.layers = list(layers)

    def before(self, model: nn.Module, _inputs: tuple) -> None:
        self.after()  # what an interrupted pass has left
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            return
        by_shape = defaultdict(list)
        for layer in self.layers:
            by_shape[layer.P.shape, layer.P.dtype, layer.P.device, layer.scaling].append(layer)
        for same in by_shape.values():
            for layer, scaled in zip(same, self.scale(same), strict=True):
                layer.scaled = scaled

    def after(self, *_: object) -> None:
        for layer in self.layers:
            layer.scaled = None

    @staticmethod
    def scale(same: list[SVDLinear]) -> list[Scaled]:
        """Of adapters of one shape and one s."""
        lam = torch.stack([layer.lam for layer in same])
        if any(layer.masked for layer in same):
            lam = lam * torch.stack([layer.alive for layer in same])
        B = torch.stack([layer.P for layer in same]) * (same[0].scaling * lam).unsqueeze(1)
        return list(map(Scaled, B.unbind(), B.detach().mT.contiguous().unbind()))


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
        return add_low_rank(self.base, x, self.scaling * self.B, self.A, self.dropout)

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

    DeBERTa's relative positions are narrowed, too (below). One thread at a time can use the model.

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
    if kind == "svd":
        together = ScaleTogether(layers.values())
        model.register_forward_pre_hook(together.before)
        model.register_forward_hook(together.after, always_call=True)
    narrow_relative_positions(model)
    return layers


def narrow_relative_positions(model: nn.Module) -> None:
    """Let DeBERTaV2's and V3's attention use no relative positions but those that occur.

    As it is, it multiplies all tokens with the embeddings of all 2k buckets of distances, −k to k − 1 (in V3
    k = 256), and then picks; with adapters on query and key all that has a backward pass, too. But n tokens
    are less than n apart: 2·min(n, k) buckets do. The result is the same but for which entries dropout hits.
    """
    for module in model.modules():
        if not (hasattr(module, "disentangled_attention_bias") and module.relative_attention):
            continue
        # From k/2 on buckets are logarithmic. If the largest distance is e·k/2 or more, here with a margin,
        # no bucket's number is above its distance.
        if module.max_relative_positions > 1.5 * module.position_buckets:
            module.register_forward_pre_hook(_use_near_positions, with_kwargs=True)


def _use_near_positions(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Of the embeddings (2k, d) those of buckets −n to n − 1."""
    embeddings = kwargs["rel_embeddings"]
    k = len(embeddings) // 2
    n = min(args[0].shape[1], k)  # tokens (batch, n, d)
    attention.pos_ebd_size = n
    return args, kwargs | {"rel_embeddings": embeddings[k - n : k + n]}


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
    norms = torch.cat([torch.linalg.vector_norm(E, dim=(1, 2)) for _, _, E in _gram_errors(layers)])
    return norms.square().sum() if squared else norms.mean()


@torch.no_grad()
def add_penalty_gradients(layers: Mapping[str, SVDLinear], gamma: float, squared: bool = False) -> None:
    """`(gamma * orthogonality_penalty(layers, squared)).backward()` in a handful of batched products.

    With E = PᵀP − I the gradient of ‖E‖² is 4PE, and that of ‖E‖ is 2PE/‖E‖; with E = QQᵀ − I, EQ for PE.
    """
    params, grads = [], []
    for same, X, E in _gram_errors(layers):
        if not squared:
            tiny = torch.finfo(E.dtype).tiny  # where E is 0, its quotient is
            E = E / torch.linalg.vector_norm(E, dim=(1, 2), keepdim=True).clamp_min(tiny)
        params += same
        grads += (X @ E if E.shape[-1] == X.shape[-1] else E @ X).unbind()
    alpha = gamma * (4 if squared else 2 / max(len(params), 1))
    moving = [(p, grad) for p, grad in zip(params, grads, strict=True) if p.requires_grad]
    for p, _ in moving:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if moving:
        torch._foreach_add_([p.grad for p, _ in moving], [grad for _, grad in moving], alpha=alpha)


def _gram_errors(layers: Mapping[str, SVDLinear]) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    """All P and all Q, shape by shape: as a list, as X (n, d, r) or (n, r, d), and XᵀX − I or XXᵀ − I."""
    for part in ("P", "Q"):
        by_shape = defaultdict(list)
        for layer in layers.values():
            p = getattr(layer, part)
            by_shape[p.shape, p.dtype, p.device, layer.masked].append(layer)
        for (*_, masked), same in by_shape.items():
            params = [getattr(layer, part) for layer in same]
            X = torch.stack(params)
            r = X.shape[2 if part == "P" else 1]
            I = torch.eye(r, dtype=X.dtype, device=X.device).expand(len(same), r, r)
            if masked:
                alive = torch.stack([layer.alive for layer in same]).to(X)
                X, I = X * alive.unsqueeze(1 if part == "P" else 2), torch.diag_embed(alive)
            left, right = (X.mT, X) if part == "P" else (X, X.mT)
            yield params, X, torch.baddbmm(I, left, right, beta=-1)

"""fused.py against adalora.py's plain forms, autograd on the bare formula, and finite differences."""

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from small_runs import Run, mixed_adapters, random_adapter
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSequenceClassification, BertConfig

import adalora
import fused
from adalora import LoRALinear, SVDLinear, inject

KINDS = ["svd", "lora"]
PARTS = {SVDLinear: ("P", "lam", "Q"), LoRALinear: ("B", "A")}


def factors(layers: dict[str, nn.Module]) -> list[nn.Parameter]:
    return [getattr(layer, part) for layer in layers.values() for part in PARTS[type(layer)]]


def perceptron(
    *sizes: int, kind: str = "svd", is_fused: bool = True, rank: int = 2
) -> tuple[nn.Sequential, dict[str, nn.Module]]:
    """Linear maps with tanh between them, their adapters in the midst of training; float64."""
    torch.manual_seed(0)
    maps = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    model = nn.Sequential(*(module for each in maps for module in (each, nn.Tanh())))
    layers = inject(model, [str(2 * i) for i in range(len(maps))], rank=rank, alpha=4, kind=kind)
    model.double()
    for p in factors(layers):
        nn.init.normal_(p)
    if is_fused:
        fused.fuse(model, layers)
    return model, layers


def gradients(model: nn.Module, layers: dict[str, nn.Module], x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in factors(layers)]


# --- the same results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4,), (7, 4), (3, 5, 4), (0, 4)])
def test_the_output_is_that_of_the_plain_form(shape: tuple[int, ...], kind: str):
    model, _ = perceptron(4, 6, 3, kind=kind)
    plain, _ = perceptron(4, 6, 3, kind=kind, is_fused=False)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_layers_keep_their_type_and_their_parameters(kind: str):
    model, layers = perceptron(4, 6, 3, kind=kind)
    plain, plain_layers = perceptron(4, 6, 3, kind=kind, is_fused=False)
    assert [type(layer) for layer in layers.values()] == [type(layer) for layer in plain_layers.values()]
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (7, 4), (3, 5, 4), (0, 4)])
def test_the_gradients_are_those_of_finite_differences(shape: tuple[int, ...], bias: bool, kind: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias))
    layers = inject(model, ["0"], rank=2, alpha=4, kind=kind)
    fused.fuse(model.double(), layers)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    values = [torch.randn_like(p, requires_grad=True) for p in model.parameters() if p.requires_grad]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *values))
    assert torch.autograd.gradcheck(lambda *values: forward(x.detach(), *values), values)


def test_others_may_write_over_the_output():
    _, layers = perceptron(4, 5)
    y = layers["0"](torch.randn(3, 4, dtype=torch.float64))
    y += 1
    y.sum().backward()
    assert layers["0"].lam.grad is not None


@pytest.mark.parametrize(
    ("score", "optimizer", "kind"),
    [
        ("mu", "ivon", "svd"),
        ("snr_abs", "ivon", "svd"),
        ("sensitivity", "adamw", "svd"),
        ("mu", "ivon", "lora"),
    ],
)
@pytest.mark.parametrize("shapes", ["one", "several"])
def test_over_50_updates_fused_and_plain_adapters_train_the_same(
    score: str, optimizer: str, kind: str, shapes: str
):
    """With the penalty and the last allocation; `several` batches differ in shape.

    In float64: 50 updates make of a rounding error in float32 more than 1e-5.
    """
    runs = [Run(score, optimizer, kind=kind, form=form) for form in (adalora, fused)]
    torch.manual_seed(1)
    x, y = torch.randn(50, 32, 6).double(), torch.randn(50, 32, 4).double()
    for run in runs:
        run.model.double()
        torch.manual_seed(2)
        for t in range(1, 51):
            n, leading = (8 + t % 5 * 6, (-1, 2)) if shapes == "several" else (32, (-1,))
            run.x, run.y = x[t - 1, :n].view(*leading, 6), y[t - 1, :n].view(*leading, 4)
            run.update(t)
    plain, fast = runs
    assert plain.allocator.ranks() == fast.allocator.ranks()
    if kind == "svd":
        assert sum(plain.allocator.ranks().values()) == 8
        for name, kept in plain.allocator.kept.items():
            assert torch.equal(fast.allocator.kept[name], kept)
    for p, q in zip(plain.params, fast.params, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


class BareSVD(nn.Module):
    """The adapter as the formula has it, and autograd's derivatives."""

    def __init__(self, layer: SVDLinear):
        super().__init__()
        self.base, self.s = copy.deepcopy(layer.base), layer.scaling
        self.P, self.lam, self.Q = (nn.Parameter(p.detach().clone()) for p in (layer.P, layer.lam, layer.Q))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.s * F.linear(F.linear(x, self.Q) * self.lam, self.P)


def test_over_100_steps_fused_adapters_are_those_of_the_bare_formula():
    """Each used twice in a pass, as DeBERTa uses two of its maps; loss and penalty, two passes an update."""
    model, layers = perceptron(6, 6, 8, 6, is_fused=False, rank=3)
    bare = copy.deepcopy(model)
    for name, layer in layers.items():
        setattr(bare, name, BareSVD(layer))
    twins = {name: getattr(bare, name) for name in layers}
    fused.fuse(model, layers)
    x, y = torch.randn(2, 12, 6).double(), torch.randn(2, 12, 6).double()
    optimizers = [
        torch.optim.Adam([p for p in each.parameters() if p.requires_grad], lr=0.01) for each in (model, bare)
    ]
    for _ in range(100):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for each in (model, bare):
            for part in (0, 1):  # two backward passes add up
                (each(each(x[part])) - y[part]).square().mean().backward()
        fused.add_penalty_gradients(layers, 0.1)
        grams = [g for t in twins.values() for g in (t.P.T @ t.P, t.Q @ t.Q.T)]
        (0.1 * sum((g - torch.eye(3).double()).norm() for g in grams) / len(grams)).backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, layer in layers.items():
        for part in ("P", "lam", "Q"):
            torch.testing.assert_close(getattr(layer, part), getattr(twins[name], part), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["dropout", "autocast", "a lower precision", "another input"])
def test_what_the_fused_operation_does_not_cover_is_as_in_the_plain_form(how: str, kind: str):
    def build(is_fused: bool) -> tuple[nn.Module, dict]:
        torch.manual_seed(0)
        base = nn.Linear(4, 5).to(torch.bfloat16 if how == "a lower precision" else torch.float32)
        model = nn.Sequential(base)
        layers = inject(model, ["0"], rank=2, alpha=4, dropout=0.5 if how == "dropout" else 0.0, kind=kind)
        for p in factors(layers):
            nn.init.normal_(p)
        if is_fused:
            fused.fuse(model, layers)
        return model, layers

    x, found = torch.randn(7, 4), []
    for is_fused in (False, True):
        model, layers = build(is_fused)
        given = x.bfloat16() if how == "a lower precision" else x
        if how == "another input":
            model, given = model.double(), x.double()
            for p in factors(layers):
                p.data = p.data.float()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            y = model(given)
        y.float().square().sum().backward()
        found.append([y, *(p.grad for p in factors(layers))])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain)


def test_adapters_of_several_types_live_in_one_model():
    model, layers = perceptron(4, 4, 4)
    model.float()
    model[2].double()
    x = torch.randn(3, 4)
    model.forward = lambda x: model[2](model[0](x).double())
    expected = [F.linear(x, model[0].weight, model[0].bias).double()]
    expected.append(F.linear(expected[0], model[2].weight, model[2].bias))
    torch.testing.assert_close(model(x), expected[1], rtol=1e-5, atol=1e-5)
    fused.add_penalty_gradients(layers, 0.1)
    assert [layer.P.grad.dtype for layer in layers.values()] == [torch.float32, torch.float64]


@pytest.mark.parametrize("form", [adalora, fused], ids=["plain", "fused"])
@pytest.mark.parametrize("what", ["a hook", "another forward", "a trained bias", "spectral norm"])
def test_a_base_that_does_more_than_multiply_does_it(what: str, form):
    base, called = nn.Linear(4, 5).requires_grad_(False), []
    if what == "a hook":
        base.register_forward_hook(lambda *_: called.append(0))
    elif what == "another forward":
        base.forward = lambda x: called.append(0) or F.linear(x, base.weight) * 2
    elif what == "a trained bias":
        base.bias.requires_grad_(True)
    else:
        base = nn.utils.spectral_norm(base).eval()
    layer, x = SVDLinear(base, 2, alpha=4), torch.randn(3, 4)
    model = nn.Sequential(layer)
    if form is fused:
        fused.fuse(model, {"0": layer})
    y = model(x)
    torch.testing.assert_close(y, base(x))  # λ is 0
    y.sum().backward()
    assert len(called) == (2 if called else 0)
    assert bool(called) == (what in ("a hook", "another forward"))
    assert (base.bias.grad is not None) == (what == "a trained bias")
    assert layer.lam.grad is not None


# --- in and out of the model's forward pass -----------------------------------------------------------------


def test_a_layer_gives_the_same_alone_and_in_its_model_also_after_a_failure():
    model, layers = perceptron(4, 4, 4)
    x = torch.randn(3, 4).double()

    def alone() -> Tensor:
        return layers["2"](layers["0"](x).tanh()).tanh()

    expected = alone()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5).double())
    with torch.no_grad():
        for layer in layers.values():
            layer.lam *= 2  # what was made for the failed pass is out of date
    after = alone()
    assert not torch.equal(after, expected)
    torch.testing.assert_close(model(x), after, rtol=1e-12, atol=1e-12)


def test_what_an_interrupted_pass_leaves_reaches_no_other_pass_of_the_model():
    class Stop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(4, 4), Stop())
    layers = inject(model, ["0"], rank=2, alpha=4)
    fused.fuse(model, layers)
    nn.init.ones_(layers["0"].lam)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(3, 4))
    model[1] = nn.Identity()
    with torch.no_grad():
        layers["0"].lam.zero_()
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), layers["0"].base(x))


def test_gradients_may_be_switched_on_inside_a_pass_without():
    class Within(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                self.map(x).square().sum().backward()
            return x

    model = Within()
    layers = inject(model, ["map"], rank=2, alpha=4)
    fused.fuse(model, layers)
    with torch.no_grad():
        model(torch.randn(3, 4))
    assert all(p.grad is not None for p in factors(layers))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_fused_model_is_a_model_of_its_own(kind: str):
    model, layers = perceptron(4, 4, 4, kind=kind)
    twin, x = copy.deepcopy(model), torch.randn(3, 4).double()
    before = twin(x)
    with torch.no_grad():
        for p in factors(layers):
            p += 1
    assert not torch.equal(model(x), before)
    assert torch.equal(twin(x), before)
    twin(x).sum().backward()
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    assert all(p.grad is None for p in factors(layers))


def test_a_model_whose_triplets_are_taken_out_goes_on():
    model, layers = perceptron(4, 4, 4)
    plain, plain_layers = perceptron(4, 4, 4, is_fused=False)
    x = torch.randn(3, 4).double()
    for each, its in ((model, layers), (plain, plain_layers)):
        kept = {"0": torch.tensor([True, False]), "2": torch.tensor([False, False])}
        gradients(each, its, x)
        adalora.remove_triplets(its, kept, torch.optim.SGD(factors(its), lr=0.1))
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    model(x).sum().backward()
    assert layers["0"].P.grad.shape == (4, 1)


# --- activation checkpointing -------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, use_reentrant: bool):
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("is_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", ["one layer", "each layer", "several layers", "the model"])
def test_the_gradients_are_the_same_with_activation_checkpointing(
    around: str, kind: str, is_fused: bool, use_reentrant: bool
):
    x = torch.randn(3, 4).double().requires_grad_()  # a reentrant checkpoint wants an input with a gradient
    model, layers = perceptron(4, 4, 5, 4, kind=kind, is_fused=is_fused)
    expected = gradients(model, layers, x)
    if around == "the model":
        model = Checkpointed(model, use_reentrant)
    elif around == "several layers":
        model[1] = Checkpointed(nn.Sequential(model[1], model[2], model[3], model[4]), use_reentrant)
        model[2] = model[3] = model[4] = nn.Identity()
    else:
        for i in (0, 2, 4) if around == "each layer" else (2,):
            model[i] = Checkpointed(model[i], use_reentrant)
    for got, want in zip(gradients(model, layers, x), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_gradients_are_the_same_with_transformers_own_checkpointing(use_reentrant: bool):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(**sizes, vocab_size=40, hidden_dropout_prob=0.1)
    model = AutoModelForSequenceClassification.from_config(config).train()
    layers = inject(model, ["query", "value", "intermediate.dense"], rank=2, alpha=4)
    fused.fuse(model, layers)
    model.bert.embeddings.requires_grad_(True)  # a reentrant checkpoint wants an input with a gradient
    for p in factors(layers):
        nn.init.normal_(p)
    ids, found = torch.randint(1, 40, (3, 7)), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(1)
        model.zero_grad()
        model(ids).logits.square().sum().backward()
        found.append([p.grad for p in factors(layers)])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


# --- second derivatives -------------------------------------------------------------------------------------


def over_lambda(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda lam: 0.5 * functional_call(model, {"0.lam": lam}, (x,)).square().sum()


def test_second_derivatives_are_refused_with_the_way_out():
    model, layers = perceptron(4, 5)
    loss = over_lambda(model, torch.randn(7, 4).double())
    with pytest.raises(RuntimeError, match="no second derivatives: use --plain"):
        torch.autograd.functional.hessian(loss, layers["0"].lam.detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["x", "the factors"])
def test_a_graph_of_the_first_derivatives_is_refused_too(of: str, kind: str):
    model, layers = perceptron(4, 5, kind=kind)
    x = torch.randn(7, 4).double().requires_grad_()
    loss = model(x).square().sum()
    with pytest.raises(RuntimeError, match="no second derivatives: use --plain"):
        torch.autograd.grad(loss, [x] if of == "x" else factors(layers), create_graph=True)


def test_where_the_plain_operations_are_used_second_derivatives_are_right():
    """A base with a hook is called as it is, so that autograd sees every operation."""
    model, layers = perceptron(4, 5)
    plain, _ = perceptron(4, 5, is_fused=False)
    model[0].base.register_forward_hook(lambda *_: None)
    x, lam = torch.randn(7, 4).double(), layers["0"].lam.detach()
    got, want = (torch.autograd.functional.hessian(over_lambda(each, x), lam) for each in (model, plain))
    assert want.abs().max() > 1
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# --- the penalty --------------------------------------------------------------------------------------------


def penalty(p: Tensor, is_P: bool, squared: bool, matrices: int) -> Tensor:
    """What one matrix adds to R(P, Q)."""
    gram = p.T @ p if is_P else p @ p.T
    E = gram - torch.eye(len(gram), dtype=p.dtype)
    return E.square().sum() if squared else E.square().sum().sqrt() / matrices


def finite_differences(f: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    steps = 1e-6 * torch.eye(p.numel(), dtype=p.dtype).view(-1, *p.shape)
    return torch.stack([(f(p + step) - f(p - step)) / 2e-6 for step in steps]).view(p.shape)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 5, 4), (5, 5, 7), (4, 7, 4), (3, 3, 3)], ids=["neither", "P", "Q", "both"]
)
def test_the_penaltys_gradient_is_that_of_finite_differences_also_where_a_factor_is_square(
    shape: tuple[int, int, int], squared: bool
):
    """Shapes are (rank, d_out, d_in); the ids say which factor is square."""
    layers = {"it": random_adapter(*shape), "other": random_adapter(seed=1)}
    fused.add_penalty_gradients(layers, 0.3, squared)
    for part in ("P", "Q"):
        p = getattr(layers["it"], part)
        want = finite_differences(lambda p, is_P=part == "P": 0.3 * penalty(p, is_P, squared, 4), p.detach())
        torch.testing.assert_close(p.grad, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("squared", [False, True])
def test_the_penaltys_gradient_is_that_of_the_plain_form(squared: bool):
    """Square factors, rank 0, orthonormal matrices, plain LoRA beside them, gradients from before."""
    plain, fast = mixed_adapters(), mixed_adapters()
    for layers, form in ((plain, adalora), (fast, fused)):
        layers["lora"] = LoRALinear(nn.Linear(4, 5), 2, alpha=2)
        with torch.no_grad():
            layers["2"].P.copy_(torch.eye(5, 3))
            layers["4"].P.copy_(torch.eye(5))
        layers["1"].Q.grad = torch.full_like(layers["1"].Q, 7.0)
        layers["3"].P.requires_grad_(False)
        form.add_penalty_gradients(layers, 0.3, squared)
    for p, q in zip(factors(plain), factors(fast), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-12, atol=1e-12)
    assert not fast["2"].P.grad.any()  # at an orthonormal matrix: 0, not NaN
    assert not fast["4"].P.grad.any()


@pytest.mark.parametrize(("layers", "gamma"), [({}, 0.1), ("lora", 0.1), ("svd", 0.0)])
def test_where_the_plain_form_does_nothing_it_does_nothing(layers: dict | str, gamma: float):
    if layers:
        layers = {"it": LoRALinear(nn.Linear(4, 5), 2, 2) if layers == "lora" else random_adapter()}
    fused.add_penalty_gradients(layers, gamma)
    assert all(p.grad is None for layer in layers.values() for p in layer.parameters())


# --- fewer operations ---------------------------------------------------------------------------------------


def operations(work: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


@pytest.mark.parametrize("form", [adalora, fused], ids=["plain", "fused"])
def test_only_the_plain_penalty_needs_more_products_for_more_adapters(form):
    def products(n: int) -> int:
        layers = {str(i): SVDLinear(nn.Linear(8, 8), 3, alpha=1) for i in range(n)}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            form.add_penalty_gradients(layers, 0.1)
        multiply = ("aten::mm", "aten::bmm", "aten::baddbmm")
        return sum(event.count for event in profile.key_averages() if event.key in multiply)

    assert (products(2) == products(20)) == (form is fused)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_takes_fewer_operations_than_with_the_plain_form(kind: str):
    def of_update(is_fused: bool) -> int:
        model, layers = perceptron(*[8] * 13, kind=kind, is_fused=is_fused)
        form, x = fused if is_fused else adalora, torch.randn(5, 8).double()

        def update() -> None:
            model(x).square().sum().backward()
            form.add_penalty_gradients(layers, 0.1)

        update()
        return operations(update)

    assert of_update(True) < 0.9 * of_update(False)


# --- compiled -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_as_one_graph_it_gives_what_it_gives_eagerly_also_after_a_cut(kind: str):
    model, layers = perceptron(4, 6, 6, 3, kind=kind)
    x = torch.randn(5, 4).double()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)

    def check() -> None:
        expected = [model(x).detach(), *gradients(model, layers, x)]
        got = [compiled(x).detach(), *gradients(compiled, layers, x)]
        for ours, eager in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-10, atol=1e-10)

    check()
    if kind == "svd":
        masks = [[True, False], [False, True], [True, True]]
        kept = {name: torch.tensor(mask) for name, mask in zip(layers, masks, strict=True)}
        adalora.remove_triplets(layers, kept, torch.optim.SGD(model.parameters()))
        check()

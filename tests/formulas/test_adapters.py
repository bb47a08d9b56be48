"""adalora.py's adapters and injection, against plain sums, merged weights, and transformers' own models."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from small_runs import random_adapter
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    ConvBertConfig,
    ElectraConfig,
    GPT2Config,
    MambaConfig,
    SqueezeBertConfig,
    T5Config,
)

from adalora import LoRALinear, SVDLinear, inject, linear_maps, remove_triplets

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
}
BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
KINDS = {"svd": SVDLinear, "lora": LoRALinear}


def bert_classifier() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(BertConfig(**SIZES)).eval()


def factors(layer: nn.Module) -> list[nn.Parameter]:
    return [layer.P, layer.lam, layer.Q] if isinstance(layer, SVDLinear) else [layer.B, layer.A]


def fill(layers: dict[str, nn.Module], std: float = 1.0) -> None:
    """Random adapters in place of fresh ones, which change nothing."""
    for p in (p for layer in layers.values() for p in factors(layer)):
        nn.init.normal_(p, std=std)


def filled_adapter(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layer = KINDS[kind](nn.Linear(4, 5), 3, alpha=6).double()
    fill({"it": layer})
    return layer


# --- the adapter --------------------------------------------------------------------------------------------


def test_the_adapted_weight_is_the_sum_over_triplets():
    layer = random_adapter()
    P, lam, Q = (p.detach().numpy() for p in (layer.P, layer.lam, layer.Q))
    expected = 6 / 3 * sum(lam[i] * np.outer(P[:, i], Q[i]) for i in range(3))
    np.testing.assert_allclose(layer.delta().detach().numpy(), expected, rtol=1e-12)


def test_the_weight_of_plain_lora_is_the_product_of_its_factors_times_alpha_over_r():
    layer = filled_adapter("lora")
    B, A = (p.detach().numpy() for p in (layer.B, layer.A))
    np.testing.assert_allclose(layer.delta().detach().numpy(), 6 / 3 * B @ A, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4,), (7, 4), (3, 5, 4), (0, 4)])
def test_delta_is_what_the_adapter_adds_to_the_forward_pass(shape: tuple[int, ...], kind: str):
    layer, x = filled_adapter(kind), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x) - layer.base(x), x @ layer.delta().T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_those_of_finite_differences(kind: str):
    layer, x = filled_adapter(kind), torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters() if not name.startswith("base")]

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *factors(layer)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_no_bit_of_the_output(kind: str):
    model, ids = bert_classifier(), torch.arange(4, 34).view(3, 10)
    before = model(ids).logits
    inject(model, BERT, rank=3, alpha=32, kind=kind)
    assert torch.equal(model(ids).logits, before)


def test_the_initial_values_are_those_of_the_paper():
    torch.manual_seed(0)
    layer = SVDLinear(nn.Linear(3000, 2000), 4, alpha=1)
    assert layer.P.shape == (2000, 4)
    assert layer.Q.shape == (4, 3000)
    assert not layer.lam.any()
    for matrix in (layer.P, layer.Q):
        assert matrix.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(matrix.mean().item()) < 0.001


def test_the_initial_values_of_plain_lora_are_those_of_the_authors_code():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(3000, 20), 4, alpha=1)
    assert not layer.B.any()
    bound = 3000**-0.5  # kaiming_uniform with a = √5: uniform in ±1/√d_in
    assert bound * 0.99 < layer.A.abs().max() <= bound
    assert layer.A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_an_adapter_of_rank_0_is_its_base():
    layer, x = SVDLinear(nn.Linear(4, 5), 0, alpha=32), torch.randn(7, 4)
    assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(layer.weight, layer.base.weight)
    assert not layer.delta().any()


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_dropout_is_in_front_of_the_adapter_alone(kind: str):
    layer = KINDS[kind](nn.Linear(4, 5), 3, alpha=6, dropout=1.0)
    nn.init.ones_(layer.lam if kind == "svd" else layer.B)
    x = torch.randn(7, 4)
    assert torch.equal(layer.train()(x), layer.base(x))
    assert not torch.equal(layer.eval()(x), layer.base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_of_lower_precision_keeps_it_and_its_adapter_is_float32(kind: str):
    layer = KINDS[kind](nn.Linear(4, 5).bfloat16(), 2, alpha=4)
    y = layer(torch.randn(3, 4).bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_the_adapters_product_is_that_of_float32(kind: str):
    layer, x = filled_adapter(kind).float(), torch.randn(7, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, base = layer(x), layer.base(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, base + (x @ layer.delta().T).bfloat16())


def test_a_copy_of_a_model_is_a_model_of_its_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = inject(model, ["0", "1"], rank=2, alpha=4)
    twin, x = copy.deepcopy(model), torch.randn(3, 4)
    with torch.no_grad():
        for layer in layers.values():
            layer.lam += 1
    assert not torch.equal(model(x), twin(x))
    twin(x).sum().backward()
    assert twin[0].lam.grad is not None
    assert layers["0"].lam.grad is None


def test_second_derivatives_over_lambda_are_those_of_the_formula():
    """Of ½‖y‖² they are s² Σ_x (P_i·P_j)(Q_i·x)(Q_j·x)."""
    layer, x = random_adapter(), torch.randn(7, 4, dtype=torch.float64)

    def loss(lam: Tensor) -> Tensor:
        return 0.5 * functional_call(layer, {"lam": lam}, (x,)).square().sum()

    got = torch.autograd.functional.hessian(loss, layer.lam.detach())
    P, u = layer.P.detach(), x @ layer.Q.detach().T
    torch.testing.assert_close(got, 2.0**2 * (P.T @ P) * (u.T @ u), rtol=1e-10, atol=1e-10)


# --- read instead of called ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_has_its_maps_sizes_its_bias_and_the_merged_weight(kind: str):
    layer = filled_adapter(kind)
    assert (layer.in_features, layer.out_features, layer.rank) == (4, 5, 3)
    assert layer.bias is layer.base.bias
    torch.testing.assert_close(layer.weight, layer.base.weight + layer.delta())
    assert KINDS[kind](nn.Linear(4, 5, bias=False), 3, alpha=6).bias is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weight_has_the_precision_of_the_base(kind: str):
    assert KINDS[kind](nn.Linear(4, 5).bfloat16(), 2, alpha=4).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weight_has_the_forward_passes_gradients(kind: str):
    layer, x = filled_adapter(kind), torch.randn(7, 4, dtype=torch.float64)
    through_weight, through_forward = (
        torch.autograd.grad(y.square().sum(), factors(layer))
        for y in (nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    )
    torch.testing.assert_close(through_weight, through_forward)


def multihead_attention() -> tuple[nn.Module, list[str], Callable]:
    x = torch.randn(3, 5, 16)
    return nn.MultiheadAttention(16, 4, batch_first=True), ["out_proj"], lambda model: model(x, x, x)[0]


def transformer_encoder() -> tuple[nn.Module, list[str], Callable]:
    layer, x = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), torch.randn(3, 5, 16)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    return model, ["linear1", "linear2", "out_proj"], lambda model: model(x)


def t5() -> tuple[nn.Module, list[str], Callable]:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    model, ids = AutoModel.from_config(T5Config(**sizes, decoder_start_token_id=0)), torch.arange(20)[None]
    return model, ["wo", "q"], lambda model: model(input_ids=ids, decoder_input_ids=ids).last_hidden_state


def mamba() -> tuple[nn.Module, list[str], Callable]:
    config = MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2)
    maps, ids = ["in_proj", "x_proj", "dt_proj", "out_proj"], torch.arange(20)[None]
    return AutoModel.from_config(config), maps, lambda model: model(input_ids=ids).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "with gradients"])
@pytest.mark.parametrize("build", [multihead_attention, transformer_encoder, t5, mamba])
def test_a_model_with_adapters_gives_the_output_of_its_merged_weights(build: Callable, grad: bool, kind: str):
    torch.manual_seed(0)
    model, targets, output = build()
    model.eval()
    merged, before = copy.deepcopy(model), output(model)
    layers = inject(model, targets, rank=2, alpha=4, kind=kind)
    fill(layers, std=0.3)
    with torch.no_grad():
        for name, layer in layers.items():
            merged.get_submodule(name).weight += layer.delta()
    with torch.set_grad_enabled(grad):
        after = output(model)
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, output(merged), rtol=1e-4, atol=1e-5)
    if grad:
        after.sum().backward()
        assert all(p.grad is not None for layer in layers.values() for p in factors(layer))


def test_adapted_attention_gets_the_gradient_of_its_merged_weight():
    """∂L/∂λ_i = s·P_iᵀ G Q_iᵀ with G the gradient of the merged weight."""
    torch.manual_seed(0)
    model, targets, output = multihead_attention()
    merged = copy.deepcopy(model)
    (layer,) = inject(model, targets, rank=2, alpha=4).values()
    fill({"it": layer})
    with torch.no_grad():
        merged.out_proj.weight += layer.delta()
    for each in (model, merged):
        output(each).square().sum().backward()
    expected = 2 * torch.einsum("oi,od,id->i", layer.P, merged.out_proj.weight.grad, layer.Q)
    torch.testing.assert_close(layer.lam.grad, expected.detach(), rtol=1e-4, atol=1e-4)


# --- injection ----------------------------------------------------------------------------------------------


def test_the_adapters_are_in_the_model_under_their_names():
    model = bert_classifier()
    layers = inject(model, BERT, rank=3, alpha=32)
    assert len(layers) == 2 * 6
    assert {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)} == layers


def test_the_head_is_left_alone_even_by_a_target_that_it_ends_in():
    model = bert_classifier()
    layers = inject(model, ["dense"], rank=3, alpha=32)
    assert len(layers) == 2 * 3
    assert type(model.bert.pooler.dense) is nn.Linear
    assert type(model.classifier) is nn.Linear


def test_everything_but_the_adapters_is_frozen():
    model = bert_classifier()
    layers = inject(model, BERT, rank=3, alpha=32)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for layer in layers.values() for p in (layer.P, layer.lam, layer.Q)}


def test_the_adapters_come_in_the_order_of_the_model():
    model = bert_classifier()
    layers = inject(model, reversed(BERT), rank=3, alpha=32)
    assert list(layers) == [name for name, module in model.named_modules() if isinstance(module, SVDLinear)]


def test_any_module_can_be_adapted_not_only_encoders():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    layers = inject(model, ["0", "2"], rank=2, alpha=2)
    assert list(layers) == ["0", "2"]
    assert model(torch.randn(3, 4)).shape == (3, 2)


class EightBit(nn.Linear):
    """As quantisation libraries have it: an nn.Linear whose weight is int8, with a scale of its own."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)
        self.register_buffer("scale", self.weight.detach().abs().max() / 127)
        codes = (self.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.bfloat16() @ (self.weight.bfloat16() * self.scale.bfloat16()).T).to(x.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_quantised_base_works(kind: str):
    torch.manual_seed(0)
    model = nn.Sequential(EightBit(6, 5), nn.Tanh(), EightBit(5, 3))
    x, codes = torch.randn(7, 6), model[0].weight.clone()
    before = model(x)
    layers = inject(model, ["0", "2"], rank=2, alpha=4, kind=kind)
    assert torch.equal(model(x), before)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(20):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * (before - 1).square().mean()
    assert torch.equal(layers["0"].base.weight, codes)


# --- what is refused ----------------------------------------------------------------------------------------


def refuse(model: nn.Module, targets: list[str] | str, match: str, **settings) -> None:
    """`inject` raises ValueError in one line and leaves the model as it is."""
    before = [(name, type(module)) for name, module in model.named_modules()]
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=match) as error:
        inject(model, targets, **{"rank": 3, "alpha": 32, **settings})
    assert "\n" not in str(error.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert [p.requires_grad for p in model.parameters()] == trained


def test_a_target_that_is_not_there_is_an_error_that_lists_what_is():
    refuse(bert_classifier(), ["key", "query_proj"], r"called query_proj; .*self\.query")


def test_no_targets_at_all_are_an_error_that_lists_what_could_be():
    refuse(bert_classifier(), [], r"self\.query")


def test_a_target_that_is_no_linear_map_is_an_error():
    refuse(bert_classifier(), ["attention.output"], "BertSelfOutput")


def test_a_string_for_targets_is_an_error_that_shows_the_list():
    refuse(bert_classifier(), "query", r"targets is a list of names: \['query'\]")


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_inject_is_refused(kind: str):
    model = bert_classifier()
    inject(model, ["query"], rank=2, alpha=2, kind=kind)
    refuse(model, ["key"], "has adapters already: name all targets in one call")


@pytest.mark.parametrize("head", ["classifier", "pooler.dense"])
def test_a_part_of_the_head_is_refused_by_name(head: str):
    refuse(bert_classifier(), ["query", head], rf"{head} is part of the head.*leave it out")


@pytest.mark.parametrize("tie", ["one module in two places", "two modules with one weight", "an embedding"])
def test_a_tied_map_is_refused_and_not_offered(tie: str):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "tokens": nn.Embedding(4, 4)})
    model["free"] = nn.Linear(4, 4)
    if tie == "one module in two places":
        model["b"] = model["a"]
    elif tie == "two modules with one weight":
        model["b"].weight = model["a"].weight
    else:
        model["a"].weight = model["tokens"].weight
    refuse(model, ["a"], r"\Aa is tied to (b|tokens)\.weight: [^\n]*\Z")
    assert linear_maps(model) == (["b", "free"] if tie == "an embedding" else ["free"])


GROUPED = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
GROUPED |= {"num_attention_heads": 2, "embedding_size": 16}
GPT2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)


@pytest.mark.parametrize(
    ("config", "target", "has"),
    [
        (GPT2, "c_attn", "is a Conv1D"),
        (GPT2, "query", "query; this model has no nn.Linear to adapt, but Conv1D"),
        (ConvBertConfig(**GROUPED, num_groups=2), "intermediate.dense", "GroupedLinearLayer"),
        (SqueezeBertConfig(**GROUPED), "intermediate.conv1d", "ConvLayer|Conv1d|MatMul"),
    ],
    ids=["Conv1D", "nothing but Conv1D", "grouped", "convolution"],
)
def test_maps_that_are_not_linear_modules_are_refused_with_what_the_model_has(config, target: str, has: str):
    refuse(AutoModel.from_config(config), [target], has)


@pytest.mark.parametrize(("kind", "rank"), [("lora", 0), ("lora", -1), ("svd", -1)])
def test_a_rank_that_cannot_be_is_refused(kind: str, rank: int):
    refuse(bert_classifier(), BERT, f"there is no {kind} adapter of rank {rank}", rank=rank, kind=kind)


def test_an_architecture_says_which_linear_maps_it_has():
    model = AutoModelForSequenceClassification.from_config(ElectraConfig(**SIZES, embedding_size=8))
    attention = [f"self.{part}" for part in ("key", "query", "value")]
    dense = ["intermediate.dense", "output.dense"]
    assert linear_maps(model) == ["electra.embeddings_project", *dense, *attention]


# --- taking triplets out ------------------------------------------------------------------------------------

KEPT = torch.tensor([True, False, True])


def trained_adapter(
    optimizer: Callable = torch.optim.AdamW, dtype: torch.dtype = torch.float64
) -> tuple[SVDLinear, torch.optim.Optimizer]:
    """After one step, its gradients still there."""
    layer = random_adapter(dtype=dtype)
    opt = optimizer([layer.P, layer.lam, layer.Q], lr=0.1)
    layer(torch.randn(7, 4, dtype=dtype)).square().sum().backward()
    opt.step()
    return layer, opt


def test_triplets_are_cut_out_of_parameters_gradients_and_state():
    layer, optimizer = trained_adapter()

    def everything() -> list[tuple[Tensor, int]]:
        found = []
        for p, dim in ((layer.P, 1), (layer.lam, 0), (layer.Q, 0)):
            state = optimizer.state[p]
            found += [(x, dim) for x in (p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"])]
        return found

    before = [(x.clone(), dim) for x, dim in everything()]
    steps = [optimizer.state[p]["step"].clone() for p in (layer.P, layer.lam, layer.Q)]
    remove_triplets({"it": layer}, {"it": KEPT}, optimizer)
    for (after, _), (whole, dim) in zip(everything(), before, strict=True):
        assert torch.equal(after, whole.index_select(dim, torch.tensor([0, 2])))
    assert [optimizer.state[p]["step"] for p in (layer.P, layer.lam, layer.Q)] == steps
    assert layer.rank == 2


def test_without_its_triplets_an_adapter_is_as_if_their_lambda_were_0():
    layer, optimizer = trained_adapter()
    x = torch.randn(7, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.lam[1] = 0
    expected = layer(x)
    remove_triplets({"it": layer}, {"it": KEPT}, optimizer)
    torch.testing.assert_close(layer(x), expected)


def test_the_scaling_is_a_constant_that_does_not_follow_the_rank_down():
    layer, optimizer = trained_adapter()
    remove_triplets({"it": layer}, {"it": torch.tensor([True, False, False])}, optimizer)
    torch.testing.assert_close(layer.delta(), 2.0 * layer.lam * layer.P @ layer.Q)


def test_all_triplets_can_be_taken_out():
    layer, optimizer = trained_adapter()
    remove_triplets({"it": layer}, {"it": torch.zeros(3, dtype=torch.bool)}, optimizer)
    x = torch.randn(7, 4, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base(x))


def test_state_that_cannot_be_cut_is_refused_by_name_and_nothing_is_cut():
    first, second = random_adapter(), random_adapter()
    params = [p for layer in (first, second) for p in (layer.P, layer.lam, layer.Q)]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    optimizer.state[second.Q]["row"] = torch.zeros(3, 1)
    layers = {"first": first, "second": second}
    with pytest.raises(ValueError, match=r"second cannot .*row is \(3, 1\), the parameter \(3, 4\)"):
        remove_triplets(layers, dict.fromkeys(layers, KEPT), optimizer)
    assert [p.shape for p in params] == [(5, 3), (3,), (3, 4)] * 2


def test_an_adapter_takes_on_the_rank_of_the_one_it_is_loaded_from():
    layer, twin = random_adapter(), random_adapter(seed=1)
    remove_triplets({"it": layer}, {"it": KEPT}, torch.optim.SGD(layer.parameters(), lr=0.1))
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(7, 4, dtype=torch.float64)
    assert twin.P.shape == (5, 2)
    assert torch.equal(layer(x), twin(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("how", ["take out", "load"])
def test_a_cut_does_not_disturb_a_graph_that_is_still_held(how: str, dtype: torch.dtype):
    layer, x = random_adapter(dtype=dtype), torch.randn(7, 4, dtype=dtype)
    optimizer = torch.optim.SGD([layer.P, layer.lam, layer.Q], lr=0.1)
    held = layer(x).square().mean()
    held.backward(retain_graph=True)
    if how == "take out":
        remove_triplets({"it": layer}, {"it": KEPT}, optimizer)
        optimizer.zero_grad()
    else:
        layer.load_state_dict(random_adapter(rank=2, dtype=dtype).state_dict())
    layer(x).square().mean().backward()
    assert layer.P.grad.shape == layer.P.shape == (5, 2)
    assert held.grad_fn is not None


def test_training_goes_on_after_a_cut_while_every_graph_is_held():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = inject(model, ["0", "1"], rank=3, alpha=6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(4):
        losses.append(model(torch.randn(5, 4)).square().mean())  # and with it its graph
        losses[-1].backward()
        optimizer.step()
        if step == 1:
            remove_triplets(layers, dict.fromkeys(layers, KEPT), optimizer)
            assert all(layer.P.grad.shape == layer.P.shape for layer in layers.values())
        optimizer.zero_grad()
    assert layers["0"].P.shape == (4, 2)

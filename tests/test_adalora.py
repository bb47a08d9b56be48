"""adalora.py against finite differences, plain NumPy loops, and transformers' own models."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    ConvBertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    RobertaConfig,
    SqueezeBertConfig,
)
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from adalora import (
    TARGETS,
    LoRALinear,
    SVDLinear,
    add_low_rank,
    add_penalty_gradients,
    inject,
    linear_maps,
    narrow_relative_positions,
    orthogonality_penalty,
)

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
}
CONFIGS = {
    "deberta-v2": DebertaV2Config(
        **SIZES, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"]
    ),
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES, pad_token_id=1),
    "distilbert": DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=40),
}


def encoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(CONFIGS[kind]).eval()


def adapter(rank: int = 3, d_out: int = 5, d_in: int = 4, dtype: torch.dtype = torch.float64) -> SVDLinear:
    """An adapter in the midst of training, over a base with a bias."""
    torch.manual_seed(0)
    layer = SVDLinear(nn.Linear(d_in, d_out), rank, alpha=6).to(dtype)
    with torch.no_grad():
        layer.P.normal_()
        layer.Q.normal_()
        layer.lam.normal_()
    return layer


def penalty_by_loop(layers: dict, squared: bool) -> float:
    """Matrix by matrix in NumPy, dropped triplets cut out."""
    norms = []
    for layer in layers.values():
        alive = layer.alive.numpy()
        P, Q = layer.P.detach().numpy()[:, alive], layer.Q.detach().numpy()[alive]
        norms += [np.linalg.norm(gram - np.eye(alive.sum())) for gram in (P.T @ P, Q @ Q.T)]
    return sum(norm**2 for norm in norms) if squared else float(np.mean(norms))


# --- the adapter --------------------------------------------------------------------------------------------


def test_the_adapted_weight_is_the_sum_over_triplets():
    layer = adapter()
    P, lam, Q = (p.detach().numpy() for p in (layer.P, layer.lam, layer.Q))
    expected = 6 / 3 * sum(lam[i] * np.outer(P[:, i], Q[i]) for i in range(3))
    np.testing.assert_allclose(layer.delta().detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", [SVDLinear, LoRALinear])
def test_delta_is_what_the_adapter_adds_to_the_forward_pass(kind: type):
    torch.manual_seed(0)
    layer = kind(nn.Linear(4, 5), 3, alpha=6).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    x = torch.randn(7, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x) - layer.base(x), x @ layer.delta().T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["svd", "lora"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_fresh_adapter_changes_no_bit_of_the_output(architecture: str, kind: str):
    model, ids = encoder(architecture), torch.arange(4, 34).view(3, 10)
    before = model(ids).logits
    inject(model, TARGETS[architecture], rank=3, alpha=32, kind=kind)
    assert torch.equal(model(ids).logits, before)


def test_the_scaling_is_a_constant_that_does_not_follow_the_rank_down():
    layer = adapter()
    layer.mask(torch.tensor([True, False, False]))
    lam, P, Q = layer.lam[0], layer.P[:, :1], layer.Q[:1]
    torch.testing.assert_close(layer.delta(), 2.0 * lam * P @ Q)


def test_a_triplet_that_is_masked_contributes_nothing_and_gets_no_gradient():
    layer, x = adapter(), torch.randn(7, 4, dtype=torch.float64)
    layer.mask(torch.tensor([True, False, True]))
    (layer(x).square().sum() + orthogonality_penalty({"it": layer})).backward()
    assert not layer.P.grad[:, 1].any()
    assert not layer.lam.grad[1]
    assert not layer.Q.grad[1].any()
    before = layer(x), orthogonality_penalty({"it": layer})
    with torch.no_grad():
        for dropped in (layer.P[:, 1], layer.lam[1], layer.Q[1]):
            dropped.fill_(1e6)
    assert torch.equal(layer(x), before[0])
    assert torch.equal(orthogonality_penalty({"it": layer}), before[1])


def test_the_initial_values_are_those_of_the_paper():
    torch.manual_seed(0)
    layer = SVDLinear(nn.Linear(3000, 2000), 4, alpha=1)
    assert layer.P.shape == (2000, 4)
    assert layer.Q.shape == (4, 3000)
    assert not layer.lam.any()
    for matrix in (layer.P, layer.Q):
        assert matrix.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(matrix.mean().item()) < 0.001


def test_an_adapter_of_rank_0_is_its_base():
    layer, x = SVDLinear(nn.Linear(4, 5), 0, alpha=32), torch.randn(7, 4)
    assert torch.equal(layer(x), layer.base(x))
    assert not layer.delta().any()
    assert orthogonality_penalty({"it": layer}) == 0


def test_adapter_dropout_is_in_front_of_the_adapter_alone():
    layer = SVDLinear(nn.Linear(4, 5), 3, alpha=6, dropout=1.0)
    nn.init.ones_(layer.lam)
    x = torch.randn(7, 4)
    assert torch.equal(layer.train()(x), layer.base(x))
    assert not torch.equal(layer.eval()(x), layer.base(x))


def test_what_is_alive_travels_with_the_state_dict():
    layer, twin, x = adapter(), adapter(), torch.randn(7, 4, dtype=torch.float64)
    twin.base = layer.base
    layer.mask(torch.tensor([False, True, True]))
    twin.load_state_dict(layer.state_dict())
    assert twin.alive.tolist() == [False, True, True]
    assert torch.equal(layer(x), twin(x))
    layer.shrink(torch.tensor([True, False, True]), torch.optim.SGD(layer.parameters(), lr=0.1))
    twin.load_state_dict(layer.state_dict())
    assert twin.P.shape == (5, 2)
    assert torch.equal(layer(x), twin(x))


# --- the fast form and the plain one ------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (7, 4), (3, 5, 4), (0, 4)])
def test_the_gradients_are_those_of_finite_differences(shape: tuple[int, ...], bias: bool):
    torch.manual_seed(0)
    base, none = nn.Linear(4, 5, bias).double().requires_grad_(False), nn.Dropout(0.0)
    x, B, A = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (shape, (5, 2), (2, 4)))
    assert torch.autograd.gradcheck(lambda x, B, A: add_low_rank(base, x, B, A, none), (x, B, A))
    assert torch.autograd.gradcheck(lambda B, A: add_low_rank(base, x.detach(), B, A, none), (B, A))
    y = add_low_rank(base, x, B, A, none)
    torch.testing.assert_close(y, base(x) + x @ A.T @ B.T)
    y += 1  # others may write over it


@pytest.mark.parametrize("what", ["a hook", "another forward", "a trained bias", "spectral norm"])
def test_a_base_that_does_more_than_multiply_does_it(what: str):
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
    y = layer(x)
    torch.testing.assert_close(y, base(x))  # λ is 0
    y.sum().backward()
    assert len(called) == (2 if called else 0)
    assert bool(called) == (what in ("a hook", "another forward"))
    assert (base.bias.grad is not None) == (what == "a trained bias")
    assert layer.lam.grad is not None


def test_what_an_interrupted_pass_leaves_reaches_no_other():
    class Stop(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(4, 4), Stop())
    layers = inject(model, ["0"], rank=2, alpha=4)
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

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                self.map(x).square().sum().backward()
            return x

    model = Within()
    (layer,) = inject(model, ["map"], rank=2, alpha=4).values()
    with torch.no_grad():
        model(torch.randn(3, 4))
    assert all(p.grad is not None for p in (layer.P, layer.lam, layer.Q))


def test_adapters_of_several_types_live_in_one_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = inject(model, ["0", "1"], rank=2, alpha=4)
    model[1].double()
    x = torch.randn(3, 4)
    y = model[1](model[0](x).double())
    model.forward = lambda x: model[1](model[0](x).double())
    assert torch.equal(model(x), y)
    add_penalty_gradients(layers, 0.1)
    assert layers["1"].P.grad.dtype == torch.float64


def test_the_penalty_leaves_alone_what_is_not_trained():
    layers = mixed_layers()
    layers["0"].P.requires_grad_(False)
    add_penalty_gradients(layers, 0.1)
    assert layers["0"].P.grad is None
    assert layers["0"].Q.grad is not None
    add_penalty_gradients({}, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("how", ["shrink", "load"])
def test_a_cut_does_not_disturb_a_graph_that_is_still_held(how: str, dtype: torch.dtype):
    layer, x = (
        SVDLinear(nn.Linear(4, 4).requires_grad_(False), 3, alpha=6).to(dtype),
        torch.randn(5, 4).to(dtype),
    )
    optimizer = torch.optim.SGD([layer.P, layer.lam, layer.Q], lr=0.1)
    held = layer(x).square().mean()
    held.backward(retain_graph=True)
    if how == "shrink":
        layer.shrink(torch.tensor([True, False, True]), optimizer)
        optimizer.zero_grad()
    else:
        small = SVDLinear(nn.Linear(4, 4), 2, alpha=4).to(dtype)
        layer.load_state_dict(small.state_dict())
    layer(x).square().mean().backward()
    assert layer.P.grad.shape == layer.P.shape == (4, 2)


class PlainSVD(nn.Module):
    """The adapter as the formula has it, and autograd's derivatives."""

    def __init__(self, layer: SVDLinear):
        super().__init__()
        self.base, self.s = copy.deepcopy(layer.base), layer.scaling
        self.P, self.lam, self.Q = (nn.Parameter(p.detach().clone()) for p in (layer.P, layer.lam, layer.Q))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.s * F.linear(F.linear(x, self.Q) * self.lam, self.P)


def test_over_100_steps_the_adapters_are_those_of_the_plain_formula():
    """Each used twice in a pass, as DeBERTa uses two of its maps; loss and penalty, two passes an update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    layers = inject(model, ["0", "2", "4"], rank=3, alpha=6)
    model.double()
    plain = copy.deepcopy(model)
    for name, layer in layers.items():
        setattr(plain, name, PlainSVD(layer))
    twins = {name: getattr(plain, name) for name in layers}
    x, y = torch.randn(2, 12, 6).double(), torch.randn(2, 12, 6).double()
    optimizers = [
        torch.optim.Adam([p for p in each.parameters() if p.requires_grad], lr=0.01)
        for each in (model, plain)
    ]
    for _ in range(100):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for each in (model, plain):
            for part in (0, 1):  # two backward passes add up
                loss = (each(each(x[part])) - y[part]).square().mean()
                loss.backward()
        add_penalty_gradients(layers, 0.1)
        grams = [g for t in twins.values() for g in (t.P.T @ t.P, t.Q @ t.Q.T)]
        (0.1 * sum((g - torch.eye(3).double()).norm() for g in grams) / len(grams)).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert loss < 1
    for name, layer in layers.items():
        for part in ("P", "lam", "Q"):
            torch.testing.assert_close(getattr(layer, part), getattr(twins[name], part), rtol=0, atol=1e-10)


def test_an_adapter_says_the_same_alone_and_in_its_model_also_after_a_failure():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    layers = inject(model, ["0", "2"], rank=2, alpha=4)
    for layer in layers.values():
        nn.init.normal_(layer.lam)
    x = torch.randn(3, 4)
    expected = layers["2"](layers["0"](x).tanh())
    assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5))
    with torch.no_grad():
        for layer in layers.values():
            layer.lam *= 2  # what was made for the failed pass is out of date
    after = layers["2"](layers["0"](x).tanh())
    assert not torch.equal(after, expected)
    assert torch.equal(model(x), after)


def test_the_gradients_are_the_same_with_activation_checkpointing():
    torch.manual_seed(0)
    model = encoder("bert")
    layers = inject(model, TARGETS["bert"], rank=2, alpha=4)
    for layer in layers.values():
        nn.init.normal_(layer.lam)
    ids, found = torch.randint(1, 40, (3, 7)), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(1)
        model(ids).logits.square().sum().backward()
        found.append([p.grad for layer in layers.values() for p in (layer.P, layer.lam, layer.Q)])
        model.zero_grad()
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


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


def test_a_step_that_shrinks_does_not_disturb_a_graph_that_is_still_held():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = inject(model, ["0", "1"], rank=3, alpha=6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(4):
        losses.append(model(torch.randn(5, 4)).square().mean())  # and with it its graph
        losses[-1].backward()
        optimizer.step()
        if step == 1:
            for layer in layers.values():
                layer.shrink(torch.tensor([True, False, True]), optimizer)
                assert layer.P.grad.shape == layer.P.shape
        optimizer.zero_grad()
    assert layers["0"].P.shape == (4, 2)


# --- injection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", CONFIGS)
def test_exactly_the_six_linear_maps_of_each_layer_are_adapted(architecture: str):
    model = encoder(architecture)
    layers = inject(model, TARGETS[architecture], rank=3, alpha=32)
    assert len(layers) == 2 * 6
    assert all(".layer." in name for name in layers)
    assert {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)} == layers
    triplets = sum(layer.P.shape[0] + layer.Q.shape[1] for layer in layers.values())
    assert triplets == 2 * (4 * (16 + 16) + 2 * (16 + 24))


def test_deberta_v3_base_has_72_maps_and_13824_parameters_a_layer_and_rank():
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            DebertaV2Config(
                vocab_size=8,
                hidden_size=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                intermediate_size=3072,
            )
        )
        layers = inject(model, TARGETS["deberta-v2"], rank=2, alpha=32)
    assert len(layers) == 72
    assert sum(layer.P.numel() + layer.Q.numel() for layer in layers.values()) == 12 * 13_824 * 2


def test_the_head_is_left_alone_even_by_a_target_that_it_ends_in():
    model = encoder("deberta-v2")
    layers = inject(model, ["dense"], rank=3, alpha=32)
    assert len(layers) == 2 * 3
    assert isinstance(model.pooler.dense, nn.Linear)
    assert isinstance(model.classifier, nn.Linear)


def test_everything_but_the_adapters_is_frozen():
    model = encoder("bert")
    layers = inject(model, TARGETS["bert"], rank=3, alpha=32)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for layer in layers.values() for p in (layer.P, layer.lam, layer.Q)}


def test_the_adapters_come_in_the_order_of_the_model():
    model = encoder("bert")
    layers = inject(model, reversed(TARGETS["bert"]), rank=3, alpha=32)
    assert list(layers) == [name for name, module in model.named_modules() if isinstance(module, SVDLinear)]


def test_any_module_can_be_adapted_not_only_encoders():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    layers = inject(model, ["0", "2"], rank=2, alpha=2)
    assert list(layers) == ["0", "2"]
    assert model(torch.randn(3, 4)).shape == (3, 2)


def test_a_target_that_is_not_there_is_an_error_that_lists_what_is_and_changes_nothing():
    model = encoder("bert")
    with pytest.raises(ValueError, match=r"query_proj.*attention\.self\.query"):
        inject(model, ["key", "query_proj"], rank=3, alpha=32)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, SVDLinear) for module in model.modules())


def test_a_target_that_is_no_linear_map_is_an_error():
    with pytest.raises(ValueError, match="BertSelfOutput"):
        inject(encoder("bert"), ["attention.output"], rank=3, alpha=32)


GROUPED = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
GROUPED |= {"num_attention_heads": 2, "embedding_size": 16}


@pytest.mark.parametrize(
    ("config", "target", "kind"),
    [
        (GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2), "c_attn", "Conv1D"),
        (ConvBertConfig(**GROUPED, num_groups=2), "intermediate.dense", "GroupedLinearLayer"),
        (SqueezeBertConfig(**GROUPED), "intermediate.conv1d", "ConvLayer|Conv1d|MatMul"),
    ],
    ids=["Conv1D", "grouped", "convolution"],
)
def test_maps_that_are_not_linear_modules_are_refused_in_one_line(config, target: str, kind: str):
    with pytest.raises(ValueError, match=kind) as error:
        inject(AutoModel.from_config(config), [target], rank=3, alpha=32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tie", ["one module in two places", "two modules with one weight", "an embedding"])
def test_a_tied_map_is_refused_in_one_line_and_nothing_is_changed(tie: str):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "tokens": nn.Embedding(4, 4)})
    if tie == "one module in two places":
        model["b"] = model["a"]
    elif tie == "two modules with one weight":
        model["b"].weight = model["a"].weight
    else:
        model["a"].weight = model["tokens"].weight
    with pytest.raises(ValueError, match=r"\Aa is tied to (b|tokens)\.weight: [^\n]*\Z"):
        inject(model, ["a"], rank=2, alpha=2)
    assert all(p.requires_grad for p in model.parameters())
    assert type(model["a"]) is nn.Linear


class EightBit(nn.Linear):
    """As quantisation libraries have it: an nn.Linear whose weight is int8, with a scale of its own."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)
        self.register_buffer("scale", self.weight.detach().abs().max() / 127)
        codes = (self.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.bfloat16() @ (self.weight.bfloat16() * self.scale.bfloat16()).T).to(x.dtype)


@pytest.mark.parametrize("kind", ["svd", "lora"])
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


def test_plain_lora_cannot_have_rank_0():
    with pytest.raises(ValueError, match="rank 0"):
        inject(encoder("bert"), TARGETS["bert"], rank=0, alpha=32, kind="lora")


@pytest.mark.parametrize("kind", [SVDLinear, LoRALinear])
def test_a_base_of_lower_precision_keeps_it_and_its_adapter_is_float32(kind: type):
    layer = kind(nn.Linear(4, 5).bfloat16(), 2, alpha=4)
    y = layer(torch.randn(3, 4).bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32, torch.bfloat16}


def test_an_unknown_architecture_can_say_which_linear_maps_it_has():
    model = AutoModelForSequenceClassification.from_config(ElectraConfig(**SIZES, embedding_size=8))
    attention = ["attention.output.dense", *(f"attention.self.{part}" for part in ("key", "query", "value"))]
    assert linear_maps(model) == [
        *attention,
        "electra.embeddings_project",
        "intermediate.dense",
        "output.dense",
    ]


# --- relative positions -------------------------------------------------------------------------------------

RELATIVE = {  # in transformers' own models: DeBERTaV3's form, and every other way that its configuration has
    "as DeBERTaV3": {"norm_rel_ebd": "layer_norm", "share_att_key": True},
    "DeBERTaV3's buckets": {"position_buckets": 256, "share_att_key": True},
    "maps of their own": {"share_att_key": False},
    "one direction": {"pos_att_type": ["c2p"], "norm_rel_ebd": "layer_norm"},
    "the other direction": {"pos_att_type": ["p2c"], "share_att_key": True},
    "no buckets": {"position_buckets": -1, "max_relative_positions": 24},
    "buckets too dense to be narrowed": {"position_buckets": 24, "max_relative_positions": 26},
    "none": {"relative_attention": False},
}


def with_relative_positions(how: str) -> nn.Module:
    torch.manual_seed(0)
    common = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}
    config = DebertaV2Config(**SIZES | common | RELATIVE[how])
    return AutoModelForSequenceClassification.from_config(config).double().eval()


@pytest.mark.parametrize("how", RELATIVE)
def test_narrowed_relative_positions_change_neither_logits_nor_gradients(how: str):
    whole = with_relative_positions(how)
    narrow = copy.deepcopy(whole)
    narrow_relative_positions(narrow)
    narrow_relative_positions(narrow)
    for tokens in (1, 2, 7, 8, 9, 15, 16, 17, 20, 31, 3):
        ids = torch.randint(3, 40, (3, tokens), generator=torch.Generator().manual_seed(tokens))
        mask = (torch.arange(tokens) < torch.tensor([[tokens], [tokens - 1], [1]])).long()
        for model in (whole, narrow):
            model.zero_grad()
            model(ids, attention_mask=mask).logits.square().sum().backward()
        torch.testing.assert_close(narrow(ids, mask).logits, whole(ids, mask).logits, rtol=1e-12, atol=1e-14)
        gradients = [[p.grad for _, p in sorted(model.named_parameters())] for model in (narrow, whole)]
        for ours, plain in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-14)


def test_over_100_steps_narrowed_positions_train_what_whole_ones_do():
    whole = with_relative_positions("as DeBERTaV3")
    narrow, embeddings = copy.deepcopy(whole), whole.deberta.encoder.rel_embeddings.weight
    start = embeddings.detach().clone()
    narrow_relative_positions(narrow)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in (narrow, whole)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        tokens = int(torch.randint(1, 40, (), generator=generator))
        ids = torch.randint(3, 40, (4, tokens), generator=generator)
        for model, optimizer in zip((narrow, whole), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(ids).logits, (ids[:, -1] > ids[:, 0]).long()).backward()
            optimizer.step()
    assert (embeddings - start).abs().mean() > 0.01
    for ours, plain in zip(narrow.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-8)


def test_an_adapted_query_is_asked_for_no_more_positions_than_there_are():
    model, rows = with_relative_positions("DeBERTaV3's buckets").float(), []
    layers = inject(model, TARGETS["deberta-v2"], rank=2, alpha=4)
    query = layers["deberta.encoder.layer.0.attention.self.query_proj"]
    query.register_forward_hook(lambda _module, inputs, _y: rows.append(inputs[0].shape[:2]))
    for tokens in (5, 40, 300, 9):
        model(torch.arange(3, 3 + 2 * tokens).view(2, tokens) % 40)
    assert rows == [(2, 5), (1, 10), (2, 40), (1, 80), (2, 300), (1, 512), (2, 9), (1, 18)]


@pytest.mark.parametrize(("buckets", "farthest"), [(256, 512), (16, 512), (32, 512), (8, 13), (256, 385)])
def test_no_bucket_has_a_number_above_its_distance(buckets: int, farthest: int):
    x = torch.empty(1, farthest, 1)
    relative = build_relative_position(x, x, buckets, farthest)[0]
    distance = torch.arange(farthest)[:, None] - torch.arange(farthest)
    assert (relative.abs() <= distance.abs()).all()


def test_compiled_narrow_positions_follow_the_length_and_nothing_is_compiled_anew():
    model = with_relative_positions("as DeBERTaV3").float()
    whole = copy.deepcopy(model)
    narrow_relative_positions(model)
    compiled, graphs = torch.compile(model, backend="aot_eager"), []
    torch._dynamo.reset()
    counters.clear()
    for tokens in (12, 10, 30, 5, 16, 17, 12):
        ids = torch.arange(3, 3 + 2 * tokens).view(2, tokens) % 40
        torch.testing.assert_close(compiled(ids).logits, whole(ids).logits)
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert graphs[1] == graphs[-1]  # the second length makes the first one a variable


# --- the penalty --------------------------------------------------------------------------------------------


def mixed_layers() -> dict[str, SVDLinear]:
    layers = {f"{i}": adapter(3, *shape) for i, shape in enumerate([(5, 4), (4, 5), (5, 4), (8, 8)])}
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (p for layer in layers.values() for p in (layer.P, layer.Q)):
            p.normal_()
    layers["0"].mask(torch.tensor([True, False, True]))
    layers["3"].mask(torch.tensor([False, False, False]))
    return layers


@pytest.mark.parametrize("squared", [False, True])
def test_the_penalty_is_that_of_a_loop_over_matrices(squared: bool):
    layers = mixed_layers()
    assert orthogonality_penalty(layers, squared).item() == pytest.approx(
        penalty_by_loop(layers, squared), rel=1e-12
    )


@pytest.mark.parametrize("squared", [False, True])
def test_the_penaltys_gradient_is_that_of_finite_differences(squared: bool):
    layers = mixed_layers()
    names = [f"{i}.{part}" for i in layers for part in ("P", "Q")]
    modules = nn.ModuleDict(layers)

    def penalty(*matrices: torch.Tensor) -> torch.Tensor:
        for name, matrix in zip(names, matrices, strict=True):
            index, part = name.split(".")
            del modules[index]._parameters[part]
            modules[index]._parameters[part] = matrix
        return orthogonality_penalty(layers, squared)

    assert torch.autograd.gradcheck(
        penalty, [modules.get_parameter(name).detach().requires_grad_() for name in names]
    )


@pytest.mark.parametrize("squared", [False, True])
def test_the_gradient_at_orthonormal_matrices_is_zero_and_not_nan(squared: bool):
    layer = SVDLinear(nn.Linear(6, 6), 3, alpha=1)
    with torch.no_grad():
        layer.P.copy_(torch.eye(6)[:, :3])
        layer.Q.copy_(torch.eye(6)[3:])
    penalty = orthogonality_penalty({"it": layer}, squared)
    penalty.backward()
    assert penalty == 0
    assert torch.equal(layer.P.grad, torch.zeros(6, 3))
    assert torch.equal(layer.Q.grad, torch.zeros(3, 6))


def test_the_penalty_is_a_few_operations_however_many_adapters_there_are():
    def operations(n: int) -> int:
        layers = {str(i): SVDLinear(nn.Linear(8, 8), 3, alpha=1) for i in range(n)}
        with torch.profiler.profile() as profile:
            orthogonality_penalty(layers)
        return sum(
            event.count for event in profile.key_averages() if event.key in ("aten::bmm", "aten::stack")
        )

    assert operations(2) == operations(20)


@pytest.mark.parametrize("squared", [False, True])
def test_its_gradients_can_be_added_to_those_there_are(squared: bool):
    layers = mixed_layers()
    layers["0"].mask(torch.tensor([True, False, True]))
    layers["1"].shrink(torch.tensor([False, False, False]), torch.optim.SGD(layers["1"].parameters(), lr=1))
    layers["3"].shrink(torch.tensor([True, True, False]), torch.optim.SGD(layers["3"].parameters(), lr=1))
    params = [p for layer in layers.values() for p in (layer.P, layer.Q)]
    with torch.no_grad():
        params[4].copy_(torch.eye(*params[4].shape))  # orthonormal: no gradient, not NaN
    expected = [
        p + 0.3 * g
        for p, g in zip(
            params, torch.autograd.grad(orthogonality_penalty(layers, squared), params), strict=True
        )
    ]
    for p in params:
        p.grad = p.detach().clone()
    params[5].grad = None  # counts as 0
    expected[5] = expected[5] - params[5]
    add_penalty_gradients(layers, 0.3, squared)
    for p, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient.detach())

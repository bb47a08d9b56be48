"""harness/encoder.py: the maps of each architecture; narrowed relative positions, on transformers' models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLNetConfig,
)
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from adalora import SVDLinear, in_head, inject
from harness.encoder import TARGETS, narrow_relative_positions

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


def classifier(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(CONFIGS[architecture]).eval()


# --- the maps of each architecture --------------------------------------------------------------------------

ELECTRA = ElectraConfig(**SIZES, embedding_size=8)
BART = BartConfig(
    vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
)  # fmt: skip
XLNET = XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=24)


@pytest.mark.parametrize("config", [*CONFIGS.values(), ELECTRA, BART, XLNET], ids=lambda c: c.model_type)
def test_what_a_classifier_has_outside_its_encoder_is_its_head(config: PreTrainedConfig):
    model = AutoModelForSequenceClassification.from_config(config)
    outside = [name for name in model.state_dict() if not name.startswith(f"{model.base_model_prefix}.")]
    assert outside
    assert all(map(in_head, outside))


def test_every_architecture_with_maps_of_its_own_is_tested_here():
    assert {*TARGETS} - {"causal"} == {*CONFIGS}


@pytest.mark.parametrize("kind", ["svd", "lora"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_fresh_adapters_change_no_bit_of_the_output(architecture: str, kind: str):
    model, ids = classifier(architecture), torch.arange(4, 34).view(3, 10)
    before = model(ids).logits
    inject(model, TARGETS[architecture], rank=3, alpha=32, kind=kind)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_exactly_the_six_linear_maps_of_each_layer_are_adapted(architecture: str):
    model = classifier(architecture)
    layers = inject(model, TARGETS[architecture], rank=3, alpha=32)
    assert len(layers) == 2 * 6
    assert all(".layer." in name for name in layers)
    assert {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)} == layers
    triplets = sum(layer.P.shape[0] + layer.Q.shape[1] for layer in layers.values())
    assert triplets == 2 * (4 * (16 + 16) + 2 * (16 + 24))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_nothing_of_the_head_is_adapted_or_trained(architecture: str):
    model = classifier(architecture)
    inject(model, TARGETS[architecture], rank=3, alpha=32)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"P", "lam", "Q"}
    assert type(model.get_submodule("classifier")) is not SVDLinear


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


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_model_without_relative_positions_is_left_as_it_is(kind: str):
    model = classifier(kind)
    narrow_relative_positions(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


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
    narrow_relative_positions(model)
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


@pytest.mark.slow
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

"""Architectures, small and with random weights: adapt, train by algorithm 1, save, load, merge."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import fused
from adalora import SVDLinear, inject
from budget import CubicBudget
from ivon import IVON
from vilora import RankAllocator

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
ROOT = Path(__file__).resolve().parents[2]
T, T_I, T_F, DELTA_T = 30, 5, 10, 3
RANK, TARGET = 3, 1  # per adapter; the budget is of the whole model

# --- the table: model, inputs with labels, targets ----------------------------------------------------------

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES |= {"initializer_range": 0.3}  # with the default, 0.02, so small a model's output hardly varies
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 16}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
Built = tuple[nn.Module, dict, list[str]]


def vit() -> Built:
    config = transformers.ViTConfig(**IMAGE, num_labels=3)
    inputs = {"pixel_values": torch.randn(8, 3, 8, 8), "labels": torch.arange(8) % 3}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    return transformers.ViTForImageClassification(config), inputs, targets


def causal(config: type[transformers.PreTrainedConfig], **more: int) -> Built:
    config, ids = config(**TEXT, **TOKENS, num_key_value_heads=1, **more), torch.randint(3, 40, (8, 12))
    targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    return transformers.AutoModelForCausalLM.from_config(config), {"input_ids": ids, "labels": ids}, targets


def t5() -> Built:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    inputs = {"input_ids": torch.randint(3, 40, (8, 12)), "labels": torch.randint(3, 40, (8, 6))}
    return transformers.T5ForConditionalGeneration(config), inputs, ["q", "k", "v", "o", "wi", "wo"]


def whisper() -> Built:
    each = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in each.items()}
    sizes |= {"d_model": 16, "vocab_size": 40, "num_mel_bins": 8, "init_std": 0.3}
    sizes |= {"max_source_positions": 10, "max_target_positions": 8, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **TOKENS)
    inputs = {"input_features": torch.randn(8, 8, 20), "labels": torch.randint(3, 40, (8, 6))}
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    return transformers.WhisperForConditionalGeneration(config), inputs, targets


def modernbert() -> Built:
    more = {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4, "num_labels": 3}
    config = transformers.ModernBertConfig(**TEXT, **TOKENS, **more)
    inputs = {"input_ids": torch.randint(3, 40, (8, 12)), "labels": torch.arange(8) % 3}
    return transformers.ModernBertForSequenceClassification(config), inputs, ["Wqkv", "Wi", "Wo"]


def clip() -> Built:
    """Its loss needs no labels: the i-th text belongs to the i-th image."""
    config = transformers.CLIPConfig(text_config={**TEXT, **TOKENS}, vision_config=IMAGE, projection_dim=8)
    inputs = {"input_ids": torch.randint(3, 40, (8, 12)), "pixel_values": torch.randn(8, 3, 8, 8)}
    targets = "q_proj k_proj v_proj out_proj fc1 fc2 text_projection visual_projection".split()
    return transformers.CLIPModel(config), {**inputs, "return_loss": True}, targets


class TorchEncoder(nn.Module):
    """In training its attention reads out_proj's weight; in inference a layer reads all of its weights."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)

    def forward(self, x: Tensor, padding: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        y = self.encoder(x, src_key_padding_mask=padding)[:, 0]
        return (y - labels).square().mean(), y


def torch_encoder() -> Built:
    padding = torch.arange(6) >= torch.arange(8)[:, None] % 4 + 3
    inputs = {"x": torch.randn(8, 6, 16), "padding": padding, "labels": torch.randn(8, 16)}
    return TorchEncoder(), inputs, ["linear1", "linear2", "out_proj"]


ARCHITECTURES: dict[str, Callable[[], Built]] = {
    "ViT": vit,
    "Llama": lambda: causal(transformers.LlamaConfig),
    "Qwen2": lambda: causal(transformers.Qwen2Config),
    "Gemma": lambda: causal(transformers.GemmaConfig, head_dim=8),
    "Mistral": lambda: causal(transformers.MistralConfig, sliding_window=4),
    "T5": t5,
    "Whisper": whisper,
    "ModernBERT": modernbert,
    "CLIP": clip,
    "nn.TransformerEncoder": torch_encoder,
}

# --- training -----------------------------------------------------------------------------------------------


class Run(NamedTuple):
    name: str
    plain: nn.Module  # the model before `inject`
    model: nn.Module
    inputs: dict
    layers: dict[str, SVDLinear]
    allocator: RankAllocator
    kept: dict[int, tuple[int, int]]  # after each allocation: the sum of ranks(), and how many λ are not 0


def adapted(name: str, seed: int) -> tuple[nn.Module, nn.Module, dict, dict[str, SVDLinear]]:
    """The model without adapters, the model with fresh ones, inputs, and the adapters by name."""
    torch.manual_seed(seed)
    model, inputs, targets = ARCHITECTURES[name]()
    plain = copy.deepcopy(model)
    layers = inject(model, targets, RANK, alpha=6)
    fused.fuse(model, layers)
    return plain.eval(), model, inputs, layers


RUNS = [*((name, "mu") for name in ARCHITECTURES), ("Llama", "snr")]


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def run(request: pytest.FixtureRequest) -> Run:
    name, score = request.param
    plain, model, inputs, layers = adapted(name, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = IVON(trained, lr=4, ess=1e5, hess_init=0.1, beta2=0.9, clip_radius=0.2)
    budget = CubicBudget(RANK * len(layers), TARGET * len(layers), T, T_I, T_F, DELTA_T)
    allocator, kept = RankAllocator(layers, budget, score, optimizer), {}
    model.train()
    for t in range(1, T + 1):
        with optimizer.sampled_params(train=True):
            model(**inputs)[0].backward()
            fused.add_penalty_gradients(layers, 0.1)
        optimizer.step()
        allocator.step(t)
        optimizer.zero_grad()
        if budget.due(t):
            alive = sum(int(layer.lam.count_nonzero()) for layer in layers.values())
            kept[t] = sum(allocator.ranks().values()), alive
    return Run(name, plain, model.eval(), inputs, layers, allocator, kept)


@torch.no_grad()
def loss_and_output(model: nn.Module, inputs: dict) -> tuple[Tensor, Tensor]:
    return model(**inputs)[:2]


def test_training_lowers_the_loss_and_every_number_stays_finite(run: Run):
    before, after = (loss_and_output(model, run.inputs)[0] for model in (run.plain, run.model))
    assert after < 0.9 * before
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_each_allocation_keeps_exactly_its_budget(run: Run):
    assert list(run.kept) == [6, 9, 12, 15, 18, 20]
    assert run.kept == {t: (run.allocator.budget(t),) * 2 for t in run.kept}
    assert sum(run.allocator.ranks().values()) == TARGET * len(run.layers)


def test_in_the_end_the_dropped_triplets_are_gone(run: Run):
    ranks = run.allocator.ranks()
    for name, layer in run.layers.items():
        assert layer.P.shape == (layer.out_features, ranks[name])
        assert layer.lam.shape == (ranks[name],)
        assert layer.Q.shape == (ranks[name], layer.in_features)


def test_frozen_weights_have_not_changed(run: Run):
    now = {name.replace(".base.", "."): x for name, x in run.model.state_dict().items()}
    for name, before in run.plain.state_dict().items():
        assert torch.equal(now[name], before), name


@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
def test_fresh_adapters_take_on_a_saved_state(run: Run, file: str, tmp_path: Path):
    _, fresh, _, _ = adapted(run.name, seed=1)
    if file == "model.pt":
        torch.save(run.model.state_dict(), tmp_path / file)
        fresh.load_state_dict(torch.load(tmp_path / file))
    else:
        safetensors.torch.save_model(run.model, tmp_path / file)
        safetensors.torch.load_model(fresh, tmp_path / file)
    _, expected = loss_and_output(run.model, run.inputs)
    assert torch.equal(loss_and_output(fresh.eval(), run.inputs)[1], expected)


def test_merged_weights_in_the_plain_model_give_the_same_output(run: Run):
    merged = copy.deepcopy(run.plain)
    with torch.no_grad():
        for name, layer in run.layers.items():
            merged.get_submodule(name).weight.copy_(layer.base.weight + layer.delta())
    (_, got), (_, expected) = (loss_and_output(model, run.inputs) for model in (merged, run.model))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_layer_before_modernberts_classifier_is_part_of_its_head():
    model, *_ = modernbert()
    with pytest.raises(ValueError, match=r"head\.dense is part of the head"):
        inject(model, ["head.dense"], RANK, alpha=6)


# --- docs/vision.py -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_vision_example_learns_with_adapters_what_its_head_alone_cannot():
    command = [sys.executable, ROOT / "docs/vision.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    filled, before, head_alone, adapters = map(float, re.findall(r"([\d.]+) on ", printed))
    assert min(filled, adapters) > 0.85
    assert adapters > head_alone + 0.1
    assert head_alone > before
    ranks = [int(n) for line in printed.splitlines()[-3:] for n in line.split()[1:]]
    assert len(ranks) == 3 * 6
    assert sum(ranks) == 2 * len(ranks)

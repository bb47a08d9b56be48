"""run_glue.py from its command line: what a run leaves behind."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import electra_checkpoint, sentences, write_glue
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

import adalora
import fused
import run_glue
from adalora import inject
from budget import CubicBudget
from harness import encoder, glue
from harness.encoder import TARGETS
from harness.metrics import rank_table
from harness.settings import TASKS, Settings, exit_status
from harness.task import Task
from scores import SCORES
from vilora import RankAllocator

HERE = Path(run_glue.__file__).parent
MINILM, GLUE = os.environ.get("MINILM_DIR"), os.environ.get("GLUE_DIR")
SHORT = ["--max_steps", "24", "--eval_every", "8", "--batch_size", "8", "--max_length", "16"]


def run(argv: list[str]) -> int:
    return exit_status(lambda: run_glue.main(argv), "run_glue.py")


@pytest.fixture
def glue_folder(tmp_path: Path) -> Path:
    return write_glue(tmp_path / "glue", "cola")


def command(model: Path, data: Path, output: Path, *more: str, task: str = "cola") -> list[str]:
    where = ["--model", str(model), "--data_dir", str(data), "--output_dir", str(output)]
    return ["--task", task, *where, *SHORT, *more]


def read(folder: Path) -> tuple[dict, dict, list[dict]]:
    config, results = (json.loads((folder / name).read_text()) for name in ("config.json", "results.json"))
    return config, results, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- a run --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_runs_from_the_command_line_in_another_folder(tmp_path: Path):
    argv = [sys.executable, str(HERE / "run_glue.py"), "--demo", "--max_steps", "30", "--eval_every", "15"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    config, results, records = read(tmp_path / "runs/demo-adalora-ivon-mu-r2-s2021")
    assert (results["task"], results["method"], results["optimizer"], results["score"]) == (
        "cola",
        "adalora",
        "ivon",
        "mu",
    )
    assert (results["seed"], results["demo"], results["metric"]) == (2021, True, "matthews_correlation")
    assert set(results) == {
        "task", "method", "optimizer", "score", "seed", "demo", "metric", "best", "last", "ranks", "budget",
        "trainable_parameters", "kept_parameters", "seconds", "steps_per_second", "peak_memory_mb",
    }  # fmt: skip
    n = len(results["ranks"])
    assert results["budget"] == {"b0": 3 * n, "bT": 2 * n, "kept": 2 * n}
    assert sum(results["ranks"].values()) == 2 * n
    training = [record for record in records if "loss" in record]
    assert [record["step"] for record in training] == list(range(1, 31))
    assert all(set(record) == {"step", "loss", "lr", "budget"} for record in training)
    evaluations = [record for record in records if "split" in record]
    assert [(e["step"], e["split"]) for e in evaluations] == [(15, "validation"), (30, "validation")]
    best = max(evaluations, key=lambda e: e["matthews_correlation"])
    assert results["best"] == {key: best[key] for key in ("step", "matthews_correlation")}
    assert results["last"]["step"] == 30
    assert config["total_steps"] == 30
    assert config["versions"]["torch"] == torch.__version__
    assert f"best matthews_correlation {best['matthews_correlation']:.4f}" in done.stdout
    grid = done.stdout[done.stdout.index("layer") :].splitlines()
    assert sum(int(rank) for row in grid[1 : n // 6 + 1] for rank in row.split()[1:]) == 2 * n


@pytest.mark.parametrize(("optimizer", "score"), [("ivon", "snr"), ("adamw", "sensitivity")])
def test_the_same_seed_gives_the_same_results_and_another_seed_others(
    optimizer: str, score: str, deberta: Path, glue_folder: Path, tmp_path: Path
):
    runs = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        more = ["--optimizer", optimizer, "--score", score, "--seed", seed, "--device", "cpu"]
        assert run(command(deberta, glue_folder, tmp_path / name, *more)) == 0
        _, results, records = read(tmp_path / name)
        adapter = (tmp_path / name / "adapter/adapter.safetensors").read_bytes()
        runs[name] = results["best"], results["last"], results["ranks"], records, adapter
    assert runs["a"] == runs["b"]
    assert runs["a"][3] != runs["c"][3]


def test_a_checkpoint_stored_as_deberta_v3_trains_in_float32(
    deberta: Path, glue_folder: Path, tmp_path: Path
):
    assert not (deberta / "tokenizer.json").exists()
    stored = torch.load(deberta / "pytorch_model.bin", weights_only=True)
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    assert run(command(deberta, glue_folder, tmp_path / "run")) == 0
    _, results, records = read(tmp_path / "run")
    assert all(math.isfinite(record["loss"]) for record in records if "loss" in record)
    assert all(name.startswith("deberta.encoder.layer.") for name in results["ranks"])
    adapter = load_file(tmp_path / "run/adapter/adapter.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert {"pooler.dense.weight", "classifier.bias"} <= set(adapter)


def test_the_adapter_is_saved_at_its_kept_ranks_with_its_sigma(bert: Path, glue_folder: Path, tmp_path: Path):
    # Evaluated once, at the end, so that the best evaluation has the final pattern.
    assert run([*command(bert, glue_folder, tmp_path / "run"), "--eval_every", "100"]) == 0
    _, results, _ = read(tmp_path / "run")
    adapter, sigma = (
        load_file(tmp_path / f"run/adapter/{name}.safetensors") for name in ("adapter", "posterior")
    )
    assert {name: tensor.shape for name, tensor in adapter.items()} == {n: t.shape for n, t in sigma.items()}
    assert all((tensor > 0).all() for tensor in sigma.values())
    assert min(results["ranks"].values()) < max(results["ranks"].values())
    kept = 0
    for name, rank in results["ranks"].items():
        P, lam, Q = (adapter[f"{name}.{part}"] for part in ("P", "lam", "Q"))
        assert P.shape[1] == lam.shape[0] == Q.shape[0] == rank
        assert lam.all()
        kept += P.numel() + lam.numel() + Q.numel()
    assert kept == results["kept_parameters"] < results["trainable_parameters"]


def test_adamw_leaves_no_posterior(bert: Path, glue_folder: Path, tmp_path: Path):
    assert run(command(bert, glue_folder, tmp_path / "run", "--optimizer", "adamw")) == 0
    assert [path.name for path in (tmp_path / "run/adapter").iterdir()] == ["adapter.safetensors"]


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_baselines_train_and_are_saved_whole(
    method: str, optimizer: str, bert: Path, glue_folder: Path, tmp_path: Path
):
    more = ["--method", method, "--optimizer", optimizer]
    assert run(command(bert, glue_folder, tmp_path / "run", *more)) == 0
    config, results, records = read(tmp_path / "run")
    assert (results["method"], results["score"]) == (method, None)
    before = load_file(bert / "model.safetensors")
    adapter = load_file(tmp_path / "run/adapter/adapter.safetensors")
    sigma = tmp_path / "run/adapter/posterior.safetensors"
    assert sigma.exists() == (optimizer == "ivon")
    if sigma.exists():
        shapes = {name: tensor.shape for name, tensor in load_file(sigma).items()}
        assert shapes == {name: tensor.shape for name, tensor in adapter.items()}
    head = sum(t.numel() for name, t in adapter.items() if "pooler" in name or "classifier" in name)
    trained = sum(t.numel() for t in adapter.values()) - head
    assert trained == results["trainable_parameters"] == results["kept_parameters"]
    if method == "lora":
        assert set(results["ranks"].values()) == {2}
        assert results["budget"] == dict.fromkeys(("b0", "bT", "kept"), 2 * len(results["ranks"]))
        assert trained == 2 * 2 * (4 * (16 + 16) + 2 * (16 + 24))  # layers, rank, maps
        assert config["init_rank"] == config["target_rank"] == 2
        assert all(record["budget"] == 24 for record in records if "budget" in record)
    else:
        assert results["ranks"] == {}
        assert trained == sum(t.numel() for name, t in before.items() if "pooler" not in name)
        moved = [name for name in before if not torch.equal(before[name], adapter[f"bert.{name}"])]
        assert any("encoder.layer.0" in name for name in moved)
        assert any("word_embeddings" in name for name in moved)


@pytest.mark.parametrize("method", ["adalora", "lora", "full"])
def test_deberta_computes_with_no_more_relative_positions_than_occur(
    method: str, deberta: Path, glue_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapt, rows = encoder.adapt, []

    def watched(model: nn.Module, *args: object) -> dict[str, nn.Module]:
        layers = adapt(model, *args)
        key = model.deberta.encoder.layer[1].attention.self.key_proj
        key.register_forward_pre_hook(lambda _module, inputs: rows.append(inputs[0].shape[:2]))
        return layers

    monkeypatch.setattr(encoder, "adapt", watched)
    assert run(command(deberta, glue_folder, tmp_path / "run", "--method", method, "--max_length", "6")) == 0
    assert rows
    for (_, tokens), positions in zip(rows[::2], rows[1::2], strict=True):
        assert positions == (1, 2 * tokens) < (1, 16)


def test_lora_of_rank_2_on_deberta_v3_base_has_the_papers_number_of_parameters():
    with torch.device("meta"):
        model = transformers.DebertaV2ForSequenceClassification(
            transformers.DebertaV2Config(hidden_size=768, num_hidden_layers=12, intermediate_size=3072)
        )
    layers = inject(model, TARGETS["deberta-v2"], 2, 32, kind="lora")
    assert sum(p.numel() for layer in layers.values() for p in (layer.A, layer.B)) == 331_776
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 331_776


@pytest.mark.slow
@pytest.mark.parametrize(
    "ablation",
    [
        ["--score", "raw_sensitivity"],
        ["--score", "lambda"],
        ["--target_rank", "3", "--init_rank", "3"],
        ["--orth", "0"],
        ["--squared_orth"],
    ],
    ids=" ".join,
)
def test_every_ablation_of_adalora_changes_the_weights_or_the_ranks(
    ablation: list[str], bert: Path, glue_folder: Path, tmp_path: Path
):
    weights = {}
    for name, more in (("usual", []), ("ablation", ablation)):
        argv = command(bert, glue_folder, tmp_path / name, "--optimizer", "adamw", "--lr", "0.01", *more)
        assert run(argv if "--score" in more else [*argv, "--score", "sensitivity"]) == 0
        _, results, _ = read(tmp_path / name)
        weights[name] = results["ranks"], (tmp_path / name / "adapter/adapter.safetensors").read_bytes()
    assert weights["usual"] != weights["ablation"]
    if "--init_rank" in ablation:
        assert set(weights["ablation"][0].values()) == {3}


def test_a_run_at_a_tenth_of_a_rank_saves_and_counts_modules_at_rank_0(
    bert: Path, glue_folder: Path, tmp_path: Path
):
    more = ["--target_rank", "0.1", "--init_rank", "2", "--eval_every", "100"]
    assert run(command(bert, glue_folder, tmp_path / "run", *more)) == 0
    _, results, _ = read(tmp_path / "run")
    ranks = results["ranks"]
    assert sum(ranks.values()) == results["budget"]["bT"] == 1  # round(0.1 · 12)
    (kept,) = (name for name, rank in ranks.items() if rank)
    adapter = load_file(tmp_path / "run/adapter/adapter.safetensors")
    P, Q = adapter[f"{kept}.P"], adapter[f"{kept}.Q"]
    assert results["kept_parameters"] == P.numel() + 1 + Q.numel()
    sizes = {name: tuple(adapter[f"{name}.{part}"].numel() for part in ("P", "lam", "Q")) for name in ranks}
    assert all(size == (0, 0, 0) for name, size in sizes.items() if name != kept)


@pytest.mark.parametrize(("optimizer", "score"), [("ivon", "mu"), ("adamw", "sensitivity")])
def test_following_the_scores_does_not_change_the_run(
    optimizer: str, score: str, bert: Path, glue_folder: Path, tmp_path: Path
):
    found = {}
    for name, more in (("plain", []), ("tracked", ["--track_scores"])):
        more = [*more, "--optimizer", optimizer, "--score", score]
        assert run(command(bert, glue_folder, tmp_path / name, *more)) == 0
        _, results, records = read(tmp_path / name)
        weights = (tmp_path / name / "adapter/adapter.safetensors").read_bytes()
        found[name] = results["best"], results["last"], results["ranks"], records, weights
    assert found["plain"] == found["tracked"]
    assert not (tmp_path / "plain/score_agreement.jsonl").exists()
    lines = (tmp_path / "tracked/score_agreement.jsonl").read_text().splitlines()
    budget = CubicBudget(36, 24, 24, 2, 12, 1)
    due = [t for t in range(1, 25) if budget.due(t)]
    assert [json.loads(line)["step"] for line in lines] == due
    for line in map(json.loads, lines):
        assert line["budget"] == budget(line["step"])
        names = [name for name in SCORES if SCORES[name].needs != "sigma" or optimizer == "ivon"]
        assert len(line["spearman"]) == len(line["jaccard"]) == math.comb(len(names), 2)
        assert (line["sigma_cv"] is None) == (optimizer == "adamw")


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in glue.TASKS if task != "cola"])
def test_every_task_trains(task: str, bert: Path, tmp_path: Path):
    data = write_glue(tmp_path / "glue", task)
    assert run(command(bert, data, tmp_path / "run", task=task)) == 0
    _, results, records = read(tmp_path / "run")
    expected = {
        "mrpc": {"accuracy", "f1"},
        "qqp": {"accuracy", "f1"},
        "mnli": {"accuracy", "accuracy_mismatched"},
    }
    expected["stsb"] = {"pearson_spearman", "pearson", "spearman"}
    assert set(results["best"]) == {"step", *expected.get(task, {"accuracy"})}
    if task == "mnli":
        assert {r["split"] for r in records if "split" in r} == {
            "validation_matched",
            "validation_mismatched",
        }


@pytest.mark.parametrize("score", SCORES)
def test_every_score_runs_with_ivon(score: str, bert: Path, glue_folder: Path, tmp_path: Path):
    assert run(command(bert, glue_folder, tmp_path / "run", "--score", score)) == 0


@pytest.mark.parametrize(("rank", "kept"), [("0", 0), ("0.25", 3), ("1", 12)])
def test_target_ranks_go_down_to_0_which_trains_the_head_alone(
    rank: str, kept: int, bert: Path, glue_folder: Path, tmp_path: Path
):
    assert run(command(bert, glue_folder, tmp_path / "run", "--target_rank", rank)) == 0
    _, results, _ = read(tmp_path / "run")
    assert results["budget"]["kept"] == sum(results["ranks"].values()) == kept
    assert (results["trainable_parameters"] == 0) == (rank == "0")


def test_each_update_has_the_learning_rate_and_the_budget_that_are_recorded(
    bert: Path, glue_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step, used = torch.optim.AdamW.step, []

    def watched(self: torch.optim.AdamW, *args: object) -> object:
        used.append({group["lr"] for group in self.param_groups})
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    more = "--optimizer adamw --score sensitivity --lr 0.01 --tinit 2 --tfinal 12 --delta_t 1".split()
    assert run(command(bert, glue_folder, tmp_path / "run", *more)) == 0
    records = [record for record in read(tmp_path / "run")[2] if "loss" in record]
    expected = [0.01 * (25 - t) / 24 for t in range(1, 25)]  # 24 updates: the scaled warm-up has none
    assert [record["lr"] for record in records] == pytest.approx(expected)
    assert used == [{record["lr"]} for record in records]
    budget = CubicBudget(36, 24, 24, 2, 12, 1)
    assert [record["budget"] for record in records] == [budget(t) for t in range(1, 25)]


@pytest.mark.parametrize("flags", ["", "--orth 0.3 --squared_orth", "--plain"])
def test_the_penalty_has_the_weight_and_the_form_of_the_settings(
    flags: str, bert: Path, glue_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module, calls = adalora if flags == "--plain" else fused, []
    monkeypatch.setattr(module, "add_penalty_gradients", lambda _, *how: calls.append(how))
    assert run(command(bert, glue_folder, tmp_path / "run", *flags.split())) == 0
    assert calls == [(0.3, True) if "--orth" in flags else (0.1, False)] * 24


def test_the_loss_of_a_regression_is_the_mean_squared_error_example_by_example():
    assert run_glue.task_loss(torch.tensor([[1.0], [4.0]]), torch.tensor([0.0, 4.0])).item() == 0.5


ACCUMULATING = {
    "adamw": ["--optimizer", "adamw"],
    # No noise and no clip; one draw goes around all micro-batches.
    "ivon": "--ess 1e30 --beta2 1 --weight_decay 0 --clip_radius 1e6 --hess_init 1 --lr 0.1".split(),
}


@pytest.mark.parametrize("optimizer", ACCUMULATING)
def test_accumulated_micro_batches_are_the_large_batch(
    optimizer: str, bert: Path, glue_folder: Path, tmp_path: Path
):
    config = json.loads((bert / "config.json").read_text())
    still = tmp_path / "no-dropout"  # dropout draws differ between the two
    still.mkdir()
    for file in bert.iterdir():
        (still / file.name).write_bytes(file.read_bytes())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))
    adapters = []
    for name, batch, accumulate in (
        ("large", "9", "1"),
        ("small", "3", "3"),
    ):  # 24 examples: the last is short
        more = [*ACCUMULATING[optimizer], "--eval_every", "24"]
        more += ["--batch_size", batch, "--grad_accum", accumulate]
        assert run(command(still, glue_folder, tmp_path / name, *more)) == 0
        adapters.append(load_file(tmp_path / name / "adapter/adapter.safetensors"))
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=0, atol=1e-5)


def test_several_draws_an_update_are_another_run_than_one(bert: Path, glue_folder: Path, tmp_path: Path):
    losses = []
    for draws in ("1", "2"):
        assert run(command(bert, glue_folder, tmp_path / draws, "--mc_samples", draws)) == 0
        losses.append([record["loss"] for record in read(tmp_path / draws)[2] if "loss" in record])
    assert losses[0] != losses[1]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.1)  # a mean, not a sum


@pytest.mark.slow
def test_plain_and_fused_keep_the_same_triplets_and_train_the_same_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On the demo, over 50 updates, of which 6 to 31 prune."""
    kept, weights, make_allocator = {}, {}, run_glue.make_allocator

    def watched(layers: dict, *args: object) -> RankAllocator:
        allocator = make_allocator(layers, *args)
        kept[name] = allocator
        return allocator

    monkeypatch.setattr(run_glue, "make_allocator", watched)
    for name, more in (("fused", []), ("plain", ["--plain"])):
        argv = ["--demo", "--optimizer", "ivon", "--score", "mu", "--max_steps", "50", "--eval_every", "50"]
        assert run([*argv, "--device", "cpu", "--output_dir", str(tmp_path / name), *more]) == 0
        weights[name] = load_file(tmp_path / name / "adapter/adapter.safetensors")
        replaced = ["forward" in vars(layer) for layer in kept[name].layers.values()]
        assert all(replaced) if name == "fused" else not any(replaced)
    assert kept["fused"].ranks() == kept["plain"].ranks()
    for layer, mask in kept["fused"].kept.items():
        assert torch.equal(mask, kept["plain"].kept[layer])
    assert sum(kept["plain"].ranks().values()) < sum(mask.numel() for mask in kept["plain"].kept.values())
    assert weights["fused"].keys() == weights["plain"].keys()
    for tensor_name, tensor in weights["fused"].items():
        torch.testing.assert_close(weights["plain"][tensor_name], tensor, rtol=0, atol=1e-5)


def test_checkpointing_activations_changes_no_result(bert: Path, glue_folder: Path, tmp_path: Path):
    weights = []
    for name, flags in (("all", []), ("few", ["--checkpointing"])):
        assert run(command(bert, glue_folder, tmp_path / name, *flags)) == 0
        weights.append(load_file(tmp_path / name / "adapter/adapter.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-6)


def test_at_beta2_of_1_every_sigma_stays_what_h0_makes_it(bert: Path, glue_folder: Path, tmp_path: Path):
    more = ["--beta2", "1", "--hess_init", "0.5", "--ess", "800", "--weight_decay", "0"]
    assert run(command(bert, glue_folder, tmp_path / "run", *more)) == 0
    sigma = load_file(tmp_path / "run/adapter/posterior.safetensors")
    for tensor in sigma.values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, (800 * 0.5) ** -0.5), rtol=1e-6, atol=0)


def test_dropout_reaches_every_adapter_and_changes_training(
    bert: Path, glue_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapt, rates, losses = encoder.adapt, [], []

    def watched(*args: object) -> dict[str, nn.Module]:
        layers = adapt(*args)
        rates.append({layer.dropout.p for layer in layers.values()})
        return layers

    monkeypatch.setattr(encoder, "adapt", watched)
    for name, more in (("without", []), ("with", ["--dropout", "0.25"])):
        assert run(command(bert, glue_folder, tmp_path / name, "--lr", "2", *more)) == 0
        losses.append([record["loss"] for record in read(tmp_path / name)[2] if "loss" in record])
    assert rates == [{0.0}, {0.25}]
    assert losses[0] != losses[1]


def test_a_task_of_ones_own_needs_a_task_and_nothing_else(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(data_dir: Path | None, splits: tuple[str, ...]) -> dict[str, Dataset]:
        columns = {"question": sentences(30), "label": [0, 1, 2] * 10, "idx": range(30)}
        return {split: Dataset.from_dict(columns) for split in splits}

    def hits(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"hits": float((predictions == labels).sum())}

    own = {"epochs": 2, "tinit": 5, "tfinal": 10, "total_steps": 20}
    published = glue.published("rte", "adalora", "ivon") | own
    colours = Task(
        "colours", "", load, ("question",), ("red", "green", "blue"), hits, "hits", lambda *_: published, 320
    )
    monkeypatch.setitem(TASKS, "colours", colours)
    settings = Settings(task="colours", model=str(bert), batch_size=4, output_dir=tmp_path / "run")
    run_glue.train(settings.completed())
    config, results, records = read(tmp_path / "run")
    assert (results["task"], results["metric"]) == ("colours", "hits")
    assert config["total_steps"] == 2 * 8
    assert config["tinit"] == 5 * 16 // 20  # of the 20 updates that the settings are for
    assert results["best"]["hits"] == max(record["hits"] for record in records if "split" in record)


def test_an_architecture_without_defaults_runs_with_targets(glue_folder: Path, bert: Path, tmp_path: Path):
    electra = electra_checkpoint(bert, tmp_path)
    argv = command(
        electra, glue_folder, tmp_path / "run", "--targets", "attention.self.query", "output.dense"
    )
    assert run(argv) == 0
    assert len(read(tmp_path / "run")[1]["ranks"]) == 2 * 3


def test_the_rank_table_has_a_row_without_a_number_for_adapters_outside_the_layers(
    glue_folder: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    electra = electra_checkpoint(bert, tmp_path)
    config = transformers.ElectraConfig.from_pretrained(electra, embedding_size=8)
    transformers.ElectraModel(config).save_pretrained(electra)
    argv = command(electra, glue_folder, tmp_path / "run", "--max_length", "16")
    assert run([*argv, "--targets", "embeddings_project", "self.query"]) == 0
    ranks = read(tmp_path / "run")[1]["ranks"]
    layer = "electra.encoder.layer.{}.attention.self.query"
    assert set(ranks) == {"electra.embeddings_project", layer.format(0), layer.format(1)}
    out = capsys.readouterr().out
    table = [row.split() for row in out[out.index("layer ") :].splitlines()[:4]]
    assert table == [
        ["layer", "electra.embeddings_project", "attention.self.query"],
        [str(ranks["electra.embeddings_project"])],
        ["0", str(ranks[layer.format(0)])],
        ["1", str(ranks[layer.format(1)])],
    ]


@pytest.mark.parametrize("maps", [1, 2, 7])
@pytest.mark.parametrize("numbered", [True, False])
def test_the_rank_table_has_a_row_a_layer_and_a_column_a_map(numbered: bool, maps: int):
    layers = ["block.0.", "block.11."] if numbered else [""]
    names = [chr(ord("a") + i) for i in range(maps)]
    ranks = {f"{layer}{name}": 3 * i + j for i, layer in enumerate(layers) for j, name in enumerate(names)}
    rows = [row.split() for row in rank_table(ranks).splitlines()]
    numbers = [[str(3 * i + j) for j in range(maps)] for i in range(len(layers))]
    expected = [["0", *numbers[0]], ["11", *numbers[1]]] if numbered else numbers
    assert rows == [["layer", *names], *expected]


def test_a_map_that_a_layer_lacks_is_blank_in_the_rank_table():
    table = rank_table({"encoder.layer.0.a": 1, "encoder.layer.0.out.b": 0, "encoder.layer.11.out.b": 12})
    assert table.splitlines() == ["layer  a  out.b", "    0  1      0", "   11        12"]


def test_an_encoders_and_a_decoders_layers_are_rows_of_their_own():
    table = rank_table({"encoder.layers.0.a": 1, "encoder.layers.1.a": 2, "decoder.layers.0.a": 3, "b": 4})
    rows = [row.split() for row in table.splitlines()]
    assert rows[0] == ["layer", "a", "b"]
    assert rows[1:] == [
        ["encoder.layers.0", "1"],
        ["encoder.layers.1", "2"],
        ["decoder.layers.0", "3"],
        ["4"],
    ]


def test_a_finished_run_is_overwritten_only_when_told_to(
    bert: Path, glue_folder: Path, tmp_path: Path, capsys
):
    argv = command(bert, glue_folder, tmp_path / "run")
    assert run(argv) == 0
    before = (tmp_path / "run/results.json").read_text()
    assert run([*argv, "--seed", "5"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "run/results.json").read_text() == before
    assert run([*argv, "--seed", "5", "--overwrite"]) == 0
    assert read(tmp_path / "run")[1]["seed"] == 5


def test_a_loss_that_is_not_finite_stops_the_run_with_status_3(
    bert: Path, glue_folder: Path, tmp_path: Path, capsys
):
    assert run(command(bert, glue_folder, tmp_path / "run", "--optimizer", "adamw", "--lr", "1e15")) == 3
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run/results.json").exists()


def test_with_bf16_the_backbone_computes_in_bfloat16_and_all_that_is_trained_in_float32(
    bert: Path, glue_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen, plain = set(), fused.add_penalty_gradients
    load = encoder.load_model

    def load_and_watch(*args: object) -> tuple:
        tokenizer, model = load(*args)
        for head in (model.classifier, model.bert.pooler.dense):
            head.register_forward_hook(lambda *of: seen.add(("head", of[-1].dtype)))
        return tokenizer, model

    monkeypatch.setattr(encoder, "load_model", load_and_watch)

    def look(layers: dict, *args: object, **kwargs: object) -> None:
        plain(layers, *args, **kwargs)
        layer = next(iter(layers.values()))
        with torch.autocast("cpu", torch.bfloat16):
            seen.add(("base", layer.base(torch.ones(1, 16)).dtype))
        seen.update(
            ("trained", tensor.dtype) for p in layer.parameters() for tensor in (p, p.grad) if p.requires_grad
        )

    monkeypatch.setattr(fused, "add_penalty_gradients", look)
    assert run(command(bert, glue_folder, tmp_path / "run", "--bf16")) == 0
    assert seen == {("base", torch.bfloat16), ("trained", torch.float32), ("head", torch.float32)}
    assert run(command(bert, glue_folder, tmp_path / "plain")) == 0
    losses = [
        [record["loss"] for record in read(tmp_path / name)[2] if "loss" in record]
        for name in ("run", "plain")
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", "deberta"])
def test_a_compiled_run_is_the_same_run_and_only_the_cut_compiles_it_anew(
    architecture: str,
    request: pytest.FixtureRequest,
    glue_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """With dynamo and the derivatives' tracer, but no code generator: what it could not follow would show."""
    model = request.getfixturevalue(architecture)
    compiled, graphs, eager = torch.compile, [], run_glue.learning_rate

    def count(*args: object) -> float:
        graphs.append(counters["stats"]["unique_graphs"])
        return eager(*args)

    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager"))
    monkeypatch.setattr(run_glue, "learning_rate", count)
    counters.clear()
    more = ["--eval_every", "24", "--batch_size", "6", "--tinit", "5", "--tfinal", "8", "--delta_t", "1"]
    assert run([*command(model, glue_folder, tmp_path / "run", "--compile"), *more]) == 0
    assert not counters["graph_break"]
    assert graphs[3] > 0
    # Four batches an epoch. The first epochs see new lengths; then nothing is new until T − t_f = 16.
    assert graphs[8] == graphs[16] < graphs[17]
    assert graphs[20] == graphs[23]
    monkeypatch.undo()
    assert run([*command(model, glue_folder, tmp_path / "plain"), *more]) == 0
    for ours, plain in zip(read(tmp_path / "run")[2], read(tmp_path / "plain")[2], strict=True):
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(plain["loss"], rel=0.2)  # dropout draws differ


def test_a_run_with_batches_of_like_length_is_another_run(bert: Path, glue_folder: Path, tmp_path: Path):
    losses = []
    for name, more in (("plain", []), ("grouped", ["--group_by_length"])):
        assert run(command(bert, glue_folder, tmp_path / name, *more)) == 0
        losses.append([r["loss"] for r in read(tmp_path / name)[2] if "loss" in r])
    assert losses[0] != losses[1]
    assert len(losses[0]) == len(losses[1]) == 24


# --- real data, a real encoder ------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (MINILM and GLUE), reason="MINILM_DIR and GLUE_DIR name no checkpoint and no GLUE folder"
)
@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_a_real_encoder_trains_and_is_evaluated_on_real_data(task: str, tmp_path: Path):
    argv = [
        "--task",
        task,
        "--model",
        MINILM,
        "--data_dir",
        GLUE,
        "--optimizer",
        "adamw",
        "--score",
        "sensitivity",
    ]
    assert run([*argv, "--max_steps", "4", "--output_dir", str(tmp_path / "run")]) == 0
    _, results, records = read(tmp_path / "run")
    assert len(results["ranks"]) == 6 * 6
    assert all(math.isfinite(record["loss"]) for record in records if "loss" in record)
    assert results["last"]["step"] == 4


def test_evaluations_record_what_ivon_is_doing(bert: Path, glue_folder: Path, tmp_path: Path):
    def of(folder: str, *more: str) -> list[dict]:
        assert run(command(bert, glue_folder, tmp_path / folder, *more)) == 0
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if "split" in record]

    for record in of("ivon"):
        found = record["optimizer"]
        assert 0 <= found["clipped"] <= found["mean_step"] <= 1
        assert found["h_05"] <= found["h_50"] <= found["h_95"]
        assert found["sigma"] > 0
        assert found["law"] > 0
    held = of("held", "--beta2", "1")[-1]["optimizer"]
    assert (held["h_05"], held["h_95"], held["law"]) == (1, 1, 0)
    assert held["sigma_cv"] < 1e-6
    assert all("optimizer" not in record for record in of("adamw", "--optimizer", "adamw", "--score", "mu"))

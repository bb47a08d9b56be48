"""Prediction and tools.evaluate: averages against quadrature, runs evaluated again, submissions."""

import csv
import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LABELS, write_glue
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import run_glue
from harness.batches import Split
from harness.glue import FILE_COLUMNS, TASKS, load_task
from harness.metrics import calibration
from harness.prediction import drawn, judge, predict, predict_from_draws
from harness.settings import exit_status
from tools import evaluate

SHORT = ["--max_steps", "16", "--eval_every", "8", "--batch_size", "8", "--max_length", "16"]


class Linear(nn.Module):
    """Logits (0, w·x) or the number w·x, and how often it was asked."""

    device = torch.device("cpu")

    def __init__(self, w: list[float], classes: bool):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))
        self.classes, self.calls = classes, 0

    def forward(self, x: Tensor) -> Namespace:
        self.calls += 1
        z = x @ self.w
        return Namespace(logits=torch.stack([0 * z, z], dim=-1) if self.classes else z.unsqueeze(-1))


X = torch.tensor([[1.0, 0.5], [-2.0, 1.0], [0.1, 3.0], [0.0, 0.0]])
M, SIGMA = [0.7, -0.4], {"w": torch.tensor([0.9, 0.3])}


def linear(classes: bool) -> tuple[Linear, Split]:
    labels = torch.tensor([1, 0, 0, 1]) if classes else torch.tensor([1.0, 0.0, 0.5, 0.0])
    return Linear(M, classes), Split([{"x": X[:3]}, {"x": X[3:]}], torch.arange(4), labels)


# --- the average --------------------------------------------------------------------------------------------

DRAWS = [2_000, pytest.param(20_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("temperature", [0.25, 1.0, 2.0])
def test_the_predictive_distribution_of_a_linear_model_is_that_of_quadrature(temperature: float, draws: int):
    model, split = linear(classes=True)
    got = predict_from_draws(model, split, SIGMA, draws, temperature, seed=0)
    # w·x ~ N(m·x, τ Σ σ²x²): one integral over a Gaussian.
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    for x, p in zip(X.double().numpy(), got, strict=True):
        mean, sd = x @ np.array(M), math.sqrt(temperature * ((x * SIGMA["w"].numpy()) ** 2).sum())
        sigmoid = 1 / (1 + np.exp(-(mean + sd * nodes)))
        want = weights @ sigmoid / weights.sum()
        error = math.sqrt(max(weights @ (sigmoid - want) ** 2 / weights.sum(), 0) / draws)
        assert p[1].item() == pytest.approx(want, abs=4.5 * error + 1e-7)
        assert p.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("draws", DRAWS)
def test_the_average_prediction_of_a_linear_regression_is_its_mean(draws: int):
    model, split = linear(classes=False)
    got = predict_from_draws(model, split, SIGMA, draws, 1.0, seed=0)
    sd = ((X * SIGMA["w"]) ** 2).sum(1).sqrt()
    assert ((got - X @ torch.tensor(M)).abs() <= 4.5 * sd / math.sqrt(draws) + 1e-6).all()


def test_probabilities_are_averaged_not_logits():
    model, split = linear(classes=True)
    both = predict_from_draws(model, split, SIGMA, 2, 1.0, seed=3)
    generator, single = torch.Generator().manual_seed(3), []
    for _ in range(2):
        w = torch.tensor(M) + SIGMA["w"] * torch.randn(2, generator=generator)
        single.append(torch.sigmoid((X @ w).double()))
    assert torch.allclose(both[:, 1], (single[0] + single[1]) / 2, atol=1e-7)
    logits = torch.sigmoid((torch.logit(single[0]) + torch.logit(single[1])) / 2)
    assert not torch.allclose(both[:, 1], logits, atol=1e-4)


@pytest.mark.parametrize("classes", [True, False])
def test_temperature_0_is_the_mean_exactly(classes: bool):
    model, split = linear(classes)
    assert torch.equal(predict_from_draws(model, split, SIGMA, 7, 0.0, seed=1), predict(model, split))


def test_n_draws_cost_n_evaluations():
    model, split = linear(classes=True)
    predict(model, split)
    assert model.calls == len(split.batches) == 2
    predict_from_draws(model, split, SIGMA, 10, 1.0, seed=1)
    assert model.calls == 2 + 10 * 2


def test_the_same_seed_draws_the_same_and_the_global_generator_is_left_alone():
    model, split = linear(classes=True)
    before = torch.get_rng_state()
    runs = [predict_from_draws(model, split, SIGMA, 3, 1.0, seed) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_draw_moves_what_has_a_sigma_and_is_taken_back_bit_for_bit():
    model = nn.Linear(50, 40)
    before = [p.detach().clone() for p in model.parameters()]
    sigma = {"weight": torch.full((40, 50), 1e-3)}
    generator = torch.Generator().manual_seed(0)
    moved = []

    def interrupted() -> None:
        with drawn(model, sigma, generator, 4.0):
            moved.append(model.weight - before[0])
            assert torch.equal(model.bias, before[1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (moved,) = moved
    assert moved.std().item() == pytest.approx(2e-3, rel=0.05)  # √τ·σ
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_numbers_are_judged_by_the_tasks_metric_and_classes_also_by_their_probabilities():
    model, split = linear(classes=True)
    p = predict(model, split)
    judged = judge(TASKS["cola"], p, split.labels, calibrated=True)
    matthews = stats.pearsonr(p.argmax(-1), split.labels).statistic
    assert judged == {"matthews_correlation": pytest.approx(matthews), **calibration(p, split.labels)}
    model, split = linear(classes=False)
    assert set(judge(TASKS["stsb"], predict(model, split), split.labels, calibrated=True)) == {
        "pearson_spearman", "pearson", "spearman"
    }  # fmt: skip


# --- runs ---------------------------------------------------------------------------------------------------


def train(model: Path, root: Path, *more: str, task: str = "cola", name: str = "run") -> Path:
    data = write_glue(root / "glue", task)
    argv = ["--task", task, "--model", str(model), "--data_dir", str(data), *SHORT, *more]
    run_glue.main([*argv, "--output_dir", str(root / name)])
    return root / name


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def evaluations(folder: Path) -> list[dict]:
    rows = json.loads((folder / "evaluation.json").read_text())["evaluations"]
    assert all(row.pop("seconds") > 0 for row in rows)
    assert all(row.pop(key) is not None for row in rows for key in ("model", "data_dir", "seed"))
    return rows


def write_tests(root: Path, task: str, n: int = 9) -> None:
    """GLUE's unlabelled test files."""
    columns = FILE_COLUMNS[task][:-1]
    for name in ("test_matched", "test_mismatched") if task == "mnli" else ("test",):
        lines = ["\t".join(["index", *columns])]
        lines += [
            "\t".join([str(i), *(f"the cat sees {'old ' * (i % 5)}{c}" for c in columns)]) for i in range(n)
        ]
        (root / TASKS[task].folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def trained(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of IVON, one of AdamW, one of another method, and their data."""
    root = tmp_path_factory.mktemp("trained")
    train(bert, root, name="ivon")
    train(bert, root, "--optimizer", "adamw", name="adamw")
    train(bert, root, "--method", "lora", name="lora")
    train(bert, root, task="stsb", name="stsb")
    for folder, width in (("wide", 24), ("other", 16)):
        BertModel(BertConfig.from_pretrained(bert, hidden_size=width)).save_pretrained(root / folder)
        for name in ("vocab.txt", "tokenizer_config.json"):
            shutil.copy(bert / name, root / folder)
    write_tests(root / "glue", "cola")
    return root


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "copied")
    return tmp_path / "copied"


@pytest.mark.parametrize("method", ["adalora", "lora", "full"])
def test_a_run_trains_the_same_with_and_without_samples(method: str, bert: Path, tmp_path: Path):
    plain = train(bert, tmp_path, "--method", method, name="plain")
    sampled = train(bert, tmp_path, "--method", method, "--eval_samples", "3", name="sampled")
    for file in ("adapter/adapter.safetensors", "adapter/posterior.safetensors"):
        assert (plain / file).read_bytes() == (sampled / file).read_bytes()
    for record in ("best", "last"):
        both = results(sampled)[record].pop("calibration")
        assert results(plain)[record] == {
            k: v for k, v in results(sampled)[record].items() if k != "calibration"
        }
        assert set(both) == {"mean", "samples"}
        assert both["mean"] != both["samples"]
    losses = [
        [json.loads(line).get("loss") for line in (run / "metrics.jsonl").open()] for run in (plain, sampled)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("method", "task", "more"),
    [
        ("adalora", "cola", []),
        ("adalora", "cola", ["--tinit", "1", "--tfinal", "12", "--target_rank", "0.5", "--init_rank", "3"]),
        ("adalora", "stsb", []),
        ("adalora", "mnli", []),
        ("adalora", "cola", ["--plain"]),
        ("lora", "cola", []),
        ("lora", "cola", ["--plain"]),
        ("full", "mrpc", []),
    ],
)
def test_a_run_evaluated_again_repeats_its_numbers_exactly(
    method: str, task: str, more: list[str], bert: Path, tmp_path: Path
):
    samples = ["--eval_samples", "4", "--temperature", "0.5"]
    run = train(bert, tmp_path, "--method", method, *more, *samples, task=task)
    evaluate.main([str(run), *samples])
    rows, best = evaluations(run), results(run)["best"]
    assert [(row["split"], row["samples"], row["temperature"]) for row in rows] == [
        (split, n, tau) for split in TASKS[task].validation for n, tau in ((0, 0.0), (4, 0.5))
    ]
    for row in rows:
        ending = "_mismatched" if row["split"].endswith("mismatched") else ""
        both = best["calibration" + ending]
        scores = {k: v for k, v in row.items() if k not in ("split", "how", "samples", "temperature")}
        assert scores == both["samples" if row["samples"] else "mean"]
        assert best[TASKS[task].metric + ending] == both["mean"][TASKS[task].metric]


def test_a_reloaded_model_is_judged_by_what_an_independent_loop_finds(copied: Path):
    run = copied / "ivon"
    evaluate.main([str(run), "--eval_samples", "2"])
    saved = load_file(run / "predictions.safetensors")
    labels = torch.tensor(load_task("cola", copied / "glue")["validation"]["label"])
    assert torch.equal(saved["validation.labels"], labels)
    for key, row in zip(("validation.mean", "validation.tau=1"), evaluations(run), strict=True):
        p = saved[key].double()
        assert row["nll"] == pytest.approx(-p[torch.arange(len(p)), labels].log().mean().item())
        assert row["accuracy"] == (p.argmax(1) == labels).double().mean().item()


def test_several_temperatures_are_rows_from_the_mean_on(copied: Path, capsys):
    run = copied / "ivon"
    capsys.readouterr()
    argv = [str(run), "--eval_samples", "3", "--temperature", "0", "0.5", "1", "4"]
    evaluate.main(argv)
    rows = evaluations(run)
    assert [row["temperature"] for row in rows] == [0, 0, 0.5, 1, 4]
    mean, zero = ({k: v for k, v in row.items() if k not in ("how", "samples")} for row in rows[:2])
    assert mean == zero
    assert len({row["nll"] for row in rows}) == 4
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
@pytest.mark.parametrize("method", ["adalora", "lora", "full"])
def test_a_run_without_samples_is_evaluated_at_its_mean_and_repeats_its_score_exactly(
    method: str, optimizer: str, bert: Path, tmp_path: Path
):
    run = train(bert, tmp_path, "--method", method, "--optimizer", optimizer)
    evaluate.main([str(run)])
    (row,) = evaluations(run)
    assert (row["samples"], row["temperature"]) == (0, 0)
    assert row["matthews_correlation"] == results(run)["best"]["matthews_correlation"]


@pytest.mark.parametrize("method", ["adalora", "lora"])
def test_a_plain_run_predicts_the_same_in_fused_form(method: str, bert: Path, tmp_path: Path):
    run = train(bert, tmp_path, "--method", method, "--plain")
    config, found = json.loads((run / "config.json").read_text()), []
    for plain in (True, False):
        (run / "config.json").write_text(json.dumps(config | {"plain": plain}))
        evaluate.main([str(run), "--eval_samples", "2"])
        found.append(load_file(run / "predictions.safetensors"))
    for name, predictions in found[0].items():
        assert torch.allclose(predictions, found[1][name], atol=1e-6, rtol=0)


def test_any_split_of_any_folder_with_labels_can_be_evaluated(copied: Path, tmp_path: Path):
    run = copied / "ivon"
    elsewhere = write_glue(tmp_path / "elsewhere", "cola", train=40)
    (elsewhere / "CoLA/dev.tsv").unlink()
    argv = [str(run), "--split", "train", "--data_dir", str(elsewhere)]
    evaluate.main([*argv, "--eval_batch_size", "7"])
    saved = load_file(run / "predictions.safetensors")
    assert saved["train.mean"].shape == (40, 2)


def test_another_split_is_added_to_the_evaluation_and_the_same_one_replaced(copied: Path):
    run = copied / "ivon"
    for split in (["validation"], ["train"], ["validation", "--eval_samples", "2"]):
        evaluate.main([str(run), "--split", *split])
    assert [(row["split"], row["samples"]) for row in evaluations(run)] == [
        ("train", 0),
        ("validation", 0),
        ("validation", 2),
    ]
    assert set(load_file(run / "predictions.safetensors")) == {
        "train.labels", "train.mean", "validation.labels", "validation.mean", "validation.tau=1"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["evaluation.json", "predictions.safetensors"])
def test_a_damaged_record_of_an_earlier_evaluation_is_replaced(name: str, copied: Path):
    run = copied / "ivon"
    for content in ("", "{", "[1]", '{"evaluations": [3]}'):
        evaluate.main([str(run)])
        (run / name).write_text(content)
        evaluate.main([str(run), "--split", "train"])
        assert [row["split"] for row in evaluations(run)] == ["train"]
        assert set(load_file(run / "predictions.safetensors")) == {"train.labels", "train.mean"}


def test_a_test_file_with_labels_can_be_evaluated(bert: Path, tmp_path: Path):
    run = train(bert, tmp_path, task="rte")
    dev = (tmp_path / "glue/RTE/dev.tsv").read_text()
    (tmp_path / "glue/RTE/test.tsv").write_text(dev)
    for split in ("validation", "test"):
        evaluate.main([str(run), "--split", split])
    validation, test = evaluations(run)
    assert {**test, "split": "validation"} == validation


def test_a_submission_has_the_files_own_numbers(bert: Path, tmp_path: Path):
    run = train(bert, tmp_path)
    (tmp_path / "glue/CoLA/test.tsv").write_text("index\tsentence\n7\tthe cat sees\n9\tthe old man\n")
    evaluate.main([str(run), "--predict", str(tmp_path / "x.tsv")])
    assert [line.split("\t")[0] for line in (tmp_path / "x.tsv").read_text().splitlines()] == [
        "index",
        "7",
        "9",
    ]


def test_numbers_are_cut_to_the_scale_of_stsb(tmp_path: Path):
    evaluate.write_submission(tmp_path / "x.tsv", [0, 1, 2], torch.tensor([-0.5, 2.25, 5.5]), TASKS["stsb"])
    assert (tmp_path / "x.tsv").read_text() == "index\tprediction\n0\t0.0\n1\t2.25\n2\t5.0\n"


def test_a_run_with_a_held_out_share_is_judged_on_it_and_later_on_validation_beside_fitted_rivals(
    bert: Path, tmp_path: Path
):
    run = train(bert, tmp_path, "--holdout", "0.25")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {record["split"] for record in records if "split" in record} == {"holdout"}
    assert json.loads((run / "config.json").read_text())["train_size"] == 18
    evaluate.main([str(run)])
    assert [row["split"] for row in evaluations(run)] == ["holdout"]
    evaluate.main([str(run), "--split", "validation", "--eval_samples", "2", "--fit", "holdout"])
    rows = [row for row in evaluations(run) if row["split"] == "validation"]
    ways = ["mean", "tau=1", "temperature scaling", "MC dropout", "draws at the fitted τ", "pruned", "TFB"]
    assert [row["how"] for row in rows] == ways
    saved = load_file(run / "predictions.safetensors")
    assert all(saved[f"validation.{way}"].shape == (12, 2) for way in ways)


def test_rivals_are_fitted_on_evenly_spread_examples_whatever_the_batches(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, seen = train(bert, tmp_path, "--holdout", "0.5"), []

    def look(model, layers, sigma, split, *how):
        tokens = torch.cat([batch["attention_mask"].sum(1) for batch in split.batches])
        seen.append((tokens[split.position].tolist(), split.labels.tolist()))
        return iter(())

    monkeypatch.setattr(evaluate, "fitted", look)
    for n, size in ((99, "128"), (4, "128"), (4, "2")):
        monkeypatch.setattr(evaluate, "FIT_ON", n)
        evaluate.main([str(run), "--split", "validation", "--fit", "holdout", "--eval_batch_size", size])
    lengths, labels = seen[0]
    assert len(labels) == 12
    assert seen[1:] == [(lengths[::3], labels[::3])] * 2


def test_a_seed_of_its_own_draws_otherwise(copied: Path):
    run, found = copied / "ivon", []
    for seed in ("2021", "2021", "5"):
        evaluate.main([str(run), "--eval_samples", "2", "--seed", seed])
        found.append(evaluations(run))
    assert found[0] == found[1] != found[2]
    assert found[0][0] == found[2][0]  # the mean


# --- submissions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task",
    [task if task in ("stsb", "mnli") else pytest.param(task, marks=pytest.mark.slow) for task in TASKS],
)
def test_predictions_of_the_test_file_are_glues_submission(task: str, bert: Path, tmp_path: Path):
    run = train(bert, tmp_path, task=task)
    write_tests(tmp_path / "glue", task)
    file = tmp_path / "submission.tsv"
    evaluate.main([str(run), "--predict", str(file)])
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t"))
    assert [list(row) for row in rows] == [["index", "prediction", *TASKS[task].labels]] * 9
    assert [row["index"] for row in rows] == [str(i) for i in range(9)]
    predictions = {row["prediction"] for row in rows}
    if task == "stsb":
        assert all(math.isfinite(float(p)) for p in predictions)
    else:
        assert predictions <= set(LABELS[task])  # as the task's own training file writes them
    if task == "mnli":
        evaluate.main([str(run), "--predict", str(file), "--split", "test_mismatched"])


@pytest.mark.parametrize("samples", [[], ["--eval_samples", "3", "--temperature", "2"]])
def test_predictions_are_those_of_the_evaluation_with_probabilities_beside_them(
    samples: list[str], copied: Path, tmp_path: Path
):
    run, file = copied / "ivon", tmp_path / "p.tsv"
    evaluate.main([str(run), *samples])
    want = load_file(run / "predictions.safetensors")["validation.tau=2" if samples else "validation.mean"]
    argv = [str(run), "--predict", str(file), "--split", "validation"]
    evaluate.main([*argv, *samples])
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t"))
    assert list(rows[0]) == ["index", "prediction", "unacceptable", "acceptable"]
    got = torch.tensor(
        [[float(row[name]) for name in TASKS["cola"].labels] for row in rows], dtype=torch.float64
    )
    assert torch.equal(got, want)
    assert [int(row["prediction"]) for row in rows] == want.argmax(1).tolist()


# --- what is refused ----------------------------------------------------------------------------------------


def refused(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    assert exit_status(lambda: evaluate.main(argv), "tools.evaluate") == 2
    err = capsys.readouterr().err
    assert err.startswith("tools.evaluate: error: ")
    assert err.count("\n") == 1
    return err


REFUSED = {
    "a fit on a split that is not there": (["{ivon}", "--fit", "holdout"], "--fit holdout"),
    "a fit on what is judged": (["{ivon}", "--fit", "validation"], "is the split to evaluate"),
    "no run": ([], "run"),
    "a negative temperature": (["{ivon}", "--eval_samples", "3", "--temperature", "-1"], "--temperature"),
    "no temperature": (["{ivon}", "--eval_samples", "3", "--temperature"], "--temperature"),
    "a temperature without samples": (["{ivon}", "--temperature", "0.5"], "--eval_samples"),
    "minus one sample": (["{ivon}", "--eval_samples", "-1"], "--eval_samples"),
    "no such run": (["nowhere"], "nowhere"),
    "samples of adamw's run": (["{adamw}", "--eval_samples", "2"], "posterior"),
    "a training flag": (["{ivon}", "--lr", "0.1"], "--lr"),
    "the task again": (["{ivon}", "--task=cola"], "--task"),
    "unknown split": (["{ivon}", "--split", "dev"], "validation"),
    "unlabelled split": (["{ivon}", "--split", "test"], "--predict"),
    "no such file": (["{stsb}", "--split", "test"], "test.tsv"),
    "several temperatures": (
        ["{ivon}", "--predict", "x", "--eval_samples", "2", "--temperature", "0", "1"],
        "--temperature",
    ),
    "a folder for predictions": (["{ivon}", "--predict", "{ivon}"], "ivon"),
    "no folder for predictions": (["{ivon}", "--predict", "{ivon}/no/x"], "no/x"),
    "another model": (["{ivon}", "--model", "{deberta}"], "no linear map"),
    "a model of another size": (["{ivon}", "--model", "{wide}"], "other weights"),
    "a model of other weights": (["{ivon}", "--model", "{other}"], "other weights"),
    "a device for predictions": (["{ivon}", "--predict", "/dev/null"], "/dev/null"),
    "no name of a split": (["{ivon}", "--split", ""], "--split"),
    "a temperature beyond numbers": (
        ["{ivon}", "--eval_samples", "2", "--temperature", "1e300"],
        "--temperature",
    ),
    "a model that is gone": (["{ivon}", "--model", "./gone"], "./gone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_with_status_2_and_nothing_written(
    case: str, trained: Path, deberta: Path, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names = {name: str(trained / name) for name in ("ivon", "adamw", "stsb", "wide", "other")} | {
        "deberta": str(deberta)
    }
    argv, named = REFUSED[case]
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert named in refused([word.format(**names) for word in argv], capsys)
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_is_not_evaluated(copied: Path, capsys):
    (copied / "ivon/results.json").unlink()
    assert "not finished" in refused([str(copied / "ivon")], capsys)


def test_a_new_run_leaves_nothing_of_the_evaluation_of_the_old_one(copied: Path, bert: Path):
    run = copied / "ivon"
    evaluate.main([str(run)])
    assert (run / "evaluation.json").exists()
    train(bert, copied, "--overwrite", name="ivon")
    assert not (run / "evaluation.json").exists()
    assert not (run / "predictions.safetensors").exists()


@pytest.mark.parametrize("file", ["adapter.safetensors", "posterior.safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused_by_name(file: str, keep: float, copied: Path, capsys):
    path = copied / "ivon/adapter" / file
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else keep])
    assert file in refused([str(copied / "ivon"), "--eval_samples", "2"], capsys)


def edited(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


LAYER = "bert.encoder.layer.0.attention.self.query"
EDITS = {
    "a tensor less": lambda t: t.pop("classifier.bias"),
    "a tensor more": lambda t: t.update(extra=torch.zeros(1)),
    "another width": lambda t: t.update({f"{LAYER}.P": torch.zeros(5, t[f"{LAYER}.lam"].numel())}),
    "ranks that differ": lambda t: t.update({f"{LAYER}.lam": torch.zeros(7)}),
    "half precision": lambda t: t.update({"classifier.bias": t["classifier.bias"].half()}),
    "no λ": lambda t: t.pop(f"{LAYER}.lam"),
}


@pytest.mark.parametrize("file", ["adapter", "posterior"])
@pytest.mark.parametrize("edit", EDITS)
def test_a_file_that_does_not_fit_is_refused(file: str, edit: str, copied: Path, capsys):
    edited(copied / f"ivon/adapter/{file}.safetensors", EDITS[edit])
    assert "does not fit" in refused([str(copied / "ivon"), "--eval_samples", "2"], capsys)


def test_the_files_of_another_run_are_refused(copied: Path, capsys):
    for other in ("lora", "stsb"):
        shutil.copy(copied / other / "adapter/adapter.safetensors", copied / "ivon/adapter")
        assert "does not fit" in refused([str(copied / "ivon")], capsys)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"task": "cola"}', "\x00"])
def test_a_damaged_config_is_refused(content: str, copied: Path, capsys):
    (copied / "ivon/config.json").write_text(content)
    assert "config.json" in refused([str(copied / "ivon")], capsys)


@pytest.mark.parametrize(
    "change",
    [
        {"task": "wnli"},
        {"task": "stsb"},
        {"method": "dora"},
        {"method": "lora", "score": None},
        {"method": ["adalora"]},
        {"alpha": 16},
        {"alpha": "x"},
        {"alpha": True},
        {"eval_batch_size": [128]},
        {"init_rank": -1},
        {"targets": ["query"]},
        {"model": None},
    ],
)
def test_a_config_that_is_not_the_runs_is_refused(change: dict, copied: Path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    path = copied / "ivon/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused([str(copied / "ivon")], capsys)

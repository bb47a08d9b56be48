"""tools.export: PEFT and transformers load what it writes, and say what our model says."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import sentences, write_glue
from safetensors.torch import load_file
from torch import Tensor, nn

import run_glue
from adalora import SVDLinear
from harness.glue import TASKS
from harness.settings import exit_status
from tools import export
from tools.finished import evaluation_settings, load_model, read_run

HERE = Path(run_glue.__file__).parent

SHORT = ["--max_steps", "16", "--eval_every", "16", "--batch_size", "8", "--max_length", "16", "--lr", "0.05"]


def train(model: Path, root: Path, *more: str, task: str = "cola") -> Path:
    data = write_glue(root / "glue", task)
    argv = ["--task", task, "--model", str(model), "--data_dir", str(data), *SHORT, "--optimizer", "adamw"]
    run_glue.main([*argv, *more, "--output_dir", str(root / "run")])
    return root / "run"


def status(argv: list[str]) -> int:
    return exit_status(lambda: export.main(argv), "tools.export")


@torch.inference_mode()
def logits(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase) -> Tensor:
    model.eval()
    return model(**tokenizer(sentences(20, seed=9), padding=True, return_tensors="pt")).logits


def ours(run: Path) -> tuple[Tensor, nn.Module, transformers.PreTrainedTokenizerBase]:
    found = read_run(run)
    tokenizer, model, _, _ = load_model(found, evaluation_settings(found, device="cpu"))
    return logits(model, tokenizer), model, tokenizer


def base(folder: Path, labels: int = 2) -> nn.Module:
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=labels, dtype=torch.float32
    )


RANKS_0_TO_3 = [
    "--score",
    "sensitivity",
    "--tinit",
    "1",
    "--tfinal",
    "10",
    "--target_rank",
    "1.5",
    "--init_rank",
    "3",
]


@pytest.mark.parametrize("architecture", ["bert", "deberta"])
@pytest.mark.parametrize("method", ["adalora", "lora"])
def test_peft_loads_the_adapter_and_says_what_our_model_says(
    method: str, architecture: str, request: pytest.FixtureRequest, tmp_path: Path
):
    checkpoint = request.getfixturevalue(architecture)
    run = train(checkpoint, tmp_path, "--method", method, *(RANKS_0_TO_3 if method == "adalora" else []))
    export.main(["peft", str(run), str(tmp_path / "adapter")])
    want, model, tokenizer = ours(run)
    if method == "adalora":
        ranks = {layer.lam.numel() for layer in model.modules() if isinstance(layer, SVDLinear)}
        assert {0, 3} <= ranks
    plain = base(checkpoint)
    assert not torch.allclose(logits(plain, tokenizer), want, atol=1e-3)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.allclose(logits(loaded, tokenizer), want, atol=1e-5, rtol=0)
    assert isinstance(
        loaded.peft_config["default"], peft.AdaLoraConfig if method == "adalora" else peft.LoraConfig
    )


@pytest.mark.parametrize("architecture", ["bert", "deberta"])
@pytest.mark.parametrize("method", ["adalora", "lora", "full"])
def test_a_merged_checkpoint_is_loaded_without_code_of_ours(
    method: str, architecture: str, request: pytest.FixtureRequest, tmp_path: Path
):
    more = RANKS_0_TO_3 if method == "adalora" else []
    run = train(request.getfixturevalue(architecture), tmp_path, "--method", method, *more)
    export.main(["merged", str(run), str(tmp_path / "merged")])
    want, _, _ = ours(run)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(loaded, tokenizer), want, atol=1e-5, rtol=0)
    names = load_file(tmp_path / "merged/model.safetensors")
    assert not any(part in name for name in names for part in ("lam", ".P", ".Q", ".A", ".B", "base"))
    assert loaded.config.id2label == dict(enumerate(TASKS["cola"].labels))


@pytest.mark.parametrize("method", ["adalora", "lora"])
def test_a_merged_weight_is_the_base_weight_plus_the_scaled_product(method: str, bert: Path, tmp_path: Path):
    run = train(bert, tmp_path, "--method", method, *(RANKS_0_TO_3 if method == "adalora" else []))
    export.main(["merged", str(run), str(tmp_path / "merged")])
    before, merged = load_file(bert / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    adapter = {name: t.double() for name, t in load_file(run / "adapter/adapter.safetensors").items()}
    config, results = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "results"))
    s = config["alpha"] / config["init_rank"]
    for name in results["ranks"]:
        if method == "adalora":
            product = adapter[f"{name}.P"] @ torch.diag(adapter[f"{name}.lam"]) @ adapter[f"{name}.Q"]
        else:
            product = adapter[f"{name}.B"] @ adapter[f"{name}.A"]
        want = before[f"{name.removeprefix('bert.')}.weight"].double() + s * product
        assert torch.allclose(merged[f"{name}.weight"].double(), want, atol=1e-6, rtol=0)


def test_regression_is_exported_as_regression(bert: Path, tmp_path: Path):
    run = train(bert, tmp_path, "--score", "mu", task="stsb")
    for form in ("peft", "merged"):
        export.main([form, str(run), str(tmp_path / form)])
    want, _, tokenizer = ours(run)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.problem_type == "regression"
    loaded = peft.PeftModel.from_pretrained(base(bert, labels=1), tmp_path / "peft")
    for model in (merged, loaded):
        assert torch.allclose(logits(model, tokenizer), want, atol=1e-5, rtol=0)


def test_the_base_model_may_have_moved(bert: Path, tmp_path: Path, capsys):
    shutil.copytree(bert, tmp_path / "before")
    run = train(tmp_path / "before", tmp_path)
    (tmp_path / "before").rename(tmp_path / "after")
    assert status(["merged", str(run), str(tmp_path / "x")]) == 2
    assert "before" in capsys.readouterr().err
    export.main(["merged", str(run), str(tmp_path / "x"), "--model", str(tmp_path / "after")])


@pytest.fixture(scope="module")
def finished(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    return train(bert, root)


REFUSED = {
    "no form": (["{run}", "{new}"], "form"),
    "no folder": (["peft", "{run}"], "folder"),
    "no run": (["peft", "{new}", "{new}2"], "config.json"),
    "a folder with something in it": (["merged", "{run}", "{run}"], "is not an empty folder"),
    "a file": (["merged", "{run}", "{run}/config.json"], "is not an empty folder"),
    "a place inside a file": (["merged", "{run}", "{run}/config.json/x"], "cannot be written"),
    "another model": (["merged", "{run}", "{new}", "--model", "./nowhere"], "./nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_with_status_2_and_nothing_written(
    case: str, finished: Path, tmp_path: Path, capsys
):
    argv, named = REFUSED[case]
    argv = [word.format(run=finished, new=tmp_path / "new") for word in argv]
    before = sorted(finished.rglob("*"))
    assert status(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("tools.export: error: ")
    assert err.count("\n") == 1
    assert named in err
    assert sorted(finished.rglob("*")) == before
    assert not list(tmp_path.iterdir())


def test_full_fine_tuning_has_no_adapter_to_export(bert: Path, tmp_path: Path, capsys):
    run = train(bert, tmp_path, "--method", "full")
    assert status(["peft", str(run), str(tmp_path / "x")]) == 2
    assert "tools.export merged" in capsys.readouterr().err


def test_a_damaged_run_is_refused(finished: Path, tmp_path: Path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    for name, content in (
        ("adapter/adapter.safetensors", b"\x00" * 9),
        ("config.json", b"{"),
        ("config.json", json.dumps({"task": "cola"}).encode()),
    ):
        (run / name).write_bytes(content)
        assert status(["merged", str(run), str(tmp_path / "x")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "peft"])
def test_a_full_disk_is_one_line_and_leaves_nothing(form: str, finished: Path, tmp_path: Path):
    """The kernel's own refusal: no file may be larger than 1 kB."""
    argv = [sys.executable, "-m", "tools.export", form, str(finished), str(tmp_path / "new")]
    done = subprocess.run(
        argv, cwd=HERE, capture_output=True, text=True, check=False, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("tools.export: error: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())

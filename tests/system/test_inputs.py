"""What a user can get wrong: exit status 2, one line that names the thing and the mend, nothing written."""

import contextlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import Field, fields
from pathlib import Path

import pytest
import torch
from conftest import FOLDERS, SIZES, electra_checkpoint, write_glue
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import RobertaConfig, RobertaModel

import run_glue
from harness.glue import load_task
from harness.settings import Number, Settings, exit_status, learning_rate
from harness.task import UsageError

HERE = Path(run_glue.__file__).parent


def run(argv: list[str]) -> int:
    return exit_status(lambda: run_glue.main(argv), "run_glue.py")


@pytest.fixture
def glue_folder(tmp_path: Path) -> Path:
    return write_glue(tmp_path / "glue", "cola")


def command(model: Path, data: Path, output: Path, *more: str, task: str = "cola") -> list[str]:
    where = ["--model", str(model), "--data_dir", str(data), "--output_dir", str(output)]
    return ["--task", task, *where, "--max_steps", "4", "--max_length", "16", *more]


REFUSED = {
    "no task": ([], "--task"),
    "unknown task": (["--task", "wnli"], "wnli"),
    "unknown score": (["--task", "cola", "--score", "magnitude"], "magnitude"),
    "unknown optimizer": (["--task", "cola", "--optimizer", "sgd"], "sgd"),
    "unknown method": (["--task", "cola", "--method", "dora"], "dora"),
    "unknown flag": (["--task", "cola", "--learning_rate", "1"], "--learning_rate"),
    "an abbreviated flag": (["--task", "cola", "--max_step", "1"], "--max_step"),
    **{
        f"{score} with adamw": (
            ["--task", "cola", "--optimizer", "adamw", "--score", score],
            "--optimizer ivon",
        )
        for score in ("snr_abs", "snr", "inv_sigma")
    },
    **{
        f"{flag} with adamw": (["--task", "cola", "--optimizer", "adamw", flag, "1"], flag)
        for flag in ("--mc_samples", "--ess", "--hess_init", "--beta2", "--clip_radius")
    },
    "a score with lora": (["--demo", "--method", "lora", "--score", "mu"], "--score"),
    "γ = 0 with lora": (["--demo", "--method", "lora", "--orth", "0"], "--orth"),
    "half a rank with lora": (["--demo", "--method", "lora", "--target_rank", "0.5"], "--target_rank 0.5"),
    "lora at rank 0": (["--demo", "--method", "lora", "--target_rank", "0"], "--target_rank 0"),
    "followed scores with lora": (["--demo", "--method", "lora", "--track_scores"], "--track_scores"),
    "a rank with full": (["--demo", "--method", "full", "--target_rank", "2"], "--target_rank"),
    "adapters' maps with full": (["--demo", "--method", "full", "--targets", "query_proj"], "--targets"),
    "more tokens than the model takes": (["--demo", "--max_length", "1000"], "--max_length 1000"),
    "a seed beyond 64 bits": (["--demo", "--seed", str(2**70)], "--seed"),
    "a device without data": (["--demo", "--device", "meta"], "--device meta"),
    "a device that torch knows of": (["--demo", "--device", "hpu"], "--device hpu"),
    "another task's demo": (["--demo", "--task", "rte"], "cola"),
    "a demo with another model": (["--demo", "--model", "x"], "--model"),
    "target above start": (["--demo", "--target_rank", "4", "--init_rank", "3"], "--init_rank 3"),
    "negative rank": (["--demo", "--target_rank", "-1"], "--target_rank"),
    "no pruning steps": (["--demo", "--max_steps", "100", "--tinit", "60", "--tfinal", "40"], "--tinit"),
    "no pruning steps in the Hub's data": (
        ["--task", "rte", "--tinit", "2000", "--tfinal", "1900"],
        "--tfinal",
    ),
    "t_i beyond the end": (["--demo", "--max_steps", "10", "--tinit", "60"], "--tinit"),
    "no interval": (["--demo", "--delta_t", "0"], "--delta_t"),
    "no steps": (["--demo", "--max_steps", "0"], "--max_steps"),
    "half a step": (["--demo", "--max_steps", "1.5"], "--max_steps"),
    "no epochs": (["--demo", "--epochs", "0"], "--epochs"),
    "epochs without end": (["--demo", "--epochs", "1e15"], "--epochs"),
    "an ess beyond float32": (["--demo", "--ess", "1e300"], "--ess"),
    "a clip below float32": (["--demo", "--clip_radius", "1e-320"], "--clip_radius"),
    "micro-batches without end": (["--demo", "--grad_accum", "4611686018427387904"], "--grad_accum"),
    "a batch without end": (["--demo", "--batch_size", "4611686018427387904"], "--batch_size"),
    "steps without end": (["--demo", "--max_steps", "4611686018427387904"], "--max_steps"),
    "a rank beyond the maps": (["--demo", "--init_rank", "100000000"], "--init_rank"),
    "a learning rate that is none": (["--demo", "--lr", "fast"], "--lr"),
    "an infinite learning rate": (["--demo", "--lr", "inf"], "--lr"),
    "beta2 above 1": (["--demo", "--beta2", "1.1"], "--beta2"),
    "no ess": (["--demo", "--ess", "0"], "--ess"),
    "no batch": (["--demo", "--batch_size", "0"], "--batch_size"),
    "unknown device": (["--demo", "--device", "abacus"], "--device abacus"),
    "a target that is not there": (
        ["--demo", "--targets", "q_proj"],
        "--targets: no linear map is called q_proj",
    ),
    "no such data folder": (["--task", "rte", "--data_dir", "nowhere"], "nowhere/RTE/train.tsv"),
    "no such model folder": (
        ["--task", "cola", "--data_dir", str(HERE / "demo"), "--model", "./nowhere"],
        "./nowhere",
    ),
    "a word too many": (["--demo", "now"], "now"),
    "no value": (["--demo", "--seed"], "--seed"),
    "an empty model": (["--task", "cola", "--data_dir", str(HERE / "demo"), "--model", ""], "--model"),
    "a file for a model": (
        ["--task", "cola", "--data_dir", str(HERE / "demo"), "--model", __file__],
        "--model",
    ),
    "a file for data": (
        ["--task", "cola", "--model", str(HERE / "demo/model"), "--data_dir", __file__],
        "CoLA",
    ),
    "no maps": (["--demo", "--targets"], "--targets"),
    "half a map's name": (["--demo", "--targets", "roj"], "--targets: no linear map is called roj"),
    "a block for a map": (["--demo", "--targets", "attention"], "--targets: "),
    "a rank that is none": (["--demo", "--target_rank", "nan"], "--target_rank"),
    "an infinite rank": (["--demo", "--target_rank", "inf"], "--target_rank"),
    "a rank in words": (["--demo", "--target_rank", "two"], "--target_rank"),
    "a start of half a rank": (["--demo", "--init_rank", "2.5"], "--init_rank"),
    "a start below the target": (["--demo", "--init_rank", "1"], "--init_rank 1"),
    "a rank beyond the maps'": (["--demo", "--target_rank", "1e9"], "--init_rank 1500000000"),
    "lora beyond the maps": (["--demo", "--method", "lora", "--target_rank", "1000"], "1000"),
    "a negative seed": (["--demo", "--seed", "-1"], "--seed"),
    "a learning rate of 0": (["--demo", "--lr", "0"], "--lr"),
    "a negative learning rate": (["--demo", "--lr", "-1e-3"], "--lr"),
    "a negative beta2": (["--demo", "--beta2", "-0.1"], "--beta2"),
    "no clipping": (["--demo", "--clip_radius", "0"], "--clip_radius"),
    "h0 of 0": (["--demo", "--hess_init", "0"], "--hess_init"),
    "no draws": (["--demo", "--mc_samples", "0"], "--mc_samples"),
    "a negative γ": (["--demo", "--orth", "-0.1"], "--orth"),
    "alpha of 0": (["--demo", "--alpha", "0"], "--alpha"),
    "no accumulation": (["--demo", "--grad_accum", "0"], "--grad_accum"),
    "no evaluation": (["--demo", "--eval_every", "0"], "--eval_every"),
    "batches of nothing": (["--demo", "--eval_batch_size", "0"], "--eval_batch_size"),
    "a batch in scientific notation": (["--demo", "--batch_size", "1e2"], "--batch_size"),
    "no checkpoints": (["--demo", "--checkpoint_every", "0"], "--checkpoint_every"),
    "no tokens": (["--demo", "--max_length", "2"], "--max_length"),
    "going on and beginning": (["--demo", "--resume", "--overwrite"], "--overwrite"),
    "an output folder below a file": (["--demo", "--output_dir", "/dev/null/x"], "--output_dir /dev/null/x"),
    "negative t_i": (["--demo", "--tinit", "-1"], "--tinit"),
    "a ΔT with a fraction": (["--demo", "--delta_t", "0.5"], "--delta_t"),
    "no epochs in words": (["--demo", "--epochs", "none"], "--epochs"),
    "γ in full fine-tuning": (["--demo", "--method", "full", "--orth", "0.1"], "--orth"),
    "alpha in full fine-tuning": (["--demo", "--method", "full", "--alpha", "8"], "--alpha"),
    **{
        f"{flag} 0 with {method}": (["--demo", "--method", method, flag, "0"], flag)
        for method, flags in (
            ("lora", ("--init_rank", "--orth", "--tinit", "--tfinal")),
            ("full", ("--target_rank", "--dropout", "--init_rank", "--orth", "--tinit", "--tfinal")),
        )
        for flag in flags
    },
    "beta2 0 with adamw": (
        ["--demo", "--optimizer", "adamw", "--score", "lambda", "--beta2", "0"],
        "--beta2",
    ),
    "draws with adamw": (
        ["--demo", "--optimizer", "adamw", "--score", "sensitivity", "--eval_samples", "2"],
        "--eval_samples",
    ),
    "a temperature without draws": (["--demo", "--temperature", "0.5"], "--eval_samples"),
    "two temperatures": (["--demo", "--eval_samples", "2", "--temperature", "0.5", "1"], "1"),
    "a negative temperature": (["--demo", "--eval_samples", "2", "--temperature", "-1"], "--temperature"),
    "negative weight decay": (["--demo", "--weight_decay", "-1e-8"], "--weight_decay"),
    "a dropout of everything": (["--demo", "--dropout", "1"], "--dropout"),
    "a target in the head": (["--demo", "--targets", "pooler.dense"], "--targets: "),
}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that should have been refused is not trained to its end."""

    def refuse(*_: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(run_glue, "learning_rate", refuse)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_with_status_2_and_nothing_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    argv, named = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    assert run(argv) == 2
    check_refusal(capsys.readouterr().err, named, tmp_path)


def check_refusal(stderr: str, named: str, folder: Path) -> None:
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("run_glue.py: error: ")
    assert named in stderr
    for left in ("runs", "metrics.jsonl", "results.json", "checkpoint", "adapter", "*.new"):
        assert not list(folder.rglob(left))


@pytest.mark.parametrize(
    ("removed", "named"),
    [("pytorch_model.bin", "pytorch_model.bin"), ("spm.model", "tokenizer"), ("config.json", "config.json")],
)
def test_a_model_folder_without_a_part_is_refused_by_that_part(
    removed: str, named: str, deberta: Path, glue_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "model").mkdir()
    for file in deberta.iterdir():
        if file.name != removed:
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    assert run(command(tmp_path / "model", glue_folder, tmp_path / "runs")) == 2
    check_refusal(capsys.readouterr().err, named, tmp_path)


@pytest.mark.parametrize(
    "damage", ["half the weights", "another model's weights", "half a config", "another tokenizer"]
)
def test_a_damaged_model_folder_is_refused(
    damage: str, deberta: Path, bert: Path, glue_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    model = tmp_path / "model"
    model.mkdir()
    for file in deberta.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights, config = model / "pytorch_model.bin", model / "config.json"
    if damage == "half the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "another model's weights":
        torch.save({"bert.pooler.dense.bias": torch.zeros(16)}, weights)
    elif damage == "half a config":
        config.write_text(config.read_text()[:100])
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 40}))
    assert run(command(model, glue_folder, tmp_path / "runs")) == 2
    check_refusal(capsys.readouterr().err, str(model), tmp_path)


WORDS_OF, TYPES = "embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"
# What is changed in config.json, tokenizer_config.json and the weights (their shape, None: NaN), and what is
# said (None: it works).
UNFIT = {
    "tuples for outputs": ({"return_dict": False}, {}, {}, "'tuple' object has no attribute 'logits'"),
    "words for a number": ({"max_position_embeddings": "x"}, {}, {}, "max_position_embeddings"),
    "one type of token for pairs": ({}, {}, {TYPES: (1, 16)}, "does not work on texts of at most"),
    "a small vocabulary": ({}, {}, {WORDS_OF: (9, 16)}, "token 24, the model embeds 9"),
    "a pooler of another width": ({}, {}, {"pooler.dense.weight": (8, 16)}, None),
    "another number of heads": ({"num_attention_heads": 3}, {}, {}, "attention heads"),
    "no activation": ({"hidden_act": "nope"}, {}, {}, "nope"),
    "weights that are not finite": ({}, {}, {"encoder.layer.0.output.dense.weight": None}, "are not finite"),
    "more layers than weights": ({"num_hidden_layers": 4}, {}, {}, "bert.encoder.layer.2"),
    "a length in words": ({}, {"model_max_length": "x"}, {}, None),
    "no length": ({}, {"model_max_length": 0}, {}, "the model's 0 tokens"),
    "weights cut short": ({}, {}, "cut", "cannot be loaded"),
    "padding upwards": ({}, {"padding_side": "up"}, {}, "up"),
    "a problem of its own": ({"problem_type": "multi_label_classification"}, {}, {}, None),
}
SIZE_OF = {TYPES: "type_vocab_size", WORDS_OF: "vocab_size"}


@pytest.mark.parametrize("case", UNFIT)
def test_a_model_whose_parts_do_not_fit_is_refused_before_anything_is_written(
    case: str, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    changes, tokenizer, shapes, said = UNFIT[case]
    model = tmp_path / "model"
    shutil.copytree(bert, model)
    weights = load_file(model / "model.safetensors")
    for name, shape in () if shapes == "cut" else shapes.items():
        weights[name] = torch.full((1,), torch.nan).expand(weights[name].shape).contiguous()
        if shape:
            weights[name] = torch.zeros(shape)
            changes = changes | ({SIZE_OF[name]: shape[0]} if name in SIZE_OF else {})
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    if shapes == "cut":
        os.truncate(model / "model.safetensors", 10_000)
    for file, of in (("config.json", changes), ("tokenizer_config.json", tokenizer)):
        (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | of))
    data = write_glue(tmp_path / "glue", "rte")
    argv = command(model, data, tmp_path / "run", task="rte")
    if said is None:
        assert run(argv) == 0
    else:
        assert run(argv) == 2
        check_refusal(capsys.readouterr().err, said, tmp_path)


def test_a_length_at_which_roberta_has_no_position_is_refused(bert: Path, tmp_path: Path, capsys):
    """Its positions begin after that of padding: two fewer than its configuration says."""
    shutil.copytree(bert, model := tmp_path / "model")
    config = RobertaConfig(vocab_size=30, pad_token_id=1, max_position_embeddings=10, **SIZES)
    RobertaModel(config).save_pretrained(model)
    data = write_glue(tmp_path / "glue", "rte")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    argv = command(model, data, tmp_path / "run", task="rte")
    assert run([*argv, "--max_length", "10"]) == 2
    check_refusal(capsys.readouterr().err, "does not work on texts of at most 10 tokens", tmp_path)
    assert run([*argv, "--max_length", "8"]) == 0


def test_an_architecture_without_defaults_is_refused_with_the_maps_it_has(
    bert: Path, glue_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert run(command(electra_checkpoint(bert, tmp_path), glue_folder, tmp_path / "runs")) == 2
    check_refusal(capsys.readouterr().err, "self.query", tmp_path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("gj04\t1\tThe cat.\n", "dev.tsv:1: 3 columns"),
        ("gj04\t2\t\tThe cat.\n", "dev.tsv:1: '2'"),
        ("", "dev.tsv has no"),
    ],
)
def test_bad_data_is_refused_by_file_and_line(
    content: str, named: str, bert: Path, glue_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (glue_folder / "CoLA/dev.tsv").write_text(content)
    assert run(command(bert, glue_folder, tmp_path / "runs")) == 2
    check_refusal(capsys.readouterr().err, named, tmp_path)


def test_an_output_folder_that_is_a_file_is_refused(bert: Path, glue_folder: Path, tmp_path: Path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert run(command(bert, glue_folder, tmp_path / "taken")) == 2
    check_refusal(capsys.readouterr().err, "--output_dir", tmp_path)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize(
    "known", [[], ["--data_dir", str(HERE / "demo")]], ids=["data and model", "model alone"]
)
def test_a_hub_that_does_not_answer_is_said_within_seconds(known: list[str], tmp_path: Path):
    with socket.socket() as listener:  # accepts, and never answers
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{listener.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(HERE / "run_glue.py"), "--task", "cola", *known],
            cwd=tmp_path, env=os.environ | hub, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        seconds = time.monotonic() - start
    assert done.returncode == 2
    check_refusal(done.stderr, "--demo", tmp_path)
    assert "--model" in done.stderr
    assert "--data_dir" in done.stderr
    assert seconds < 30  # 3 of them waiting, the rest importing on a machine that may be busy


# --- data files ---------------------------------------------------------------------------------------------

DAMAGE = {
    "empty": lambda text: b"",
    "a header alone": lambda text: text.split(b"\n")[0] + b"\n",
    "another encoding": lambda text: text.decode().replace("the", "thé").encode("utf-16"),
    "a compressed file": lambda text: b"\x1f\x8b\x08\x00" + text[:40],
    "not UTF-8": lambda text: text.replace(b"the", b"th\xe9"),
    "cut in a row": lambda text: text[: text.rindex(b"\t")],
    "a column too many": lambda text: text.replace(b"\n", b"\tmore\n", 4),
    "a column too few": lambda text: b"\n".join(row.rpartition(b"\t")[0] for row in text.split(b"\n")),
    "commas for tabs": lambda text: text.replace(b"\t", b","),
    "a line with nothing": lambda text: text.replace(b"\n", b"\n\n", 2),
}


@pytest.mark.parametrize("name", ["train.tsv", "dev.tsv"])
@pytest.mark.parametrize("task", ["cola", "rte", "stsb"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_data_file_is_refused_by_its_name(
    damage: str, task: str, name: str, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    path = write_glue(tmp_path / "glue", task) / FOLDERS[task] / name
    content = path.read_bytes()
    if damage == "a header alone" and task == "cola":
        content = b""  # it has no header
    path.write_bytes(DAMAGE[damage](content))
    assert run(command(bert, tmp_path / "glue", tmp_path / "runs", task=task)) == 2
    check_refusal(capsys.readouterr().err, f"{FOLDERS[task]}/{name}", tmp_path)


@pytest.mark.parametrize("there", ["nothing", "a folder"])
def test_a_data_file_that_is_not_one_is_refused_by_its_name(
    there: str, bert: Path, glue_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (glue_folder / "CoLA/dev.tsv").unlink()
    if there == "a folder":
        (glue_folder / "CoLA/dev.tsv").mkdir()
    assert run(command(bert, glue_folder, tmp_path / "runs")) == 2
    check_refusal(capsys.readouterr().err, "CoLA/dev.tsv", tmp_path)


# --- generated ----------------------------------------------------------------------------------------------

NUMBERS = [f for f in fields(Settings) if isinstance(f.metadata["parse"], Number)]  # new ones, too
words = st.text(st.characters(codec="utf-8", exclude_characters="-"), min_size=1).filter(
    lambda text: not re.fullmatch(r"[\s+]*[\d_.]+(e[\d_+]+)?\s*|\s*[+]?(inf|infinity|nan)\s*", text, re.I)
)


def texts_of(f: Field, inside: bool) -> st.SearchStrategy[tuple[str, str]]:
    """The flag's name and what it can be given, or cannot."""
    low, high = f.metadata["parse"].least, f.metadata["parse"].most
    if f.metadata["parse"].kind is int:
        right = st.one_of(st.sampled_from([low, high]), st.integers(low, high)).map(str)
        wrong = [st.integers(max_value=low - 1).map(str), st.integers(min_value=high + 1).map(str)]
        wrong.append(st.floats().map(repr))
    else:
        right = st.one_of(st.sampled_from([low, high]), st.floats(low, high)).map(repr)
        wrong = [st.floats(max_value=low, exclude_max=True).map(repr)]
        wrong += [st.floats(min_value=high, exclude_min=True).map(repr), st.sampled_from(["nan", "1e400"])]
    return st.tuples(st.just(f.name), right if inside else st.one_of(words, *wrong))


@pytest.mark.usefixtures("no_training")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flag=st.sampled_from(NUMBERS).flatmap(lambda f: texts_of(f, inside=False)), glued=st.booleans())
def test_any_value_that_a_flag_cannot_have_is_refused_by_the_flags_name(
    flag: tuple[str, str], glued: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    name, value = flag
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run(["--demo", *([f"--{name}={value}"] if glued else [f"--{name}", value])]) == 2
    check_refusal(capsys.readouterr().err, f"--{name}", tmp_path)


@settings(deadline=None)
@given(flags=st.lists(st.sampled_from(NUMBERS).flatmap(lambda f: texts_of(f, inside=True)), max_size=4))
def test_values_in_range_make_settings_or_are_refused_in_one_line(flags: list[tuple[str, str]]):
    argv = [f"--{name}={value}" for name, value in flags]
    with contextlib.suppress(UsageError):  # they may not go together
        s = Settings.from_command_line(["--demo", "--eval_samples=1", *argv], "").resolve(2400, ["x"])
        assert all(math.isfinite(learning_rate(t, s)) for t in (1, s.total_steps))


@pytest.mark.slow
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flags=st.lists(st.sampled_from(NUMBERS).flatmap(lambda f: texts_of(f, inside=True)), max_size=3))
def test_values_in_range_train_or_end_in_one_line(
    flags: list[tuple[str, str]], bert: Path, tmp_path: Path, capsys
):
    """None of them has anything else happen; those that only make a run long are left out."""
    long = {"mc_samples", "eval_samples", "epochs", "max_steps"}
    argv = [f"--{name}={value}" for name, value in flags if name not in long]
    argv = [*command(bert, write_glue(tmp_path / "glue", "cola"), tmp_path / "run", "--overwrite"), *argv]
    capsys.readouterr()
    status = run(argv)
    said = capsys.readouterr().err.splitlines()
    assert status in (0, 2, 3)
    assert not status or said[-1].startswith("run_glue.py: ")
    assert not any("Traceback" in line for line in said)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.binary(max_size=60), at=st.integers(0, 12), task=st.sampled_from(["cola", "rte", "stsb"]))
def test_any_row_in_a_data_file_is_read_or_refused_in_one_line(
    row: bytes, at: int, task: str, tmp_path: Path
):
    path = write_glue(tmp_path, task) / FOLDERS[task] / "dev.tsv"
    rows = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*rows[:at], row, *rows[at:]]))
    refusal = str(path)
    try:
        load_task(task, tmp_path)
    except ValueError as error:
        refusal = str(error)
    assert refusal.startswith(str(path))
    assert "\n" not in refusal


# --- paths --------------------------------------------------------------------------------------------------

LONG = "x" * 300
PATHS = {
    "a loop to write to": ["--demo", "--output_dir", "loop"],
    "a folder in a loop": ["--demo", "--output_dir", "loop/run"],
    "a long name to write to": ["--demo", "--output_dir", LONG],
    "a folder in a file": ["--demo", "--output_dir", "file/run"],
    "a loop of data": ["--task", "cola", "--model", "MODEL", "--data_dir", "loop"],
    "a long name of data": ["--task", "cola", "--model", "MODEL", "--data_dir", LONG],
    "a loop of a file": ["--train_file", "loop.csv", "--holdout", "0.1"],
    "a long name of a file": ["--train_file", f"{LONG}.csv", "--holdout", "0.1"],
    "a model with a long name": ["--task", "cola", "--data_dir", str(HERE / "demo"), "--model", f"./{LONG}"],
}


@pytest.mark.parametrize("case", PATHS)
def test_a_path_that_cannot_be_used_is_refused_in_one_line(
    case: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    for name in ("loop", "loop.csv"):
        os.symlink(f"{name}2", name)
        os.symlink(name, f"{name}2")
    Path("file").write_text("mine")
    assert run([str(bert) if word == "MODEL" else word for word in PATHS[case]]) == 2
    named = next(name for name in (LONG, "loop", "file") if any(name in word for word in PATHS[case]))
    check_refusal(capsys.readouterr().err, named, tmp_path)


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("name", ["config.json", "checkpoint/model.safetensors", "results.json"])
def test_a_folder_with_files_that_are_no_runs_is_left_as_it_is(
    name: str, more: list[str], bert: Path, glue_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """A model's folder, or one's own with a "checkpoint" in it: a run would replace these."""
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"model_type": "bert"}')
    argv = ["--task", "cola", "--model", str(bert), "--data_dir", str(glue_folder), "--max_steps", "2"]
    assert run([*argv, "--output_dir", str(tmp_path / "mine"), *more]) == 2
    assert "would be lost: give another --output_dir" in capsys.readouterr().err
    assert [p for p in (tmp_path / "mine").rglob("*") if p.is_file()] == [path]
    assert path.read_text() == '{"model_type": "bert"}'

"""tokens.py: what is kept is what the tokenizer gives, and taken for the same tokenizer and sentences."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import sentences, write_glue
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import tokens
from glue import TASKS
from tokens import tokenize

PAIR = {"sentence1": sentences(9, seed=3), "sentence2": sentences(9, seed=4), "label": [0, 1, 0] * 3}
RTE = TASKS["rte"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tokens are kept."""
    path = tmp_path / "kept"
    path.mkdir()
    monkeypatch.setattr(tokens, "cached_assets_path", lambda *_: path)
    return path


@pytest.fixture(params=["bert", "deberta"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))


def calls(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with each call of the tokenizer."""
    made, call = [], type(tokenizer).__call__

    def counted(self, *args, **kwargs):
        made.append(args)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    return made


def plain(tokenizer: PreTrainedTokenizerBase, data: dict, max_length: int) -> list[dict]:
    """Pair by pair, as transformers' documentation has it."""
    pairs = zip(data["sentence1"], data["sentence2"], strict=True)
    return [dict(tokenizer(a, b, truncation=True, max_length=max_length)) for a, b in pairs]


@pytest.mark.parametrize("max_length", [64, 8])
def test_kept_tokens_are_the_tokenizers(
    tokenizer: PreTrainedTokenizerBase, max_length: int, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = plain(tokenizer, PAIR, max_length)
    made = calls(tokenizer, monkeypatch)
    for _ in range(3):
        features, labels = tokenize(PAIR, RTE, tokenizer, max_length)
        assert features == expected
        assert labels.tolist() == PAIR["label"]
    assert len(made) == 1
    assert len(list(folder.iterdir())) == 1


def test_tokens_are_kept_whatever_the_tokenizer_did_before(
    tokenizer: PreTrainedTokenizerBase, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenize(PAIR, RTE, tokenizer, 64)
    tokenizer(["a cat", "the dog sees a cat"], truncation=True, max_length=4, padding="max_length")
    made = calls(tokenizer, monkeypatch)
    tokenize(PAIR, RTE, tokenizer, 64)
    assert not made


def test_labels_are_not_kept(tokenizer: PreTrainedTokenizerBase, folder: Path):
    tokenize(PAIR, RTE, tokenizer, 64)
    _, labels = tokenize(PAIR | {"label": [1] * 9}, RTE, tokenizer, 64)
    assert labels.tolist() == [1] * 9


@pytest.mark.parametrize("other", ["sentences", "their order", "the other column", "length", "tokenizer"])
def test_other_tokens_are_made_anew(other: str, bert: Path, folder: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenize(PAIR, RTE, tokenizer, 64)
    data, max_length = dict(PAIR), 64
    if other == "sentences":
        data["sentence1"] = ["a cat runs", *data["sentence1"][1:]]
    elif other == "their order":
        data["sentence1"] = data["sentence1"][::-1]
    elif other == "the other column":
        data["sentence1"], data["sentence2"] = data["sentence2"], data["sentence1"]
    elif other == "length":
        max_length = 7
    else:
        shutil.copytree(bert, tmp_path / "bert")
        words = (bert / "vocab.txt").read_text().splitlines()
        (tmp_path / "bert/vocab.txt").write_text("\n".join([*words[:5], *reversed(words[5:])]) + "\n")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert")
    features, _ = tokenize(data, RTE, tokenizer, max_length)
    assert features == plain(tokenizer, data, max_length)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["empty", "cut short", "one bit", "other tensors"])
def test_damaged_tokens_are_made_anew(damage: str, bert: Path, folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    expected, _ = tokenize(PAIR, RTE, tokenizer, 64)
    [path] = folder.iterdir()
    good = path.read_bytes()
    if damage == "other tensors":
        tokens.write_tensors(path, {"input_ids": torch.zeros(3)}, {"checksum": "0"})
    else:
        flipped = good[:-5] + bytes([good[-5] ^ 1]) + good[-4:]
        path.write_bytes({"empty": b"", "cut short": good[:-3], "one bit": flipped}[damage])
    assert tokenize(PAIR, RTE, tokenizer, 64)[0] == expected
    assert path.read_bytes() == good


def test_where_nothing_can_be_kept_tokens_are_made_each_time(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    tokenizer = AutoTokenizer.from_pretrained(bert)
    expected = plain(tokenizer, PAIR, 64)
    for place in ("cached_assets_path", "write_tensors"):
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "cached_assets_path", lambda *_: tmp_path)
            patch.setattr(tokens, place, full)
            for _ in range(2):
                assert tokenize(PAIR, RTE, tokenizer, 64)[0] == expected
    assert not list(tmp_path.iterdir())


def test_a_second_run_takes_the_first_ones_tokens(bert: Path, tmp_path: Path):
    data = write_glue(tmp_path / "glue", "cola")
    code = """
import run_glue, sys, transformers
made, call = [], transformers.PreTrainedTokenizerBase.__call__
def counted(self, *args, **kwargs):
    made.append(args)
    return call(self, *args, **kwargs)
transformers.PreTrainedTokenizerBase.__call__ = counted
status = run_glue.main(sys.argv[1:])
print("calls", len(made))
sys.exit(status)
"""
    repo = Path(__file__).resolve().parent.parent
    said, adapters = [], []
    for name in ("first", "second"):
        run = tmp_path / name
        flags = ["--task", "cola", "--model", bert, "--data_dir", data, "--max_steps", 2, "--output_dir", run]
        command = [sys.executable, "-c", code, *map(str, flags)]
        environment = {**os.environ, "PYTHONPATH": str(repo), "HF_ASSETS_CACHE": str(tmp_path / "assets")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines()[-1])
        adapters.append((run / "adapter/adapter.safetensors").read_bytes())
    assert said == ["calls 2", "calls 0"]  # train and validation
    assert adapters[0] == adapters[1]

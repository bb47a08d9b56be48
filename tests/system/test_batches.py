"""Sentences → token ids → batches: the tokenizer's ids; every example once an epoch, in a known order."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import sentences, write_glue
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase

import run_glue
from harness.batches import Batches, evaluation_split, tokenize
from harness.glue import TASKS
from harness.prediction import predict
from harness.settings import Settings

PAIR = {"sentence1": sentences(9, seed=3), "sentence2": sentences(9, seed=4), "label": [0, 1, 0] * 3}
RTE = TASKS["rte"]


@pytest.fixture(params=["bert", "deberta"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))


def pad(features: list[dict]) -> transformers.BatchEncoding:
    rows = [torch.tensor(feature["input_ids"]) for feature in features]
    return transformers.BatchEncoding({"input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)})


def make_batches(lengths: list[int], **settings: object) -> Batches:
    """Of examples whose every token is their number, so that a batch shows which examples are in it."""
    features = [{"input_ids": [i] * length} for i, length in enumerate(lengths)]
    labels = torch.arange(len(lengths))
    return Batches(features, labels, pad, Settings(device="cpu", **settings))


def examples_of(batches: Batches, t: int) -> list[int]:
    return sorted(i for _, labels, _ in batches.of_update(t) for i in labels.tolist())


# --- token ids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [64, 8])
def test_token_ids_are_those_of_the_tokenizer_pair_by_pair(
    tokenizer: PreTrainedTokenizerBase, max_length: int
):
    features, labels = tokenize(PAIR, RTE, tokenizer, max_length)
    pairs = zip(PAIR["sentence1"], PAIR["sentence2"], strict=True)
    assert features == [dict(tokenizer(a, b, truncation=True, max_length=max_length)) for a, b in pairs]
    assert labels.tolist() == PAIR["label"]


def test_token_ids_do_not_depend_on_what_the_tokenizer_did_before(tokenizer: PreTrainedTokenizerBase):
    expected, _ = tokenize(PAIR, RTE, tokenizer, 64)
    tokenizer(["a cat", "the dog sees a cat"], truncation=True, max_length=4, padding="max_length")
    assert tokenize(PAIR, RTE, tokenizer, 64)[0] == expected


@pytest.mark.parametrize("task", TASKS)
def test_labels_are_class_indices_or_for_regression_numbers(task: str, bert: Path):
    tokenizer, given = AutoTokenizer.from_pretrained(bert), [0.5, 4] if task == "stsb" else [0, 1]
    data = {column: ["a cat", "the dog"] for column in TASKS[task].text} | {"label": given}
    _, labels = tokenize(data, TASKS[task], tokenizer, 8)
    assert labels.dtype == (torch.float32 if task == "stsb" else torch.int64)
    assert labels.tolist() == given


def test_a_run_tokenizes_each_split_once(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls, call = [], PreTrainedTokenizerBase.__call__

    def counted(self: PreTrainedTokenizerBase, *args: object, **kwargs: object) -> transformers.BatchEncoding:
        calls.append(args)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counted)
    data, folder = write_glue(tmp_path / "glue", "mnli"), tmp_path / "run"
    argv = ["--task", "mnli", "--model", str(bert), "--data_dir", str(data), "--output_dir", str(folder)]
    run_glue.main([*argv, "--max_steps", "6", "--batch_size", "8", "--eval_every", "2"])  # two epochs
    assert [len(first) for first, *_ in calls] == [24, 12, 12]  # train, matched, mismatched


# --- training batches ---------------------------------------------------------------------------------------

LENGTHS = torch.randint(3, 60, (1000,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("group_by_length", [False, True])
def test_every_epoch_has_every_example_once_in_an_order_of_its_own(group_by_length: bool):
    batches = make_batches(LENGTHS, batch_size=8, group_by_length=group_by_length)
    updates = [examples_of(batches, t) for t in range(1, 251)]
    for epoch in (updates[:125], updates[125:]):
        assert sorted(i for update in epoch for i in update) == list(range(1000))
    assert updates[:125] != updates[125:]


def test_the_micro_batches_of_an_update_are_of_similar_length():
    batches = make_batches(LENGTHS, batch_size=8, grad_accum=4)
    for t in range(1, 32):
        widths = [inputs["input_ids"].shape[1] for inputs, _, _ in batches.of_update(t)]
        assert widths == sorted(widths)


def test_the_last_batch_of_an_epoch_has_what_is_left():
    batches = make_batches([4] * 20, batch_size=8)
    assert [len(examples_of(batches, t)) for t in range(1, 7)] == [8, 8, 4, 8, 8, 4]


def test_the_seed_decides_the_order():
    first, same, other = (make_batches(LENGTHS, batch_size=8, seed=seed) for seed in (5, 5, 6))
    assert [examples_of(first, t) for t in range(1, 9)] == [examples_of(same, t) for t in range(1, 9)]
    assert [examples_of(first, t) for t in range(1, 9)] != [examples_of(other, t) for t in range(1, 9)]


@pytest.mark.parametrize("group_by_length", [False, True])
def test_a_run_that_begins_at_any_update_has_the_same_batches_from_there(group_by_length: bool):
    how = {"batch_size": 8, "group_by_length": group_by_length}
    whole = make_batches([4] * 20, **how)
    updates = {t: examples_of(whole, t) for t in range(1, 13)}
    for start in updates:
        resumed = make_batches([4] * 20, **how)
        assert {t: examples_of(resumed, t) for t in range(start, 13)} == {
            t: updates[t] for t in range(start, 13)
        }


def test_batches_of_like_length_have_a_tenth_of_the_padding_and_come_in_random_order():
    def look(group_by_length: bool) -> tuple[int, torch.Tensor]:
        batches = make_batches(LENGTHS, batch_size=8, group_by_length=group_by_length)
        lengths = torch.tensor(LENGTHS)
        updates = [lengths[examples_of(batches, t)] for t in range(1, 251)]
        return sum(int((x.max() - x).sum()) for x in updates), torch.stack(
            [x.double().mean() for x in updates]
        )

    (grouped, means), (shuffled, _) = look(True), look(False)
    assert grouped < shuffled / 10
    neighbours = torch.corrcoef(torch.stack([means[:-1], means[1:]]))[0, 1]
    assert abs(neighbours) < 0.2


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_micro_batches_and_processes_share_an_update_by_their_number_of_examples(
    processes: int, monkeypatch: pytest.MonkeyPatch
):
    """Averaged over processes, Σ share · mean over a micro-batch is the mean over the update's examples."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    values = torch.linspace(0, 1, 50, dtype=torch.float64) ** 2
    updates: dict[int, list] = {t: [] for t in range(1, 8)}
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        batches = make_batches([4] * 50, batch_size=3, grad_accum=2, processes=processes)
        for t, found in updates.items():
            found += list(batches.of_update(t))
    for found in updates.values():
        examples = torch.cat([labels for _, labels, _ in found])
        assert len(examples.unique()) == len(examples)
        assert all(len(labels) <= 3 for _, labels, _ in found)
        average = sum(share * values[labels].mean().item() for _, labels, share in found) / processes
        assert average == pytest.approx(values[examples].mean().item(), rel=1e-12)


def test_inputs_and_labels_of_a_micro_batch_are_of_the_same_examples():
    batches = make_batches(LENGTHS[:50], batch_size=4, grad_accum=2)
    for t in range(1, 10):
        for inputs, labels, _ in batches.of_update(t):
            assert inputs["input_ids"][:, 0].tolist() == labels.tolist()
            assert inputs["input_ids"].shape == (len(labels), max(LENGTHS[i] for i in labels))


@pytest.mark.parametrize("other", ["a sentence", "a label", "the order", "validation", "a validation label"])
def test_the_checksum_tells_other_data(other: str, bert: Path):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    collate, settings = DataCollatorWithPadding(tokenizer), Settings(device="cpu", batch_size=32)

    def checksum(train: dict, validation: dict) -> str:
        splits = [evaluation_split(*tokenize(validation, RTE, tokenizer, 64), collate, 4)]
        return Batches(*tokenize(train, RTE, tokenizer, 64), collate, settings).checksum(splits)

    changed, changed_validation = (json.loads(json.dumps(PAIR)) for _ in range(2))
    if other == "a sentence":
        changed["sentence2"][4] = "a cat runs"
    elif other == "a label":
        changed["label"][4] = 1 - changed["label"][4]
    elif other == "the order":
        changed = {column: values[::-1] for column, values in changed.items()}
    elif other == "validation":
        changed_validation["sentence1"][0] = "a cat runs"
    else:
        changed_validation["label"][0] = 1 - changed_validation["label"][0]
    assert checksum(PAIR, PAIR) == checksum(dict(PAIR), dict(PAIR))
    assert checksum(changed, changed_validation) != checksum(PAIR, PAIR)


# --- evaluation batches -------------------------------------------------------------------------------------


class Echo(torch.nn.Module):
    """Its logit is the first token; it also notes how much padding it was given."""

    def __init__(self):
        super().__init__()
        self.device, self.tokens = torch.device("cpu"), 0

    def forward(self, input_ids: torch.Tensor) -> Namespace:
        self.tokens += input_ids.numel()
        return Namespace(logits=input_ids[:, :1].float())


def test_predictions_come_back_in_the_order_of_the_examples():
    features = [{"input_ids": [i] * (i * 7 % 23 + 1)} for i in range(100)]
    model = Echo()
    split = evaluation_split(features, torch.zeros(100), pad, 8)
    assert predict(model, split).tolist() == list(range(100))
    assert model.tokens < 1.2 * sum(len(feature["input_ids"]) for feature in features)

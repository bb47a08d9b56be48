"""Sentences or prompts → token ids → batches."""

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from harness import processes
from harness.files import checksum
from harness.settings import Settings
from harness.task import FIELD, Task, UsageError, fill_in

GROUP = 50  # batches that --group_by_length sorts together


def tokenize(
    dataset: Any, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, causal: bool = False
) -> tuple[list[dict], Tensor]:
    """Each example's input_ids and attention_mask, unpadded, and all labels (n,): int64, or for regression
    float32. For a causal language model they are the prompt's, and "options" is how many choices there are.

    Raises UsageError for a prompt that does not fit into `max_length`.
    """
    if causal:
        features = encode_prompts(dataset, task, tokenizer, max_length)
    else:
        texts = (list(dataset[name]) for name in task.text)
        found = tokenizer(*texts, truncation=True, max_length=max_length)
        features = [dict(zip(found, example, strict=True)) for example in zip(*found.values(), strict=True)]
    return features, torch.tensor(dataset["label"], dtype=torch.int64 if task.labels else torch.float32)


def encode_prompts(
    dataset: Any, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict]:
    """Each example's input_ids, attention_mask and "options".

    Where the prompt is too long, the longest of its texts in `task.cut` loses its end, then the next.
    """
    columns = {name: list(dataset[name]) for name in dict.fromkeys(FIELD.findall(task.prompt))}
    examples = [dict(zip(columns, texts, strict=True)) for texts in zip(*columns.values(), strict=True)]
    prompts = encoded([fill_in(task.prompt, example) for example in examples], tokenizer)
    options = dataset["options"] if "options" in dataset.column_names else [len(task.choices)] * len(prompts)
    features = []
    for i, (example, ids, n) in enumerate(zip(examples, prompts, options, strict=True)):
        for name in sorted(example.keys() & {*task.cut}, key=lambda name: (-len(example[name]), name)):
            if len(ids) > max_length:
                ids = cut_prompt(task.prompt, example, name, tokenizer, max_length)
        if len(ids) > max_length:
            long = f"has {len(ids)} tokens without its texts: give a --max_length of at least {len(ids)}"
            raise UsageError(f"the prompt of example {i} {long}")
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "options": n})
    return features


def cut_prompt(
    prompt: str, example: dict[str, str], column: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[int]:
    """The prompt with as much of one column's text as `max_length` allows; `example` has it cut, too."""

    def ids(characters: int) -> list[int]:
        return encoded([fill_in(prompt, example | {column: text[:characters]})], tokenizer)[0]

    text = example[column]
    fits = bisect_right(range(1, len(text)), max_length, key=lambda n: len(ids(n)))
    example[column] = text[:fits]
    return ids(fits)


def encoded(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids without the end token that some tokenizers add, where the answer belongs."""
    found, ends = tokenizer(prompts)["input_ids"], (tokenizer.eos_token_id, tokenizer.sep_token_id)
    for ids in found:
        while ids and ids[-1] in ends:
            ids.pop()
    return found


class Split(NamedTuple):
    """Examples to predict: batches of similar length, each example's place in them (n,), the labels (n,)."""

    batches: list[Mapping[str, Tensor]]
    position: Tensor
    labels: Tensor


def evaluation_split(features: list[dict], labels: Tensor, collate: Callable, size: int) -> Split:
    """Examples from `tokenize`, sorted by length and padded by `collate`."""
    order = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
    batches = [collate([features[i] for i in order[j : j + size]]) for j in range(0, len(order), size)]
    return Split(batches, torch.tensor(order).argsort(), labels)


class Batches:
    """The training examples of each update, shuffled anew in every epoch from the seed."""

    def __init__(self, features: list[dict], labels: Tensor, collate: Callable, settings: Settings):
        self.features, self.labels, self.collate, self.device = features, labels, collate, settings.device
        # Without waiting, on CUDA alone: on MPS such a copy may read memory that is free again.
        self.copying = {"non_blocking": settings.device.startswith("cuda")}
        self.lengths = torch.tensor([len(example["input_ids"]) for example in features])
        self.micro, self.by_length = settings.batch_size, settings.group_by_length
        # Examples in an update, at most all there are: a huge setting would overflow.
        self.size = min(settings.batch_size * settings.grad_accum * settings.processes, len(features))
        self.per_epoch = math.ceil(len(features) / self.size)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.epoch, self.batches = -1, []  # the current epoch, counted from 0

    def of_update(self, t: int) -> Iterator[tuple[Mapping[str, Tensor], Tensor, float]]:
        """The micro-batches of update t, counted from 1: inputs, labels, share of the update's examples.

        Updates come in order, but can begin anywhere. Each of several processes gets its own micro-batches;
        the shares are such that the processes' average gradient is the mean over the update.
        """
        epoch, i = divmod(t - 1, self.per_epoch)
        while self.epoch < epoch:
            self.epoch, self.batches = self.epoch + 1, self._shuffled()
        batch = self.batches[i]
        batch = batch[self.lengths[batch].argsort()]  # micro-batches of similar length need less padding
        own = processes.own_share(batch)
        for micro in own.split(self.micro) if len(own) else ():
            inputs = self.collate([self.features[i] for i in micro])
            share = len(micro) * processes.count() / len(batch)
            labels = self.labels[micro]
            yield inputs.to(self.device, **self.copying), labels.to(self.device, **self.copying), share

    def longest(self) -> Mapping[str, Tensor]:
        """The inputs of the micro-batch that takes most memory."""
        return self.collate([self.features[i] for i in self.lengths.argsort()[-self.micro :]])

    def checksum(self, splits: Collection[Split]) -> str:
        """Of the tokens and labels to train on and to evaluate on."""
        tokens = torch.tensor([token for example in self.features for token in example["input_ids"]])
        judged = [batch["input_ids"] for split in splits for batch in split.batches]
        return checksum([tokens, self.labels, *judged, *(split.labels for split in splits)])

    def _shuffled(self) -> list[Tensor]:
        """The next epoch's batches: indices of examples; the last batch may be smaller.

        With `by_length` the examples of GROUP batches are sorted, and the batches come in random order.
        """
        order = torch.randperm(len(self.features), generator=self.generator)
        if not self.by_length:
            return list(order.split(self.size))
        groups = order.split(GROUP * self.size)
        groups = [group[self.lengths[group].argsort(stable=True)] for group in groups]
        batches = [batch for group in groups for batch in group.split(self.size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=self.generator)]

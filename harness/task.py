"""What a task is: its reader, columns, labels, metrics, prompt, settings; and a share of train held out."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


class EndsRun(Exception):
    """Ends the program with one line on stderr and an exit status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


class UsageError(EndsRun, ValueError):
    """Something the user can correct."""


@dataclass(frozen=True)
class Task:
    """A data set with texts and a label, and how a model is trained on it and judged.

    load: (data_dir or None, names of splits or None) → the splits by name, a datasets.Dataset each, with the
        columns `text` and `cut`, "label" (class index, or for regression a float; missing: −1, or NaN in the
        user's own numbers) and "idx"; "options", if some examples have only the first n of `choices`.
    text: the columns that an encoder reads, one or two; none if only a causal language model can do the task.
    labels: class names in the order of their indices; none for regression.
    metrics: (predictions (n,), labels (n,)) → numbers by name, among them `metric`, which decides.
    settings: (method, optimizer) → published values by the names of Settings' fields. Steps, "total_steps"
        among them, are those of the published run, and scale with a run's length.
    train_size: examples in train, to know a run's length before the data are loaded.
    validation: splits to evaluate on, the one that decides first.
    tests: all other splits.
    written: what a prediction file writes for each label.
    prompt: what a causal language model reads, with columns' names in braces; none if only encoders can.
    choices: the words by which it answers, one for each label.
    cut: columns of the prompt; the longest loses its end where the prompt is too long.
    model: the one to train where none is given.
    """

    name: str
    folder: str
    load: Callable[..., dict[str, Any]]
    text: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: Callable[..., dict[str, float]]
    metric: str
    settings: Callable[[str, str], Mapping[str, Any]]
    train_size: int
    validation: tuple[str, ...] = ("validation",)
    tests: tuple[str, ...] = ("test",)
    written: tuple[str, ...] = ()
    prompt: str = ""
    choices: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    model: str = "microsoft/deberta-v3-base"

    @property
    def splits(self) -> tuple[str, ...]:
        """All there are."""
        return ("train", *self.validation, *self.tests)

    @property
    def outputs(self) -> int:
        """How many numbers the model's head gives."""
        return len(self.labels) or 1


FIELD = re.compile(r"\{([^{}]*)\}")  # a column's name in a prompt


def fill_in(prompt: str, fields: Mapping[str, str]) -> str:
    """The prompt with each field's text, stripped, in the place of its name in braces."""
    return FIELD.sub(lambda found: fields[found[1]].strip(), prompt)


def hold_out(task: Task, share: float, seed: int) -> Task:
    """The task with a share of its train split as validation, "holdout"; train is the rest.

    The split is stratified by label (for regression, by score), and the same for the same seed. The task's
    own validation splits can still be asked for by name.
    """

    def load(data_dir: Any = None, splits: Collection[str] | None = None) -> dict[str, Any]:
        own = {"train" if name == "holdout" else name for name in splits or ()}
        data = task.load(data_dir, [name for name in task.splits if name in own] if splits else None)
        if "train" in data:
            train = data["train"]
            held = held_out_mask(np.asarray(train["label"]), share, seed)
            if not held.any():
                raise UsageError(f"--holdout {share:g} of {len(train)} examples is less than one: give more")
            data |= {"train": train.select((~held).nonzero()[0]), "holdout": train.select(held.nonzero()[0])}
        return {name: data[name] for name in splits or data}

    others = {"validation": ("holdout",), "tests": (*task.validation, *task.tests), "load": load}
    return replace(task, train_size=task.train_size - int(task.train_size * share + 1e-9), **others)


def held_out_mask(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A bool mask (n,): evenly spread over the examples in order of their labels, random among equals."""
    random = np.random.default_rng(seed).permutation(len(labels))
    order = random[labels[random].argsort(kind="stable")]
    upto = np.floor(np.arange(len(labels) + 1) * share + 1e-9)
    held = np.zeros(len(labels), dtype=bool)
    held[order[upto[1:] > upto[:-1]]] = True
    return held

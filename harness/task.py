"""What a task is: its reader, columns, labels, metrics and settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class EndsRun(Exception):
    """Ends the program with one line on stderr and an exit status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


class UsageError(EndsRun, ValueError):
    """Something the user can correct."""


@dataclass(frozen=True)
class Task:
    """A data set with one or two text columns and a label, and how a model is trained on it and judged.

    load: (data_dir or None, names of splits or None) → the splits by name, a datasets.Dataset each, with the
        columns `text`, "label" (class index, or for regression a float; −1 where there is none) and "idx".
    labels: class names in the order of their indices; none for regression.
    metrics: (predictions (n,), labels (n,)) → numbers by name, among them `metric`, which decides.
    settings: (method, optimizer) → published values by the names of Settings' fields. Steps, "total_steps"
        among them, are those of the published run, and scale with a run's length.
    train_size: examples in train, to know a run's length before the data are loaded.
    validation: splits to evaluate on, the one that decides first.
    written: what a prediction file writes for each label.
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
    written: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        """All there are."""
        tests = (name.replace("validation", "test") for name in self.validation)
        return ("train", *self.validation, *tests)

    @property
    def outputs(self) -> int:
        """How many numbers the model's head gives."""
        return len(self.labels) or 1

"""What GLUE is: its tasks, its files, and the papers' settings for each task.

    load_task("cola")                     # from the Hugging Face Hub
    load_task("cola", data_dir="glue")    # from a folder in GLUE's own layout: glue/CoLA/train.tsv, …

Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", ICLR
2019. The settings are those of Chen and Garner, arXiv 2409.10673, and with AdamW of AdaLoRA, ICLR 2023.
"""

import logging
import math
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # imported where it is needed: a look at TASKS does not have to wait for it
    from datasets import Dataset

log = logging.getLogger(__name__)

HUB_DATASET = "nyu-mll/glue"
HUB_SECONDS = 3  # how long the Hub may take to answer at all


class Settings(NamedTuple):
    """How the papers train a task. Steps are updates at batch size 32."""

    max_length: int
    epochs: int
    lr_adamw: float
    warmup_adamw: int
    lr_ivon: float
    warmup_ivon: int
    first_lr: float  # IVON: warm up to this instead, hold it until
    first_steps: int  # this step, then decay from lr_ivon; 0: no such phase
    alpha: float
    orth: float  # γ, weight of the orthogonality penalty
    tinit: int  # t_i
    tfinal: int  # t_f
    delta_t: int  # ΔT
    eval_every: int


class Task(NamedTuple):
    """What a task's data look like, and how it is trained and judged."""

    folder: str  # in GLUE's own layout
    text: tuple[str, ...]  # columns of the one or two sentences, as the Hub names them
    file_columns: tuple[str, ...]  # of the same sentences and of the label in train.tsv and dev.tsv
    labels: tuple[str, ...]  # class names in the order of their indices; none: regression on [0, 5]
    file_labels: tuple[str, ...]  # what the files write for them
    train_size: int
    validation: tuple[str, ...]  # splits, the one a run is judged by first
    metric: str  # of metrics.task_metrics, the one a run is judged by
    settings: Settings

    @property
    def splits(self) -> tuple[str, ...]:
        """All there are."""
        return ("train", *self.validation, *(name.replace("validation", "test") for name in self.validation))

    @property
    def total_steps(self) -> int:
        """T, the updates of the papers' run."""
        return self.settings.epochs * math.ceil(self.train_size / 32)


# fmt: off
SETTINGS = {
    # length, epochs | AdamW lr, warm-up | IVON lr, warm-up, first phase | alpha, γ | t_i, t_f, ΔT | evaluate
    "cola": Settings( 64, 25, 8e-4,    100, 0.4, 100, 2.0, 500, 32, 0.1,  800,  3500,  10,  100),
    "stsb": Settings(128, 25, 2.2e-3,  100, 0.4, 100, 2.0, 500, 32, 0.3,  800,  2000,  10,  100),
    "mrpc": Settings(320, 30, 1e-3,    100, 0.5, 100, 2.0, 400, 32, 0.1,  600,  1800,   1,  300),
    "rte":  Settings(320, 50, 1.2e-3,  200, 0.5, 100, 2.0, 400, 32, 0.3,  600,  1800,   1,  100),
    "sst2": Settings(128, 24, 8e-4,   1000, 0.4, 500, 0.0,   0, 16, 0.1, 6000, 22000, 100, 3000),
    "qnli": Settings(512,  5, 5e-4,    500, 0.4, 500, 0.0,   0, 32, 0.1, 2000,  8000, 100, 1000),
    "qqp":  Settings(320,  5, 8e-4,   2000, 0.4, 500, 0.0,   0, 16, 0.1, 8000, 25000, 100, 3000),
    "mnli": Settings(256,  7, 5e-4,   1000, 0.4, 500, 0.0,   0, 16, 0.1, 8000, 50000, 100, 2000),
}

PAIR = ("sentence1", "sentence2")
DIGITS = ("0", "1")
ENTAILED = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")
ONE = ("validation",)
MNLI = ("validation_matched", "validation_mismatched")
MATTHEWS = "matthews_correlation"
TASKS = {
    "cola": Task("CoLA", ("sentence",), ("sentence", "label"), ("unacceptable", "acceptable"), DIGITS,
                 8551, ONE, MATTHEWS, SETTINGS["cola"]),
    "sst2": Task("SST-2", ("sentence",), ("sentence", "label"), ("negative", "positive"), DIGITS,
                 67349, ONE, "accuracy", SETTINGS["sst2"]),
    "mrpc": Task("MRPC", PAIR, ("#1 String", "#2 String", "Quality"), ("not_equivalent", "equivalent"),
                 DIGITS, 3668, ONE, "accuracy", SETTINGS["mrpc"]),
    "stsb": Task("STS-B", PAIR, (*PAIR, "score"), (), (),
                 5749, ONE, "pearson_spearman", SETTINGS["stsb"]),
    "qqp":  Task("QQP", ("question1", "question2"), ("question1", "question2", "is_duplicate"),
                 ("not_duplicate", "duplicate"), DIGITS,
                 363846, ONE, "accuracy", SETTINGS["qqp"]),
    "mnli": Task("MNLI", ("premise", "hypothesis"), (*PAIR, "gold_label"), NLI, NLI,
                 392702, MNLI, "accuracy", SETTINGS["mnli"]),
    "qnli": Task("QNLI", ("question", "sentence"), ("question", "sentence", "label"), ENTAILED, ENTAILED,
                 104743, ONE, "accuracy", SETTINGS["qnli"]),
    "rte":  Task("RTE", PAIR, (*PAIR, "label"), ENTAILED, ENTAILED,
                 2490, ONE, "accuracy", SETTINGS["rte"]),
}
# fmt: on
LORA_LR, LORA_ALPHA = 2e-4, 32
# LoRA with IVON has no published setting for GLUE, and at AdaLoRA's it does not learn on the demo. Ours, with
# a learning rate that makes the largest step AdamW's (run_glue.plan):
LORA_IVON = {"hess_init": 1e-4, "beta2": 0.999, "ess": 1e10}
FULL_LR, FULL_LR_MNLI, FULL_LR_IVON = 2e-5, 1.5e-5, 0.1
FULL_EPOCHS = {"sst2": 6, "qnli": 4}  # the other tasks': as AdaLoRA
# The embedded model and data of demo/: CoLA's files, and settings for a far smaller encoder than DeBERTaV3.
DEMO = TASKS["cola"]._replace(
    train_size=2400,
    settings=SETTINGS["cola"]._replace(
        epochs=12,
        lr_adamw=2e-3,
        warmup_adamw=50,
        lr_ivon=2.0,
        warmup_ivon=50,
        first_lr=0.0,
        first_steps=0,
        tinit=100,
        tfinal=350,
    ),
)  # fmt: skip


def task_of(name: str, method: str, demo: bool = False) -> Task:
    """A task, or the demo, with the settings of a method: "adalora", "lora" or "full"."""
    task = DEMO if demo else TASKS[name]
    one_phase = {"first_lr": 0.0, "first_steps": 0}
    if method == "lora":
        lr = task.settings.lr_adamw if demo else LORA_LR
        settings = task.settings._replace(lr_adamw=lr, alpha=LORA_ALPHA, **one_phase)
        return task._replace(settings=settings)
    if method == "full" and not demo:
        full = {"lr_adamw": FULL_LR_MNLI if name == "mnli" else FULL_LR, "lr_ivon": FULL_LR_IVON}
        full["epochs"] = FULL_EPOCHS.get(name, task.settings.epochs)
        return task._replace(settings=task.settings._replace(**full, **one_phase))
    return task


COLA_COLUMNS = ["source", "label", "star", "sentence"]  # its train.tsv and dev.tsv have no header


def load_task(
    task: str, data_dir: str | Path | None = None, splits: Collection[str] | None = None
) -> dict[str, "Dataset"]:
    """A task's splits: "train", "validation" (mnli: "…_matched", "…_mismatched"), and "test" if there is one.

    Columns: the task's `text`, "label" (class index, for stsb a float; −1 in a test split) and "idx".

    Args:
        data_dir: a folder in GLUE's own layout; without it, the Hub's copy.
        splits: which ones; only their files have to be there.

    A test file that has labels is read with them; one that has not, with its own numbers as "idx".

    Raises OSError where a file is missing or the Hub does not answer, ValueError ("file:line: what") where a
    file is not as it should be.
    """
    if data_dir is None:
        check_hub()  # before an import that takes seconds itself
    from datasets import Dataset, load_dataset

    if data_dir is None:
        try:
            loaded = dict(load_dataset(HUB_DATASET, task))
        except Exception as error:  # of half a dozen libraries
            raise ConnectionError(f"{HUB_DATASET} could not be loaded from the Hub: {error}") from error
        return loaded if splits is None else {split: loaded[split] for split in splits}
    folder, loaded = Path(data_dir) / TASKS[task].folder, {}
    for split in TASKS[task].splits if splits is None else splits:
        path = folder / f"{split.replace('validation', 'dev')}.tsv"
        if splits is None and split.startswith("test") and not path.exists():
            continue
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: the data folder needs GLUE's own layout, {path.parent.name}/{path.name}"
            )
        examples = list(read_examples(task, path, labelled=not split.startswith("test")))
        if not examples:
            raise ValueError(f"{path} has no examples")
        loaded[split] = Dataset.from_list(examples)
    return loaded


def check_hub() -> None:
    """Raise ConnectionError if the Hub does not answer within seconds; its own client goes on for minutes.

    Nothing is asked when HF_HUB_OFFLINE is set: then the local cache has to do.
    """
    from huggingface_hub import constants, get_session

    def knock() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            trouble.clear()
        except Exception as error:  # of the Hub's HTTP library, whichever that is
            trouble[:] = [str(error)]

    if constants.HF_HUB_OFFLINE:
        return
    trouble = ["no answer"]
    door = threading.Thread(target=knock, daemon=True)  # looking a name up has no timeout of its own
    door.start()
    door.join(HUB_SECONDS)
    if trouble:
        raise ConnectionError(f"the Hugging Face Hub ({constants.ENDPOINT}) cannot be reached: {trouble[0]}")


def read_examples(task: str, path: Path, labelled: bool = True) -> Iterator[dict]:
    """The examples of one of GLUE's TSV files, in order. Raises ValueError as `load_task` does.

    The files are not quoted: a quotation mark is a character like others. A byte-order mark, Windows line
    ends and a missing last line end are all found in copies of GLUE.
    """
    columns, text = TASKS[task].file_columns, TASKS[task].text
    *text_columns, label_column = columns
    rows = _rows(path)
    header = COLA_COLUMNS if task == "cola" and labelled else next(rows, (1, []))[1]
    labelled = labelled or label_column in header
    # Without labels the file's own numbers count, in a submission.
    numbers = None if labelled else next((name for name in ("index", "id") if name in header), None)
    wanted = columns if labelled else text_columns
    if absent := [column for column in wanted if column not in header]:
        raise ValueError(
            f"{path}:1: there is no column {absent[0]!r} in the header, which needs {', '.join(wanted)}"
        )
    cut_short = 0  # GLUE's qqp has a few rows with a line end in a question; no reader counts them
    for idx, (line, row) in enumerate(rows):
        if task == "qqp" and len(row) < len(header) and not numbers:
            cut_short += 1
            continue
        if len(row) != len(header):
            raise ValueError(
                f"{path}:{line}: {len(row)} columns where {len(header)} belong ({', '.join(header)})"
            )
        fields = dict(zip(header, row, strict=True))
        example = dict(zip(text, (fields[column] for column in text_columns), strict=True))
        try:
            example["label"] = _label(task, fields[label_column]) if labelled else -1
            number = int(fields[numbers]) if numbers else idx
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from None
        yield example | {"idx": number}
        if cut_short > 100:
            raise ValueError(f"{path}:{line}: the hundredth row with too few columns")
    if cut_short:
        log.warning("%s: left out %d rows that are cut short", path, cut_short)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number from 1, and fields. Only \\n ends a line; Unicode's other ends are a sentence's own."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            for line, row in enumerate(file, start=1):
                yield line, row.rstrip("\r\n").split("\t")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _label(task: str, written: str) -> int | float:
    """A label as the files write it → class index, or for stsb the number. ValueError if it is not one."""
    allowed = TASKS[task].file_labels
    if allowed:
        if written not in allowed:
            raise ValueError(f"{written!r} is not a label of {task} ({', '.join(allowed)})")
        return allowed.index(written)
    try:
        number = float(written)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 5:
        raise ValueError(f"{written!r} is not a score from 0 to 5")
    return number

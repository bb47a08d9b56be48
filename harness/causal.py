"""A causal language model as a classifier: its logits are those of the choices' tokens after a prompt.

[V] Cong et al., "Variational Low-Rank Adaptation Using IVON", 2024.
"""

import importlib.util
import inspect
import math
import sys

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

from harness import processes
from harness.task import Task, UsageError

# As config.json names them. Encoders that can also be decoders count as encoders.
CLASSES = {name for kind, name in CAUSAL.items() if kind not in MASKED}


def precision(base_dtype: str, device: str) -> dict:
    """How from_pretrained is told to hold the frozen weights. Raises UsageError."""
    if base_dtype != "int8":
        return {"dtype": getattr(torch, base_dtype)}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("--base_dtype int8 needs bitsandbytes: pip install bitsandbytes, or give bfloat16")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config, "dtype": torch.float16, "device_map": {"": device}}


def pad_left(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Pad on the left, so that the last position is the prompt's. Any token will do: padding is masked."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        if processes.rank() == 0:
            sys.stderr.write(f"{name} has no padding token: {tokenizer.pad_token} is used\n")


def choice_tokens(tokenizer: PreTrainedTokenizerBase, task: Task, name: str) -> list[int]:
    """The token of each choice after the prompt: with its leading space, unless that ends in white space.

    Raises UsageError unless each choice is a single token, and different from the others.
    """
    before, space = ("\n", "") if task.prompt[-1].isspace() else (":", " ")
    texts = [before, *(before + space + choice for choice in task.choices)]
    head, *wholes = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = [whole[-1] for whole in wholes]
    for choice, whole in zip(task.choices, wholes, strict=True):
        single = len(whole) == len(head) + 1 and whole[:-1] == head and whole[-1] != tokenizer.unk_token_id
        if not single or not choice.strip() or tokens.count(whole[-1]) > 1:
            what = f"{choice!r}, after a prompt that ends in {task.prompt[-1]!r}, is not a single token"
            raise UsageError(f"--model {name}: {what} unlike the others (--choices, for your own data)")
    return tokens


def answer_by_choosing(model: PreTrainedModel, tokens: list[int]) -> None:
    """From here on the model's logits are those of `tokens` at the last position: (n, choices).

    It takes input_ids and attention_mask (n, length), padded on the left, and options (n,): how many choices
    each example has. The logits of the others are −∞. Only the last position's are computed. Source: [V].
    """
    model.register_buffer("choice_tokens", torch.tensor(tokens, device=model.device), persistent=False)
    forward, counts = model.forward, "position_ids" in inspect.signature(model.forward).parameters

    def choose(input_ids: Tensor, attention_mask: Tensor, options: Tensor) -> SequenceClassifierOutput:
        own = {"position_ids": (attention_mask.cumsum(1) - 1).clamp_min(0)} if counts else {}
        own |= {"use_cache": False, "logits_to_keep": 1}
        output = forward(input_ids=input_ids, attention_mask=attention_mask, **own)
        logits = output.logits[:, -1].index_select(1, model.choice_tokens).float()
        absent = torch.arange(len(tokens), device=logits.device) >= options.unsqueeze(1)
        return SequenceClassifierOutput(logits=logits.masked_fill(absent, -math.inf))

    model.forward = choose

"""A checkpoint, from the Hub or a folder → tokenizer and model; adapters around its linear maps.

An encoder gets a head; what a causal language model gets instead is in causal.py.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from adalora import HEADS, in_head, inject, linear_maps
from harness import causal
from harness.glue import check_hub
from harness.settings import Settings
from harness.task import Task, UsageError

# The linear maps to adapt, by the architecture's name in its config.json.
BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
TARGETS = {
    "deberta-v2": ["query_proj", "key_proj", "value_proj", *BERT[3:]],  # DeBERTaV3 too
    "bert": BERT,
    "roberta": BERT,
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "causal": ["q_proj", "v_proj"],  # any causal language model
}
TOKENIZER_FILES = ("tokenizer.json", "spm.model", "vocab.txt", "vocab.json", "*.model")


def load_model(settings: Settings, task: Task) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model, whose logits are (n, task.outputs): an encoder with a head, which is new and
    random, and so depends on torch's seed; or a causal language model that answers a prompt by choosing.

    No code of the checkpoint is run. Raises UsageError, or ConnectionError if the Hub does not answer.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name, own = settings.model, {"trust_remote_code": False}
    _check_checkpoint(name)
    try:
        config = transformers.AutoConfig.from_pretrained(name, **own)
        choosing = not causal.CLASSES.isdisjoint(config.architectures or ())
        check_can_do(settings, task, choosing)
        if choosing:
            auto = transformers.AutoModelForCausalLM
            how = causal.precision(settings.base_dtype, settings.device)
        else:  # in float32 whatever the checkpoint is stored in: DeBERTaV3's float16 does not train
            auto = transformers.AutoModelForSequenceClassification
            how = {"dtype": torch.float32, "num_labels": task.outputs, "ignore_mismatched_sizes": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **own)
        model, report = auto.from_pretrained(name, **own, **how, output_loading_info=True)
        if settings.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    except UsageError:
        raise
    except Exception as error:  # a damaged checkpoint makes the libraries raise all sorts of things
        kind = UsageError if Path(name).is_dir() else ConnectionError
        where = "" if Path(name).is_dir() else " is no folder here, and"
        raise kind(f"--model {name}{where} cannot be loaded: {error}") from error
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if absent := sorted(key for key in absent if choosing or not in_head(key)):
        raise UsageError(f"--model {name} lacks weights: {absent[0]} is missing or misshapen")
    highest, weights = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if highest >= weights:
        raise UsageError(f"--model {name}: the tokenizer has a token {highest}, the model embeds {weights}")
    if choosing:
        causal.answer_by_choosing(model, causal.choice_tokens(tokenizer, task, name))
        causal.pad_left(tokenizer, name)
    if tokenizer.pad_token is None:
        raise UsageError(f"--model {name}: the tokenizer has no padding token")
    return tokenizer, model


def check_can_do(settings: Settings, task: Task, choosing: bool) -> None:
    """Raise UsageError for a task that an encoder, or a causal language model, cannot do."""
    s = settings
    if choosing and not task.prompt:
        what = "has no prompt: give --prompt" if task.labels else "is a regression: use an encoder"
        raise UsageError(f"--model {s.model} is a causal language model, and {task.name} {what}")
    if not choosing and not task.text:
        raise UsageError(f"--model {s.model} is an encoder: {task.name} needs a causal language model")
    if not choosing and s.prompt:
        raise UsageError(f"--model {s.model} is an encoder, which reads no --prompt: leave it out")
    if s.base_dtype != "float32" and (not choosing or s.method == "full"):
        raise UsageError(f"--base_dtype {s.base_dtype} is for adapters in a causal language model")


def _check_checkpoint(name: str) -> None:
    if Path(name).is_dir():  # transformers reports other files that are missing; a tokenizer it makes up
        if not any(any(Path(name).glob(pattern)) for pattern in TOKENIZER_FILES):
            raise UsageError(f"--model {name} has no tokenizer: no {' or '.join(TOKENIZER_FILES)}")
    elif len(Path(name).parts) > 2 or name.startswith((".", "~")):
        raise UsageError(f"--model {name} does not exist: give a checkpoint folder, or a name on the Hub")
    else:
        check_hub()


def is_causal(model: PreTrainedModel) -> bool:
    """Whether it answers a prompt by choosing, as causal.py has it."""
    return type(model).__name__ in causal.CLASSES


def default_targets(model: PreTrainedModel) -> list[str] | None:
    return TARGETS.get("causal" if is_causal(model) else model.config.model_type)


def adapt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> dict[str, nn.Module]:
    """Put adapters into the model, freeze the rest but an encoder's head, and move it to the device.

    Returns the adapters by name; {} for full fine-tuning, which freezes nothing. Raises UsageError.
    """
    narrow_relative_positions(model)
    layers, config, rank = {}, model.config, settings.init_rank
    if settings.method != "full":
        if settings.targets is None:
            maps = ", ".join(linear_maps(model))
            raise UsageError(f"give --targets: the linear maps of this {config.model_type} model are {maps}")
        kind, flag = ("svd", "init_rank") if settings.method == "adalora" else ("lora", "target_rank")
        widest = max(min(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear))
        if rank > widest:
            raise UsageError(f"--{flag} {rank} is above the largest possible rank, {widest}")
        try:
            layers = inject(model, settings.targets, rank, settings.alpha, settings.dropout, kind)
        except ValueError as error:
            raise UsageError(f"--targets: {error}") from None
    for name, p in model.named_parameters():
        if in_head(name) and not settings.causal:
            p.requires_grad_(True)
    if settings.causal and layers and round(settings.target_rank * len(layers)) == 0:
        few = f"--target_rank {settings.target_rank:g} with {len(layers)} adapters"
        raise UsageError(f"{few} leaves nothing to train: a causal language model has no head")
    limits = getattr(config, "max_position_embeddings", None), tokenizer.model_max_length
    longest = min((n for n in limits if isinstance(n, int)), default=math.inf)
    if settings.max_length > longest:
        raise UsageError(f"--max_length {settings.max_length} is above the model's {longest} tokens")
    if settings.bf16:  # the backbone's products; adapters, head and losses stay in float32
        device = torch.device(settings.device).type
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
        for name, module in model.named_modules():
            if name.split(".")[-1] in HEADS:
                module.forward = torch.autocast(device, enabled=False)(module.forward)
    if settings.base_dtype != "int8":  # which is there already
        model.to(settings.device)
    return layers


def check_forward_backward(
    model: PreTrainedModel, name: str, train: BatchEncoding, evaluation: Iterable[BatchEncoding]
) -> None:
    """A forward pass over each batch, and a backward pass of the one to train on; nothing random happens.

    Raises UsageError where the model cannot.
    """
    params, training = [p for p in model.parameters() if p.requires_grad], model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = [model(**inputs.to(model.device)).logits for inputs in evaluation]
        logits.append(model(**train.to(model.device)).logits)
        torch.autograd.grad(logits[-1].sum(), params, allow_unused=True)
        finite = all(x.softmax(-1).isfinite().all() for x in logits)  # −∞ is a choice that is absent
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever parts that do not fit make a model raise
        what = f"of at most {train['input_ids'].shape[1]} tokens: {type(error).__name__}: {error}"
        raise UsageError(f"--model {name} does not work on texts {what}") from error
    if not finite:
        raise UsageError(f"--model {name}: its predictions are not finite")
    model.train(training)


def count_parameters(model: nn.Module) -> int:
    """What is trained, without the head."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not in_head(name))


# ---- DeBERTa's relative positions ----------------------------------------------------------------------


def narrow_relative_positions(model: nn.Module) -> None:
    """Let DeBERTaV2's and V3's attention compute only with relative positions that occur.

    Transformers multiplies all tokens with the embeddings of all 2k buckets of distances, −k to k − 1 (in V3
    k = 256), and then selects; with adapters on query and key all of that has a backward pass, too. But n
    tokens are less than n apart: 2·min(n, k) buckets are enough. Only dropout's choice of entries changes.
    Nothing happens to other models.
    """
    for module in model.modules():
        if not (hasattr(module, "disentangled_attention_bias") and module.relative_attention):
            continue
        # From k/2 on buckets are logarithmic. If the largest distance is e·k/2 or more, here with a margin,
        # no bucket's number is above its distance.
        if module.max_relative_positions > 1.5 * module.position_buckets:
            module.register_forward_pre_hook(_use_near_positions, with_kwargs=True)


def _use_near_positions(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Of the embeddings (2k, d) those of buckets −n to n − 1."""
    embeddings = kwargs["rel_embeddings"]
    k = len(embeddings) // 2
    n = min(args[0].shape[1], k)  # tokens (batch, n, d)
    attention.pos_ebd_size = n
    return args, kwargs | {"rel_embeddings": embeddings[k - n : k + n]}

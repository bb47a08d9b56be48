"""The README's example, run as it stands there, on transformers' causal language models."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, Qwen2Config

from adalora import SVDLinear


@pytest.mark.parametrize(
    "architecture",
    [LlamaConfig, *(pytest.param(other, marks=pytest.mark.slow) for other in (OPTConfig, Qwen2Config))],
)
def test_the_readmes_example_trains_any_causal_language_model_and_predicts_from_its_posterior(architecture):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme[readme.index("## Outside GLUE") :]
    example = section[section.index("```python") + len("```python") :]
    example = example[: example.index("```")]
    assert len(example.strip().splitlines()) < 40
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 48, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(architecture(**sizes, max_position_embeddings=32))
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    sequences = (torch.randint(12, (320, 1)) + 5 * torch.arange(8)) % 12  # a language with one rule
    batches = [sequences[torch.randperm(320)[:16]] for _ in range(300)]
    given = {"model": model, "batches": batches, "prompt": sequences[:, :7]}
    with torch.no_grad():
        before = model(input_ids=sequences, labels=sequences).loss
        unlearnt = model(input_ids=sequences[:, :7]).logits[:, -1].softmax(-1)
    exec(example, given)
    with torch.no_grad():
        after = model(input_ids=sequences, labels=sequences).loss
    assert after < before - 0.15
    names = [name for name, module in model.named_modules() if isinstance(module, SVDLinear)]
    assert sorted(name.rpartition(".")[2] for name in names) == ["q_proj"] * 2 + ["v_proj"] * 2
    assert sum(given["allocator"].ranks().values()) == 2 * len(names) == 8
    probabilities = given["probabilities"]
    assert probabilities.shape == (320, 12)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(320))
    nll, nll_before = (-p[torch.arange(320), sequences[:, 7]].log().mean() for p in (probabilities, unlearnt))
    assert nll < nll_before
    now = dict(model.named_parameters())
    for name, p in frozen.items():
        q = now.get(name, now.get(name.replace(".weight", ".base.weight").replace(".bias", ".base.bias")))
        assert torch.equal(p, q)

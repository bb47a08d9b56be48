"""Make what `run_glue.py --demo` runs on: an acceptability task and a small pre-trained encoder.

    python demo/make_demo.py             # everything again, some minutes on two cores
    python demo/make_demo.py --seed 1    # other sentences, other weights

Written beside this file, when all of it is made:

    CoLA/train.tsv, CoLA/dev.tsv   in CoLA's own format, without a header: source (here the phenomenon), label
                                   (1 acceptable, 0 not), the star of a 0, the sentence
    model/config.json              DeBERTaV3's configuration, made small
    model/tokenizer_config.json    as on the Hub
    model/spm.model                SentencePiece, DeBERTaV3's special tokens at 0 to 3
    model/pytorch_model.bin        the encoder's float16 weights, named as on the Hub

The sentences come from the small English grammar below. A phenomenon crosses two choices, such as the number
of the subject and that of the verb, and a sentence is acceptable when they match: no single word tells its
label. Every fourth word of each class is kept out of train. It occurs in dev and, used grammatically, in the
unlabelled sentences on which the encoder learns to fill in masked words.
"""

import argparse
import io
import json
import random
import tempfile
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

HERE = Path(__file__).resolve().parent
N_TRAIN, N_DEV, N_TEXT = 2400, 600, 40_000
ACCEPTABLE = 0.65  # share of label 1; in CoLA 0.70
PIECES = 400
STEPS, BATCH, LR, WARMUP = 3000, 64, 2e-3, 200
CHOSEN, MASKED, REPLACED = 0.25, 0.5, 0.3  # of the tokens, and of the chosen ones; the rest of those stay
CONFIG = {"model_type": "deberta-v2", "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 3}
CONFIG |= {"num_attention_heads": 4, "intermediate_size": 256, "max_position_embeddings": 512}
CONFIG |= {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "hidden_act": "gelu"}
CONFIG |= {"relative_attention": True, "position_buckets": 32, "max_relative_positions": -1}
CONFIG |= {"norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p"}
CONFIG |= {"position_biased_input": False, "type_vocab_size": 0}
CONFIG |= {"layer_norm_eps": 1e-7, "initializer_range": 0.02}
SPECIAL = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}  # the tokenizer itself adds [MASK]

# Nouns take -s; verbs take -s, -ed and -ing.
LEXICON = {
    "he": "boy king uncle brother actor lord waiter wizard",
    "she": "girl queen aunt sister nun mother daughter widow",
    "person": "doctor singer teacher pilot clerk farmer sailor painter",
    "thing": "book letter lamp hat cup ring coat map",
    "he_name": "John Peter Paul Henry",
    "she_name": "Mary Anna Susan Emma",
    "adjective": "old small famous tall young strange quiet gentle",
    "intransitive": "yawn vanish faint blush arrive wait snore sneeze",
    "transitive": "praise admire examine avoid protect ignore detest describe",
    "ditransitive": "offer hand mail award",
}
HOLD_OUT = 4  # every fourth word of a class is kept out of train
TENSES = {"ed": ("has", "have"), "": ("will", "will"), "ing": ("is", "are")}  # form → auxiliary by number
DETERMINERS = (("this", "that", "every"), ("these", "those", "many"))
REFLEXIVES = {"he": "himself", "she": "herself", "they": "themselves"}
PEOPLE = ("he", "she", "person")
PHENOMENA = (
    "agreement",
    "determiner",
    "verb_form",
    "arguments",
    "reflexive",
    "order",
    "question",
    "polarity",
)
Words = list[str]


def inflect(verb: str, form: str) -> str:
    """The form "", "s", "ed" or "ing" of a verb."""
    if form == "s":
        return verb + ("es" if verb.endswith("sh") else "s")
    return verb.removesuffix("e") + form if form else verb


class Grammar:
    """Draws sentences over a lexicon: a phenomenon is the method of its name, told whether to be right."""

    def __init__(self, lexicon: dict[str, Words], rng: random.Random):
        self.lexicon, self.rng = lexicon, rng

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def word(self, *classes: str) -> str:
        return self.rng.choice(self.lexicon[self.rng.choice(classes)])

    def phrase(self, number: int, *classes: str, determiner: str = "the") -> Words:
        """Determiner, perhaps an adjective, and a noun: singular for number 0, plural for 1."""
        adjective = [self.word("adjective")] if self.chance(0.25) else []
        return [determiner, *adjective, self.word(*classes) + "s" * number]

    def subject(self, number: int) -> Words:
        """People, perhaps with others beside them that the verb has nothing to do with."""
        beside = ["near", *self.phrase(self.rng.randrange(2), *PEOPLE)] if self.chance(0.3) else []
        return [*self.phrase(number, *PEOPLE), *beside]

    def thing(self) -> Words:
        return self.phrase(self.rng.randrange(2), "thing")

    def agreement(self, ok: bool) -> Words:
        """The verb has the number of its subject, whatever stands between them."""
        number = self.rng.randrange(2)
        verb = inflect(self.word("transitive"), "s" if (number == 0) == ok else "")
        return [*self.subject(number), verb, *self.thing()]

    def determiner(self, ok: bool) -> Words:
        """A determiner has the number of its noun."""
        number = self.rng.randrange(2)
        determiner = self.rng.choice(DETERMINERS[number if ok else 1 - number])
        return [
            *self.phrase(number, *PEOPLE, determiner=determiner),
            inflect(self.word("intransitive"), "ed"),
        ]

    def verb_form(self, ok: bool) -> Words:
        """The auxiliary decides the form of the verb."""
        number, form = self.rng.randrange(2), self.rng.choice(list(TENSES))
        auxiliary = TENSES[form][number]
        if not ok:
            form = self.rng.choice([other for other in TENSES if other != form])
        return [*self.subject(number), auxiliary, inflect(self.word("intransitive"), form)]

    def arguments(self, ok: bool) -> Words:
        """A verb has the objects that its class asks for."""
        objects = {"intransitive": [], "transitive": self.thing()}
        objects["ditransitive"] = [*self.phrase(self.rng.randrange(2), *PEOPLE), *self.thing()]
        verb = frame = self.rng.choice(list(objects))
        if not ok:  # "the boy offered the lamp" would be fine
            wrong = {"intransitive": ["transitive"], "transitive": ["intransitive"]}
            verb = self.rng.choice(wrong.get(frame, ["intransitive", "transitive"]))
        return [*self.subject(self.rng.randrange(2)), inflect(self.word(verb), "ed"), *objects[frame]]

    def reflexive(self, ok: bool) -> Words:
        """A reflexive agrees with its subject, not with a noun nearer to it."""
        kind, other = self.rng.sample(list(REFLEXIVES), 2)
        heads = [self.phrase(1, *PEOPLE) if k == "they" else self.phrase(0, k) for k in (kind, other)]
        if kind != "they" and self.chance(0.3):
            heads[0] = [self.word(f"{kind}_name")]
        beside = ["near", *heads[1]] if self.chance(0.3) else []
        verb = inflect(self.word("transitive"), "ed")
        return [*heads[0], *beside, verb, REFLEXIVES[kind if ok else other]]

    def order(self, ok: bool) -> Words:
        """Determiner, adjective, noun; auxiliary, verb, object."""
        words = ["the", self.word("adjective"), self.word(*PEOPLE), "will"]
        words += [inflect(self.word("transitive"), ""), *self.thing()]
        if not ok:
            i = self.rng.choice((1, 3, 4))
            words[i], words[i + 1] = words[i + 1], words[i]
        return words

    def question(self, ok: bool) -> Words:
        """`What` takes the place of the object, and no object is left out without it."""
        what = self.chance(0.5)
        start = ["what", "did"] if what else ["did"]
        rest = [*self.subject(self.rng.randrange(2)), inflect(self.word("transitive"), "")]
        return [*start, *rest, *([] if what == ok else self.thing()), "?"]

    def polarity(self, ok: bool) -> Words:
        """`Ever` needs a negative subject; a negative word inside the subject will not do."""
        number = self.rng.randrange(2)
        outer, inner = ("no", "the") if ok else ("the", "no")
        subject = self.phrase(number, *PEOPLE, determiner=outer)
        beside = ["near", *self.phrase(self.rng.randrange(2), *PEOPLE, determiner=inner)]
        return [*subject, *beside, ("has", "have")[number], "ever", inflect(self.word("intransitive"), "ed")]

    def sentence(self, phenomenon: str, ok: bool) -> str:
        """As it is written: a capital at the start and a stop at the end."""
        words = getattr(self, phenomenon)(ok)
        text = " ".join(words).replace(" ?", "?")
        return text[0].upper() + text[1:] + "." * (words[-1] != "?")


def draw_task(grammar: Grammar, n: int, seen: set[str]) -> str:
    """`n` labelled sentences that are not in `seen`, as a CoLA file; they are added to `seen`."""
    rows: Words = []
    while len(rows) < n:
        phenomenon, ok = PHENOMENA[len(rows) % len(PHENOMENA)], grammar.chance(ACCEPTABLE)
        text = grammar.sentence(phenomenon, ok)
        if text not in seen:
            seen.add(text)
            rows.append(f"{phenomenon}\t{int(ok)}\t{'' if ok else '*'}\t{text}\n")
    grammar.rng.shuffle(rows)
    return "".join(rows)


def draw_text(grammar: Grammar, n: int, seen: set[str]) -> Words:
    """`n` different acceptable sentences that are not in `seen`."""
    texts: dict[str, None] = {}
    while len(texts) < n:
        text = grammar.sentence(grammar.rng.choice(PHENOMENA), ok=True)
        if text not in seen:
            texts[text] = None
    return list(texts)


def train_pieces(texts: Words) -> bytes:
    """A SentencePiece model with DeBERTaV3's special tokens, as its file's bytes."""
    model = io.BytesIO()
    specials = {f"{name}_piece": piece for name, piece in SPECIAL.items()}
    specials |= {f"{name}_id": i for i, name in enumerate(SPECIAL)}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=PIECES, hard_vocab_limit=False,
        character_coverage=1.0, num_threads=1, minloglevel=2, **specials,
    )  # fmt: skip
    return model.getvalue()


def corrupt(ids: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """`ids` (n, length) with some tokens masked or replaced by others of the batch; and which were chosen."""
    ordinary = ids > 3
    chosen = ordinary & (torch.rand(ids.shape) < CHOSEN)
    fate = torch.rand(ids.shape)
    others = ids[ordinary]
    inputs = ids.masked_fill(chosen & (fate < MASKED), mask_id)
    replaced = chosen & (fate >= MASKED) & (fate < MASKED + REPLACED)
    inputs[replaced] = others[torch.randint(len(others), (int(replaced.sum()),))]
    return inputs, chosen


def pretrain(texts: Words, tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Masked language modelling; the encoder's float16 weights as a PyTorch file's bytes."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = DebertaV2Model(DebertaV2Config(**CONFIG | no_dropout)).train()
    head = nn.Linear(CONFIG["hidden_size"], CONFIG["vocab_size"])
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    encoded = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
    progress = tqdm(range(STEPS), desc="pre-training", mininterval=1)
    for step in progress:
        batch = [encoded[i] for i in torch.randint(len(encoded), (BATCH,))]
        ids = nn.utils.rnn.pad_sequence(batch, batch_first=True)  # [PAD] is 0
        inputs, chosen = corrupt(ids, tokenizer.mask_token_id)
        hidden = encoder(input_ids=inputs, attention_mask=(ids != 0).long()).last_hidden_state
        loss = F.cross_entropy(head(hidden[chosen]), ids[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    weights = io.BytesIO()
    torch.save({f"deberta.{name}": w.half() for name, w in encoder.state_dict().items()}, weights)
    return weights.getvalue()


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    rng = random.Random(seed)
    torch.manual_seed(seed)

    lexicon = {name: words.split() for name, words in LEXICON.items()}
    known = {name: [w for i, w in enumerate(words, 1) if i % HOLD_OUT] for name, words in lexicon.items()}
    seen: set[str] = set()
    files: dict[str, str | bytes] = {}
    files["CoLA/train.tsv"] = draw_task(Grammar(known, rng), N_TRAIN, seen)
    files["CoLA/dev.tsv"] = draw_task(Grammar(lexicon, rng), N_DEV, seen)
    texts = draw_text(Grammar(lexicon, rng), N_TEXT, seen)
    files["model/config.json"] = json.dumps(CONFIG, indent=2) + "\n"
    files["model/tokenizer_config.json"] = json.dumps({"do_lower_case": False, "vocab_type": "spm"}) + "\n"
    files["model/spm.model"] = train_pieces(texts)
    with tempfile.TemporaryDirectory() as folder:  # a tokenizer is read from a folder
        for name, content in files.items():
            write(Path(folder) / name, content)
        tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "model")
    files["model/pytorch_model.bin"] = pretrain(texts, tokenizer)
    for name, content in files.items():
        write(HERE / name, content)


if __name__ == "__main__":
    main()

"""Small parts that tests run on: a backbone with its tokenizer, and a collection."""

import copy
import json
import random
from contextlib import contextmanager

import pandas
import pytest
import torch
from sentence_transformers import SparseEncoder
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from anysplade import Collection, Document, Pair, write_collection
from anysplade.model.encoder import build_encoder
from architectures import small_model

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
WORDS = [
    a + b
    for a in ["ka", "lo", "mi", "nu", "pe", "ra", "so", "tu", "va", "we", "xi", "yo", "zu", "ba", "ce", "do", "fe", "gi"]
    for b in ["bel", "cor", "dan", "fil", "gor", "han", "jim", "kop"]
]


def make_tokenizer():
    vocabulary = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def make_tokenizer_of(size, **names):
    """A tokenizer with this many tokens; names replace its special tokens."""
    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = list(state["model"]["vocab"])[:size]
    words += [f"word{i}" for i in range(size - len(words))]
    state["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    known = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)} | names
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), **{name: token for name, token in known.items() if token}
    )


def make_backbone(architecture, folder, **overrides):
    """Save a small random masked LM with its tokenizer; returns the folder as a string."""
    tokenizer = make_tokenizer()
    model = small_model(architecture, **{"vocab_size": len(tokenizer)} | overrides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_lexical(folder):
    """Save a masked LM that is a trained SPLADE in effect: each token gives its own term and no other; returns the folder."""
    size = len(SPECIAL + WORDS) + 3  # the width holds a direction for each term
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": size + size % 2, "num_attention_heads": 2, "hidden_dropout_prob": 0.0}
    model = small_model("bert", vocab_size=len(tokenizer), **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1)
        model.bert.embeddings.word_embeddings.weight.copy_(torch.eye(len(tokenizer), model.config.hidden_size))
        model.cls.predictions.transform.dense.weight.copy_(torch.eye(model.config.hidden_size))
        model.cls.predictions.bias.fill_(-4)
        model.cls.predictions.bias[: len(SPECIAL)] = -100
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_static(folder, tokenizer=None, query_encoder="idf", prompt=""):
    """Save an encoder whose queries have a weight a token, "idf" or "static"; returns the folder as a string."""
    tokenizer = tokenizer or make_tokenizer()
    backbone = make_backbone("bert", folder / "backbone", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(backbone)
    texts = ["kabel lodan", "mifil kabel river flood", "lodan"]
    encoder, _ = build_encoder(backbone, 1, 0, query_encoder=query_encoder, idf_texts=texts)
    encoder.prompts["query"] = prompt
    encoder.save_pretrained(str(folder / "model"))
    return str(folder / "model")


def make_repository(folder, tables, split="train"):
    """A dataset repository as on the hub: a folder of Parquet for each config, named in README.md."""
    configs = []
    for name, table in tables.items():
        (folder / name).mkdir(parents=True)
        pandas.DataFrame(table).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
        configs += [f"- config_name: {name}", "  data_files:", f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *configs, "---", ""]))


def make_collection(folder, documents=40):
    """Documents of random words; a query is three words of its document."""
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=12)) for _ in range(documents)]
    corpus = {f"d{i}": Document("", text) for i, text in enumerate(texts)}
    queries = {f"q{i}": " ".join(generator.sample(texts[i].split(), 3)) for i in range(documents // 2)}
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(documents // 2)}
    pairs = [Pair(" ".join(generator.sample(text.split(), 3)), text) for text in texts]
    write_collection(folder, Collection("tiny", corpus, queries, qrels), pairs)
    return folder


def counted_copy(copies):
    """A ``__deepcopy__`` that copies as usual and notes in a list what was copied."""

    def deepcopy(model, memo):
        copies.append(model)
        copied = memo[id(model)] = type(model).__new__(type(model))
        copied.__dict__.update(copy.deepcopy(model.__dict__, memo))
        return copied

    return deepcopy


@contextmanager
def no_encoder():
    """A time in which no encoder can be loaded."""

    def fail(*_, **__):
        raise AssertionError("the encoder was loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseEncoder, "__init__", fail)
        yield

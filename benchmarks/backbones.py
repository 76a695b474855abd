"""Backbones of real sizes with random weights, and texts for them, to measure speed, which does not depend on the weights."""

import random
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from anysplade import load_encoder


def _sizes(width: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (width, intermediate, layers, heads), strict=True))


_SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
_IDS = {"pad_token_id": 0, "cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
_XLM_R = {"vocab_size": 250_002, "max_position_embeddings": 514, **_IDS}
GEOMETRIES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "ettin-17m": (ModernBertForMaskedLM, ModernBertConfig(vocab_size=50_368, **_sizes(256, 384, 7, 4), **_IDS)),
    # As many parameters per layer as Ettin-17M, in the architecture that most runtimes support.
    "bert-17m": (BertForMaskedLM, BertConfig(vocab_size=50_368, pad_token_id=0, **_sizes(256, 576, 7, 4))),
    "minilm": (BertForMaskedLM, BertConfig(vocab_size=30_522, pad_token_id=0, **_sizes(384, 1536, 6, 12))),
    "bert-tiny": (BertForMaskedLM, BertConfig(vocab_size=30_522, pad_token_id=0, **_sizes(128, 512, 2, 2))),
    "bert-base": (BertForMaskedLM, BertConfig(vocab_size=30_522, pad_token_id=0)),
    "xlm-r-base": (XLMRobertaForMaskedLM, XLMRobertaConfig(**_XLM_R)),
    "xlm-r-minilm": (XLMRobertaForMaskedLM, XLMRobertaConfig(**_XLM_R, **_sizes(384, 1536, 12, 12))),
}


def save_backbone(geometry: str, folder: Path) -> str:
    """Save a checkpoint with a tokenizer whose tokens are the words ``w5``, ``w6``, ...; returns its folder."""
    torch.manual_seed(0)
    kind, config = GEOMETRIES[geometry]
    model = kind(config)
    vocabulary = {token: i for i, token in enumerate(_SPECIAL)} | {f"w{i}": i for i in range(5, model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token", "mask_token"), _SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def random_texts(lengths: list[int], vocabulary: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(f"w{generator.randrange(5, vocabulary)}" for _ in range(length)) for length in lengths]


def sparse_encoder(backbone: str, texts: list[str], active_dims: int, device: str = "cpu") -> SparseEncoder:
    """A SPLADE encoder on a random backbone, its head shifted until these texts have this number of active dims on average."""
    raw = load_encoder(backbone, k=1, shift=0).to(device)
    pooled = torch.expm1(raw.encode(texts, convert_to_sparse_tensor=False)).flatten()
    return load_encoder(backbone, k=1, shift=pooled.topk(len(texts) * active_dims).values[-1].item())

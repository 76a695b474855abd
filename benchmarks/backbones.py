"""Backbones of real sizes with random weights, and texts for them, to measure speed, which does not depend on the weights."""

import random
from pathlib import Path

import torch
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

GEOMETRIES = ("ettin-17m", "bert-17m", "minilm", "bert-base", "xlm-r-base", "xlm-r-minilm")
_SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]


def random_model(geometry: str) -> PreTrainedModel:
    ids = {"pad_token_id": 0, "cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
    if geometry == "ettin-17m":
        config = ModernBertConfig(
            vocab_size=50_368, hidden_size=256, intermediate_size=384, num_hidden_layers=7, num_attention_heads=4, **ids
        )
        return ModernBertForMaskedLM(config)
    if geometry == "bert-base":
        return BertForMaskedLM(BertConfig(vocab_size=30_522, pad_token_id=0))
    if geometry == "bert-17m":  # as many parameters per layer as Ettin-17M, in the architecture that most runtimes support
        sizes = {"hidden_size": 256, "intermediate_size": 576, "num_hidden_layers": 7, "num_attention_heads": 4}
        return BertForMaskedLM(BertConfig(vocab_size=50_368, pad_token_id=0, **sizes))
    if geometry == "minilm":
        small = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
        return BertForMaskedLM(BertConfig(vocab_size=30_522, pad_token_id=0, **small))
    sizes = {} if geometry == "xlm-r-base" else {"hidden_size": 384, "intermediate_size": 1536}
    return XLMRobertaForMaskedLM(XLMRobertaConfig(vocab_size=250_002, max_position_embeddings=514, **sizes, **ids))


def save_backbone(geometry: str, folder: Path) -> str:
    """Save a checkpoint with a tokenizer whose tokens are the words ``w5``, ``w6``, ...; returns its folder."""
    torch.manual_seed(0)
    model = random_model(geometry)
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

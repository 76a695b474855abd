"""Tokenizers of each kind of cased vocabulary, small enough to be read, and backbones that have them."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from architectures import small_model

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
# A byte-level vocabulary in the order in which it was learned. Ġ is a space, Ċ a new line, Ã and © are the two bytes of é.
LETTERS = [*"ĠgohewGt1iynPpsITN().,!+Ċ", "Ã", "©"]
MERGES = [
    "i n", "in g", "Ġ p", "Ġp y", "p y", "Ġ P", "ĠP y", "P y", "Ġ in", "Ġin g", "g o", "go ing", "I N", "IN G", "Ġ g", "Ġg o",
    "Ġgo ing", "Ġ G", "ĠG o", "Ġ (", "Ġ )", "h e", "t he", "1 1", "Ġ 1", "Ġ1 1", "n p", "n py", "Ã ©",
]  # fmt: skip
PIECES = ["▁the", "▁py", "▁Py", "▁", "s", "▁s", "▁你好", "你好", "好", "py", "▁(", "(", ")", "▁كتاب", "كتاب", "１", "▁1"]
CASED_WORDS = [
    "python",
    "Python",
    "PYTHON",
    "##ing",
    "##ING",
    "ing",
    "go",
    "Go",
    "link",
    "links",
    "Linking",
    "(",
    ")",
    ",",
    "##s",
    "1",
    "café",
    "Café",
]


def byte_level():
    """RoBERTa's and ModernBERT's kind."""
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    tokens = [*SPECIAL, *LETTERS, *dict.fromkeys("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer)


def sentence_pieces():
    """XLM-R's kind."""
    scored = [(token, 0.0) for token in SPECIAL] + [(piece, -float(i)) for i, piece in enumerate(PIECES)]
    tokenizer = Tokenizer(models.Unigram(scored, 3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return wrapped(tokenizer)


def word_pieces():
    """BERT's kind."""
    tokens = {token: id_ for id_, token in enumerate([*SPECIAL, *CASED_WORDS])}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return wrapped(tokenizer)


def wrapped(tokenizer):
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def make_cased(architecture, folder, tokenizer, **overrides):
    """Save a small random masked LM with one of these tokenizers; returns the folder as a string."""
    small_model(architecture, **{"vocab_size": len(tokenizer)} | overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

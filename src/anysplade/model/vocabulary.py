"""The entries of a vocabulary as people write them: words, and pieces that continue a word.

Tokenizers mark where a word begins, each kind in its own way: byte-level BPE (RoBERTa, ModernBERT) and SentencePiece (XLM-R)
mark the space before it, WordPiece (BERT) marks the pieces that continue it.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece

from anysplade.data.sources import is_utf8
from anysplade.errors import DataError

_SPACE = "▁"  # SentencePiece's mark of a space, and that of punctuation after a space in names
_PIECE = "##"  # WordPiece's mark of a piece, and that of pieces in names


class Entry(NamedTuple):
    """An entry that is text."""

    text: str  # without marks; not empty, no white space in it
    begins: bool  # a word, as far as the marks say
    id: int


def read_entries(tokenizer: Tokenizer, size: int) -> list[Entry]:
    """The entries of a vocabulary that are text, with ids up to ``size``.

    Left out is what is no text by itself: special tokens, white space, a part of a character's bytes, and ids without a token.
    """
    decoders = set(_kinds(tokenizer.decoder))
    known = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    entries = []
    for id_, token in enumerate(read_tokens(tokenizer, size)):
        text, begins = token or "", True
        if "ByteLevel" in decoders:
            text = _from_bytes(text)
            begins, text = text.startswith(" "), text.removeprefix(" ")
        elif "Metaspace" in decoders:
            begins, text = text.startswith(_SPACE), text.removeprefix(_SPACE)
        elif isinstance(tokenizer.model, WordPiece) and text != _PIECE:
            begins, text = not text.startswith(_PIECE), text.removeprefix(_PIECE)
        usable = id_ not in known and text.split() == [text] and is_utf8(text) and "\N{REPLACEMENT CHARACTER}" not in text
        if usable:
            entries.append(Entry(text, begins, id_))
    return entries


def read_tokens(tokenizer: Tokenizer, size: int) -> list[str | None]:
    """The token of each id up to ``size``, None where there is none: a head can be wider than its tokenizer's vocabulary."""
    return [tokenizer.id_to_token(id_) for id_ in range(size)]


def marks_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the space before a word is marked, so that a word without one is written like a piece: ``(word``."""
    return not {"ByteLevel", "Metaspace"}.isdisjoint(_kinds(tokenizer.decoder))


def right_halves(tokenizer: Tokenizer) -> set[str] | None:
    """Tokens that the merges of a BPE vocabulary append to another one that is no mere space; None for other kinds."""
    if not isinstance(tokenizer.model, BPE):
        return None
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    halves = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return {right for left, right in halves if left not in ("Ġ", _SPACE)}


def has_letters(text: str) -> bool:
    """Whether a letter or a digit is in it."""
    return any(map(str.isalnum, text))


def is_punctuation(text: str) -> bool:
    """Whether nothing in it is a letter, a digit, a mark or a symbol."""
    return all(unicodedata.category(character)[0] in "PZC" for character in text)


def term_names(tokenizer: Tokenizer, size: int) -> list[str]:
    """The name of each term of a head, (vocabulary,) by id: ``python`` for the word, ``##ing`` for a piece of one, ``)``.

    The same for every kind of vocabulary. Punctuation after a space is ``▁)``. Entries that are no text by themselves keep
    their token. No two are alike: see ``name_terms``.
    """
    spaces = marks_spaces(tokenizer)
    tokens = read_tokens(tokenizer, size)
    for entry in read_entries(tokenizer, size):
        if spaces and not has_letters(entry.text):  # in most texts it follows a word
            tokens[entry.id] = _SPACE * entry.begins + entry.text
        else:
            tokens[entry.id] = _PIECE * (not entry.begins) + entry.text
    return name_terms(tokens)


def name_terms(tokens: Sequence[str | None]) -> list[str]:
    """A name for each term, (vocabulary,) by id, no two alike: its token, or ``[term:ID]``.

    ``[term:ID]`` names a term without a token, and one whose token is empty, holds white space, is a duplicate or is
    no UTF-8, which files and JSON objects would lose or merge with another.

    Raises:
        DataError: a token is such a name itself.
    """
    count = Counter(tokens)
    names = [
        f"[term:{term}]" if token is None or count[token] > 1 or token.split() != [token] or not is_utf8(token) else token
        for term, token in enumerate(tokens)
    ]
    if len(set(names)) < len(names):
        raise DataError("tokens: one is [term:ID], which stands for tokens that cannot be written; rename it")
    return names


def _kinds(decoder: Any) -> Iterator[str]:
    """The names of a decoder's parts: the one place where a tokenizer says what its marks are."""
    if decoder is None:
        return
    parts = [json.loads(decoder.__getstate__())]
    while parts:
        part = parts.pop()
        parts += part.get("decoders", [])
        spaces = part["type"] == "Replace" and part["pattern"] == {"String": _SPACE}  # how Metaspace is written out
        yield "Metaspace" if spaces else part["type"]


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for: printable ones themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _bytes_of_characters()


def _from_bytes(token: str) -> str:
    """The text of a byte-level token; the token as it is, if it is none."""
    if not all(character in _BYTES for character in token):
        return token
    return bytes(_BYTES[character] for character in token).decode("utf-8", errors="replace")

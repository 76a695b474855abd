"""The entries of a vocabulary as people write them: words, and pieces that continue a word.

Tokenizers mark where a word begins, each kind in its own way: byte-level BPE (RoBERTa, ModernBERT) and SentencePiece (XLM-R)
mark the space before it, WordPiece (BERT) marks the pieces that continue it.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, normalizers
from tokenizers.models import WordPiece

from anysplade.data.text import is_utf8
from anysplade.errors import DataError

_SPACE = "▁"  # SentencePiece's mark of a space, and that of punctuation after a space in names
_PIECE = "##"  # WordPiece's mark of a piece, and that of pieces in names
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte of a character that is in no entry


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
        if id_ not in known and _is_text(text):
            entries.append(Entry(text, begins, id_))
    return entries


def read_tokens(tokenizer: Tokenizer, size: int) -> list[str | None]:
    """The token of each id up to ``size``, None where there is none: a head can be wider than its tokenizer's vocabulary."""
    return [tokenizer.id_to_token(id_) for id_ in range(size)]


def marks_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the space before a word is marked, so that a word without one is written like a piece: ``(word``."""
    return not {"ByteLevel", "Metaspace"}.isdisjoint(_kinds(tokenizer.decoder))


def lower_entries(state: dict[str, Any], tokenizer: Tokenizer) -> np.ndarray:
    """Put all entries of a tokenizer that are text in lower case, in its state (its JSON), in place; added tokens stay.

    Of the entries that become one, the one with the lowest id keeps the name, and the others get names that no lower-case text has.
    Merges of BPE and scores of Unigram follow.

    Returns:
        The id that each id has become, (entries,).
    """
    model = state["model"]
    pieces = model["vocab"] if isinstance(model["vocab"], list) else None  # of Unigram: [piece, score] by id
    ids = {piece: id_ for id_, (piece, _) in enumerate(pieces)} if pieces is not None else dict(model["vocab"])
    fixed = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | {model.get("unk_token")}
    in_bytes = "ByteLevel" in set(_kinds(tokenizer.decoder))
    lower = normalizers.Lowercase().normalize_str  # as the tokenizer does it; Python has another σ at the end of a word

    def changed(token: str) -> str:
        text = _from_bytes(token) if in_bytes else token
        if token in fixed or not _is_text(text.removeprefix(" ")):
            return token
        form = _to_bytes(lower(text)) if in_bytes else lower(text)
        return token if form in fixed else form

    forms = {token: changed(token) for token in ids}
    groups: dict[str, list[int]] = {}
    for token, id_ in sorted(ids.items(), key=lambda item: item[1]):
        groups.setdefault(forms[token], []).append(id_)
    terms = np.arange(max(ids.values(), default=-1) + 1)
    named = {form: group[0] for form, group in groups.items()}
    spare = [token for token in ids if token not in named]
    for group in groups.values():
        terms[group] = group[0]
        named |= {spare.pop(): id_ for id_ in group[1:]}
    if pieces is not None:
        scores = dict(pieces)
        for piece, score in pieces:
            scores[forms[piece]] = max(scores.get(forms[piece], score), score)
        names = {id_: token for token, id_ in named.items()}  # a piece that is there twice keeps its first place
        model["vocab"] = [[name := names.get(id_, piece), scores[name]] for id_, (piece, _) in enumerate(pieces)]
    else:
        model["vocab"] = dict(sorted(named.items(), key=lambda item: item[1]))
    if "merges" in model:
        inner = model.get("continuing_subword_prefix") or ""
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        merges = dict.fromkeys((forms.get(left, left), forms.get(right, right)) for left, right in pairs)
        model["merges"] = [[left, right] for left, right in merges if left + right.removeprefix(inner) in groups]
    return terms


def _is_text(text: str) -> bool:
    """Whether an entry without its marks is text by itself: no white space, and no byte or part of a character."""
    whole = is_utf8(text) and "\N{REPLACEMENT CHARACTER}" not in text and not _BYTE.fullmatch(text)
    return whole and text.split() == [text]


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


def split_words(text: str, tokens: Sequence[tuple[int, int, int]], names: Sequence[str]) -> dict[int, str]:
    """The words of a text that its tokenizer split, by the id of each of their pieces; of several words the first.

    Scripts without case are left as they are: in some of them words have no space between them, so that all the text would be one.

    Args:
        tokens: of the text: the id, and the characters from where to where.
        names: of the terms; see ``term_names``.
    """
    words: dict[int, str] = {}
    group: list[tuple[int, int, int]] = []

    def close() -> None:
        if len(group) > 1:
            for term, _, _ in group:
                words.setdefault(term, text[group[0][1] : group[-1][2]])

    for token in tokens:
        term, start, end = token
        joined = group and start == group[-1][2] and start < end and names[term].startswith(_PIECE)
        if not (joined and _has_case(text[start - 1]) and _has_case(text[start])):
            close()
            group = []
        group.append(token)
    close()
    return words


def _has_case(character: str) -> bool:
    """Whether it is a digit, or a letter or a mark of a script with capitals."""
    return character.isalnum() and unicodedata.category(character) != "Lo"


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


def _to_bytes(text: str) -> str:
    """The byte-level token of a text."""
    characters = {byte: character for character, byte in _BYTES.items()}
    return "".join(characters[byte] for byte in text.encode())

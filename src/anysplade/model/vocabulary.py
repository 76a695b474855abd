"""The entries of a vocabulary as readable text: words, and pieces that continue a word.

Each kind of tokenizer marks the beginning of words in its own way: byte-level BPE (RoBERTa, ModernBERT) and SentencePiece (XLM-R)
mark the space before a word, WordPiece (BERT) marks the pieces that continue one.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import WordPiece

from anysplade.data.text import is_utf8
from anysplade.errors import DataError

T = TypeVar("T")

_SPACE = "▁"  # marks a space in SentencePiece, and punctuation after a space in names
_PIECE = "##"  # marks a piece in WordPiece and in names
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte of a character that has no entry

_from_bytes = decoders.ByteLevel().decode  # text of a list of byte-level tokens; other tokens stay as they are
_to_bytes = normalizers.ByteLevel().normalize_str  # byte-level token of a text


class Entry(NamedTuple):
    """An entry that is text."""

    text: str  # without marks, not empty, without white space
    begins: bool  # it begins a word, as far as the marks tell
    id: int


def read_entries(tokenizer: Tokenizer, size: int) -> list[Entry]:
    """The entries of a vocabulary that are text, with ids below ``size``.

    Special tokens, white space, incomplete characters and ids without a token are left out.
    """
    kinds = set(_kinds(tokenizer.decoder))
    special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    entries = []
    for id_ in range(size):
        text, begins = tokenizer.id_to_token(id_) or "", True  # a head can be wider than the vocabulary
        if "ByteLevel" in kinds:
            text = _from_bytes([text])
            begins, text = text.startswith(" "), text.removeprefix(" ")
        elif "Metaspace" in kinds:
            begins, text = text.startswith(_SPACE), text.removeprefix(_SPACE)
        elif isinstance(tokenizer.model, WordPiece) and text != _PIECE:
            begins, text = not text.startswith(_PIECE), text.removeprefix(_PIECE)
        if id_ not in special and _is_text(text):
            entries.append(Entry(text, begins, id_))
    return entries


def marks_spaces(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer marks the space before a word, so that the word in ``(word`` looks like a piece."""
    return not {"ByteLevel", "Metaspace"}.isdisjoint(_kinds(tokenizer.decoder))


def lower_entries(state: dict[str, Any], tokenizer: Tokenizer) -> np.ndarray:
    """Put the entries that are text in lower case in the JSON of a tokenizer; returns the id that each has become, (entries,).

    Among entries that become equal, the one with the lowest id (the most frequent one) takes the name. The others get names that
    cannot occur in lower-case text. Merges of BPE and scores of Unigram follow. Added tokens stay.
    """
    model = state["model"]
    pieces = model["vocab"] if isinstance(model["vocab"], list) else None  # Unigram has a list of [piece, score] by id
    ids = {piece: id_ for id_, (piece, _) in enumerate(pieces)} if pieces is not None else dict(model["vocab"])
    fixed = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | {model.get("unk_token")}
    in_bytes = "ByteLevel" in set(_kinds(tokenizer.decoder))
    lower = normalizers.Lowercase().normalize_str  # as the tokenizer does it; Python changes Σ differently at the end of a word

    def lowered(token: str) -> str:
        text = _from_bytes([token]) if in_bytes else token
        if token in fixed or not _is_text(text.removeprefix(" ")):
            return token
        form = _to_bytes(lower(text)) if in_bytes else lower(text)
        return token if form in fixed else form

    forms = {token: lowered(token) for token in ids}
    groups: dict[str, list[int]] = {}  # ids by form, ascending
    for token, id_ in sorted(ids.items(), key=lambda item: item[1]):
        groups.setdefault(forms[token], []).append(id_)
    terms = np.arange(max(ids.values(), default=-1) + 1)
    named = {form: group[0] for form, group in groups.items()}  # ids by new name
    spare = [token for token in ids if token not in named]  # old names that are not lower-case
    for group in groups.values():
        terms[group] = group[0]
        named |= {spare.pop(): id_ for id_ in group[1:]}
    if pieces is not None:
        scores = dict(pieces)
        for piece, score in pieces:
            scores[forms[piece]] = max(scores.get(forms[piece], score), score)
        names = {id_: token for token, id_ in named.items()}  # a duplicate piece keeps its first place
        renamed = [names.get(id_, piece) for id_, (piece, _) in enumerate(pieces)]
        model["vocab"] = [[piece, scores[piece]] for piece in renamed]
    else:
        model["vocab"] = dict(sorted(named.items(), key=lambda item: item[1]))
    if "merges" in model:
        inner = model.get("continuing_subword_prefix") or ""
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        merges = dict.fromkeys((forms.get(left, left), forms.get(right, right)) for left, right in pairs)
        model["merges"] = [[left, right] for left, right in merges if left + right.removeprefix(inner) in groups]
    return terms


def _is_text(text: str) -> bool:
    """Whether an entry without its marks is text: no white space, and no incomplete character."""
    whole = is_utf8(text) and "\N{REPLACEMENT CHARACTER}" not in text and not _BYTE.fullmatch(text)
    return whole and text.split() == [text]


def is_punctuation(text: str) -> bool:
    """Whether a text has no letter, digit, mark or symbol."""
    return all(unicodedata.category(character)[0] in "PZC" for character in text)


def term_names(tokenizer: Tokenizer, size: int) -> list[str]:
    """The name of each term of a head, (vocabulary,) by id, unique and of the same form for every kind of vocabulary.

    ``python`` is a word, ``##ing`` a piece of a word, ``)`` punctuation, and ``▁)`` punctuation after a space. Entries that are no
    text keep their token; see ``name_terms``.
    """
    spaces = marks_spaces(tokenizer)
    tokens = [tokenizer.id_to_token(term) for term in range(size)]
    for entry in read_entries(tokenizer, size):
        if spaces and not any(map(str.isalnum, entry.text)):  # punctuation mostly follows a word, without a space
            tokens[entry.id] = _SPACE * entry.begins + entry.text
        else:
            tokens[entry.id] = _PIECE * (not entry.begins) + entry.text
    return name_terms(tokens)


def name_terms(tokens: Sequence[str | None]) -> list[str]:
    """A unique name for each term, (vocabulary,) by id: its token, or ``[term:ID]``.

    ``[term:ID]`` names a term whose token is missing, empty, a duplicate or no UTF-8, or contains white space: files and JSON
    objects would lose such a token or merge it with another. Raises DataError if a token has such a name itself.
    """
    count = Counter(tokens)
    names = [
        f"[term:{term}]" if token is None or count[token] > 1 or token.split() != [token] or not is_utf8(token) else token
        for term, token in enumerate(tokens)
    ]
    if len(set(names)) < len(names):
        raise DataError("tokens: one is [term:ID], the name of tokens that cannot be written to files; rename it")
    return names


def split_words(text: str, tokens: Sequence[tuple[int, int, int]], names: Sequence[str]) -> dict[int, str]:
    """The words of a text that its tokenizer split, by the id of each piece; the first word if a piece is in several.

    Scripts without case are not joined: some have no spaces between words, so that the whole text would be one word. ``tokens`` has
    the id, and the first and last character (exclusive) of each token; ``names`` are those of ``term_names``.
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


def join_pieces(pieces: Iterable[tuple[str | None, str, float, T]]) -> list[tuple[str, float, list[T]]]:
    """Words with the sums of their pieces' weights, and the pieces, the largest sum first.

    Args:
        pieces: of each piece the word that the tokenizer split (None if it is whole), its name, its weight, and the piece itself.
    """
    joined: dict[tuple[str, bool], list[tuple[float, T]]] = {}  # the bool: a word can have the name of another term
    for word, name, weight, piece in pieces:
        joined.setdefault((name, False) if word is None else (word, True), []).append((weight, piece))
    found = [(word, sum(weight for weight, _ in parts), [piece for _, piece in parts]) for (word, _), parts in joined.items()]
    return sorted(found, key=lambda word: -word[1])


def _has_case(character: str) -> bool:
    """Whether a character is a digit, or a letter of a script with capitals."""
    return character.isalnum() and unicodedata.category(character) != "Lo"


def _kinds(decoder: Any) -> Iterator[str]:
    """The names of a decoder's parts: only they tell how a tokenizer marks words."""
    if decoder is None:
        return
    parts = [json.loads(decoder.__getstate__())]
    while parts:
        part = parts.pop()
        parts += part.get("decoders", [])
        spaces = part["type"] == "Replace" and part["pattern"] == {"String": _SPACE}  # Metaspace written as its parts
        yield "Metaspace" if spaces else part["type"]

"""Text helpers: lone surrogates, values in messages, word counts, and normal forms and hashes for comparing texts."""

import hashlib
import json
import re

from anysplade.data.scripts import UNSPACED

_SURROGATE = re.compile("[\ud800-\udfff]")

# A word, or one character of a script without spaces.
TOKEN = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
UNSPACED_CHARACTER = re.compile(rf"[{UNSPACED}]")
PUNCTUATION = " \t\n.,:;!?…。、！？：；()[]\"'“”‘’「」"  # stripped from the ends of words and queries


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded as UTF-8, which means that it has no lone surrogate."""
    return text.isascii() or not _SURROGATE.search(text)


def replace_surrogates(text: str) -> str:
    """Replace each lone surrogate by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def shown(value: object) -> str:
    """A value as JSON, cut for a message."""
    return json.dumps(value, default=str)[:40]


def count_words(text: str) -> float:
    """Count tokens that have a letter or digit; a character of a script without spaces counts as half a word."""
    words = [token for token in TOKEN.findall(text) if any(map(str.isalnum, token))]
    return len(words) - sum(1 for word in words if UNSPACED_CHARACTER.match(word)) / 2


def normalized(text: str) -> str:
    """The text in lower case, with single spaces and without punctuation at its ends; equal for queries that mean the same."""
    return " ".join(text.casefold().split()).strip(PUNCTUATION)


def stable_hash(text: str) -> int:
    """A hash of 64 bits that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(replace_surrogates(text).encode(), digest_size=8).digest())

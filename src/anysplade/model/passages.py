"""Passages of long documents: slices that a model reads one by one, so that nothing is cut.

A document's score is that of its best passage (MaxP; Dai & Callan, SIGIR 2019, arXiv 1905.09217).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, islice
from typing import Any, overload

import numpy as np
from sentence_transformers import SentenceTransformer, SparseEncoder

from anysplade.data.corpus import Document
from anysplade.data.stored_corpus import StoredCorpus, StoredTexts
from anysplade.data.text import replace_surrogates
from anysplade.errors import ModelError, OptionError
from anysplade.model.modules import reader
from anysplade.model.options import Window
from anysplade.model.tokenizing import TOKENIZING, limits_of, prompt_of

_DOCUMENTS = 512  # that are tokenized together

Span = tuple[int, int]  # the first character of a passage in a document's text, and the one after its last


class Splitter:
    """Splits documents into the passages that a window slides over, in the tokens of an encoder."""

    def __init__(self, encoder: SparseEncoder | SentenceTransformer, window: Window, name: str) -> None:
        """``name`` is the model's in errors.

        Raises:
            ModelError: the model has no tokenizer that tells where tokens are in a text.
            OptionError: the window is longer than what the model reads.
        """
        module: Any = reader(encoder, "document")
        tokenizer: Any = getattr(module, "tokenizer", None)
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(f"{name}: has no fast tokenizer, without which it cannot split texts; leave out `passages`")
        self.window, self._tokenizer = window, tokenizer
        self._room: int | None = None  # tokens that the model reads of a title and a passage
        limit = limits_of(encoder, "document").limit
        if limit is not None:
            prompt = prompt_of(encoder, "document")
            others = tokenizer.num_special_tokens_to_add() + (len(self._tokens([prompt])[0]) if prompt else 0)
            self._room = limit - others
            if window.length > self._room:
                fix = f"give at most {self._room}, or a larger `max_length`"
                raise OptionError(f"`passages` is {window}: {name} reads {limit} tokens, {others} of them not the text's; {fix}")

    def split(self, documents: Sequence[Document]) -> list[list[Span]]:
        """The passages of each document, at least one each. A document that fits into the window is one passage.

        A passage begins and ends with whole words, unless a single word is longer than the window. Passages of a document whose
        title leaves less room in the model than the window are shorter, down to half of the window.
        """
        found = []
        titles = self._tokens([document.title for document in documents])
        for document, title, text in zip(documents, titles, self._tokens([one.text for one in documents]), strict=True):
            window = self.window
            if self._room is not None and len(title) + window.length > self._room:
                length = max(self._room - len(title), (window.length + 1) // 2)
                window = Window(length, min(window.stride, length))
            spans = window_spans(text.word_ids, window)
            found.append([_characters(document.text, text.offsets, *span) for span in spans])
        return found

    def _tokens(self, texts: Sequence[str]) -> Any:
        """The encodings of texts without special tokens, as ``tokenizers`` has them."""
        with TOKENIZING:
            options = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
            return self._tokenizer([replace_surrogates(text) for text in texts], **options).encodings


def window_spans(words: Sequence[int | None], window: Window) -> list[Span]:
    """The first token of each passage and the one after its last, for the word of each token."""
    count = len(words)
    if count <= window.length:
        return [(0, count)]
    starts = np.array([i for i in range(count) if i == 0 or words[i] is None or words[i] != words[i - 1]] + [count])

    def word_start(token: int, after: int, otherwise: int) -> int:
        """The last start of a word up to a token, if it comes after another token."""
        start = int(starts[np.searchsorted(starts, token, "right") - 1])
        return start if start > after else otherwise

    spans: list[Span] = []
    first = last = 0
    while last < count:
        last = word_start(first + window.length, first, min(first + window.length, count))
        if not spans or last > spans[-1][1]:  # else it is a part of the passage before
            spans.append((first, last))
        first = min(last, word_start(first + window.stride, first, first + window.stride))
    return spans


def _characters(text: str, offsets: Sequence[Span], first: int, last: int) -> Span:
    """The characters of some tokens; at both ends of a text, with those that have no token."""
    start = 0 if first == 0 else offsets[first][0]
    end = len(text) if last == len(offsets) else offsets[last - 1][1]
    while start < end and first and text[start].isspace():  # of some tokenizers, a token has the blank before it
        start += 1
    return start, end


def slice_document(document: Document, span: Span) -> Document:
    """A passage as a model reads it: the title of its document and a slice of its text."""
    return document._replace(text=document.text[slice(*span)])


class Passages(StoredTexts):
    """The texts of the passages of a corpus, made when they are used; 24 bytes per passage are in memory."""

    def __init__(self, corpus: Mapping[str, Document], splitter: Splitter) -> None:
        self.window = splitter.window
        self.at: Callable[[int], Document] = corpus.at if isinstance(corpus, StoredCorpus) else list(corpus.values()).__getitem__
        parts, counts = [np.zeros((0, 3), np.int64)], [0]
        numbered: Iterable[tuple[int, Document]] = iter(enumerate(corpus.values()))
        while batch := list(islice(numbered, _DOCUMENTS)):
            split = splitter.split([document for _, document in batch])
            rows = [(number, *span) for (number, _), spans in zip(batch, split, strict=True) for span in spans]
            parts.append(np.array(rows, np.int64))
            counts += map(len, split)
        self.spans = np.concatenate(parts)  # (passages, 3): document, first character, the one after the last
        self.starts = np.cumsum(counts)  # (documents + 1,): the first passage of each document, and the number of passages

    def __len__(self) -> int:
        return len(self.spans)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if not isinstance(place, slice):
            return self._texts(self.spans[place][None])[0]
        return self._texts(self.spans[place])

    def _texts(self, spans: np.ndarray) -> list[str]:
        texts = []
        for number, rows in groupby(spans.tolist(), key=lambda row: row[0]):
            document = self.at(number)  # read once for all of its passages
            texts += [slice_document(document, (start, end)).full_text for _, start, end in rows]
        return texts

"""One dimension a word: fold the vocabulary of a cased backbone.

``python``, ``Python``, `` python`` and `` Python`` are four tokens of a cased vocabulary, and four dimensions of SPLADE: a query
with the one and a document with the other have nothing in common ("Why Advanced Encoders Lag on Sparse Retrieval",
arXiv 2607.00004, calls it the vocabulary gap). Folding gives them one dimension, that of the most frequent of them, and switches
the others off: their bias becomes lower than any logit. The input is folded with it: all forms get the embedding of that one.
Otherwise a text with another form would have the word at a lower weight, because a token's highest logit is that of its own form.
The checkpoint stays stock, and what is tied stays tied.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anysplade._common.extras import extra
from anysplade.errors import ModelError, OptionError
from anysplade.model.head import DEAD, RECORD, check_logits, find_head
from anysplade.model.options import Fold
from anysplade.model.vocabulary import Entry, has_letters, is_punctuation, marks_spaces, read_entries, right_halves

_MUTED = -1


@dataclass(frozen=True)
class Folding:
    """What was folded; lies under ``anysplade`` in the checkpoint's config.json, as ``folding``."""

    by: Fold  # which terms share a dimension
    mute: bool  # punctuation and special tokens have no dimension
    groups: int  # of two terms and more, which are one now
    folded: int  # terms whose dimension is another's
    muted: int  # terms without one
    live: int  # terms that are left


def fold_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, by: Fold = "case", mute: bool = False) -> Folding | None:
    """Fold the vocabulary of a masked LM, in place. Calibrate after it, not before.

    The decoder's bias changes, and rows of the input embeddings become copies of other rows; ties and size stay.

    Args:
        model: a masked LM of transformers.
        tokenizer: of the model.
        by: ``"case"``: words that are the same up to case, the mark of the space before them and their Unicode form (NFKC) are
            one; ``"stem"``: English words of one stem too (needs the extra ``evaluation``); ``"none"``: nothing is folded.
        mute: punctuation and special tokens get no dimension.

    Returns:
        What was done, which the model's config records too; None where nothing was asked for.

    Raises:
        OptionError: the vocabulary has nothing to fold, or was folded before.
        ModelError: there is no head or no bias, the tokenizer does not say what its tokens are, or the logits are not
            ``W h + b``: then the model is left as it was.
    """
    if by == "none" and not mute:
        return None
    earlier = getattr(model.config, RECORD, None) or {}
    if earlier.get("folding"):
        raise OptionError(f"{model.name_or_path}: was folded before, and is folded once; start from the original")
    head = find_head(model)
    if not head.biases:
        raise ModelError(
            f"{type(model).__name__}: the MLM head has no bias, so no term of it can be switched off; leave out `fold`"
        )
    terms = plan_folding(tokenizer, len(head.decoder.weight), by, mute)
    own, sizes = np.arange(len(terms)), np.bincount(terms[terms >= 0], minlength=len(terms))
    _switch_off(model, terms)
    _read_alike(model, terms)
    done = Folding(
        by=by,
        mute=mute,
        groups=int((sizes > 1).sum()),
        folded=int(((terms != own) & (terms != _MUTED)).sum()),
        muted=int((terms == _MUTED).sum()),
        live=int((terms == own).sum()),
    )
    setattr(model.config, RECORD, earlier | {"folding": asdict(done)})
    return done


def plan_folding(tokenizer: PreTrainedTokenizerBase, size: int, by: Fold, mute: bool) -> np.ndarray:
    """``fold_vocabulary`` of a model's tokenizer.

    Raises:
        OptionError, ModelError: there is nothing to fold, or the tokenizer does not say what its tokens are.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer is written in Python and does not say what its tokens are; leave out `fold`"
        )
    terms = fold_vocabulary(tokenizer.backend_tokenizer, size, by, mute)
    if by == "case" and not _shared(terms):
        raise OptionError(f"{tokenizer.name_or_path}: its vocabulary has one form of each word already (uncased); leave out `fold`")
    return terms


def folds_by_case(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a vocabulary has several forms of a word."""
    return tokenizer.is_fast and _shared(fold_vocabulary(tokenizer.backend_tokenizer, len(tokenizer)))


def _shared(terms: np.ndarray) -> bool:
    """Whether a dimension is that of several terms."""
    kept = terms[terms != _MUTED]
    return len(np.unique(kept)) < len(kept)


def fold_vocabulary(tokenizer: Tokenizer, size: int, by: Fold = "case", mute: bool = False) -> np.ndarray:
    """The term whose dimension each term has, (size,): its own id, or another's, or -1 for none.

    The one of a group that stays is the most frequent one after a space, that with the lowest id: vocabularies are in the order in
    which they were learned. A piece that continues a
    word stays apart from the word of the same letters: the ``ing`` of ``going`` is not the word ``ing``. Where a space is marked
    and a piece is not, a token without the mark is both, as in ``(word``: there it counts as a piece if it was learned before the
    word (has a lower id) and other tokens end in it. Letters without case (Chinese, Arabic) are left alone.
    """
    entries = read_entries(tokenizer, size)
    forms = {entry.id: form for entry in entries if (form := _form(entry.text)) is not None}
    words: dict[str, list[Entry]] = {}  # with a mark, by form
    unmarked: dict[str, Entry] = {}  # in lower case, likewise
    for entry in entries:
        if entry.begins and entry.id in forms:
            words.setdefault(forms[entry.id], []).append(entry)
        elif not entry.begins and entry.text == forms.get(entry.id):
            unmarked[entry.text] = entry
    halves = right_halves(tokenizer)
    ambiguous = marks_spaces(tokenizer)  # WordPiece marks the pieces
    stem = _stemmer() if by == "stem" else str
    terms = np.arange(size)
    groups: dict[tuple[str, bool], list[Entry]] = {}
    for entry in entries:
        if entry.id not in forms or by == "none":
            continue
        form = forms[entry.id]
        piece = not entry.begins and has_letters(form)
        if piece and ambiguous:
            piece = _is_piece(unmarked.get(form, entry), words.get(form, []), tokenizer, halves)
        groups.setdefault((form if piece else stem(form), piece), []).append(entry)
    for (form, _), group in groups.items():
        word = has_letters(form)  # punctuation mostly follows a word
        kept = min(group, key=lambda entry: (entry.begins != word, entry.id))
        terms[[entry.id for entry in group]] = kept.id
    if by == "case" and not any(map(_differ_by_case, groups.values())):  # an uncased vocabulary has ligatures and the like
        terms = np.arange(size)
    if mute:
        special = [id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special and id_ < size]
        terms[[*special, *(entry.id for entry in entries if is_punctuation(entry.text))]] = _MUTED
    return terms


def _form(text: str) -> str | None:
    """A text in the form that all of its spellings share; None if it has letters without case, or accents of their own."""
    form = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    caseless = any(c.isalpha() and c.lower() == c.upper() for c in form)
    return None if caseless or not form or any(unicodedata.category(c)[0] == "M" for c in form) else form


def _is_piece(entry: Entry, words: Sequence[Entry], tokenizer: Tokenizer, halves: set[str] | None) -> bool:
    """Whether a token without a mark continues words, rather than being one that follows no space.

    Args:
        entry: the token, in lower case where the vocabulary has that.
        words: tokens with a mark and the same form.
        halves: see ``right_halves``.
    """
    same = [word for word in words if word.text == entry.text] or words
    ends_others = halves is None or tokenizer.id_to_token(entry.id) in halves
    return not same or (ends_others and entry.id < min(word.id for word in same))


def _differ_by_case(group: Sequence[Entry]) -> bool:
    """Whether the terms of a group differ in case or in the mark of a space, and not in their Unicode form alone."""
    marks = {entry.begins for entry in group if has_letters(entry.text)}
    return len(group) > 1 and (len(marks) > 1 or any(entry.text != entry.text.lower() for entry in group))


def _stemmer() -> Any:
    with extra("evaluation"):
        import Stemmer
    return Stemmer.Stemmer("english").stemWord


def _switch_off(model: PreTrainedModel, terms: np.ndarray) -> None:
    """Switch off the terms whose dimension is another's, by their bias; check what comes out."""
    before, head = check_logits(model), find_head(model)
    dead = torch.from_numpy(terms != np.arange(len(terms))).to(before.device)
    old = [bias.detach().clone() for bias in head.biases]
    with torch.no_grad():
        for bias in head.biases:
            bias.view(-1)[dead] = DEAD
        after = check_logits(model)
        if torch.equal(after[..., ~dead], before[..., ~dead]) and bool((after[..., dead] < DEAD / 2).all()):
            return
        for bias, values in zip(head.biases, old, strict=True):
            bias.copy_(values)
    raise ModelError(
        f"{type(model).__name__}: its logits are not one projection of its hidden states; its vocabulary cannot be folded"
    )


@torch.no_grad()
def _read_alike(model: PreTrainedModel, terms: np.ndarray) -> None:
    """Give each term the input embedding of the term whose dimension it has."""
    embeddings: Any = model.get_input_embeddings()
    source = torch.from_numpy(np.where(terms == _MUTED, np.arange(len(terms)), terms)).to(embeddings.weight.device)
    embeddings.weight[: len(source)] = embeddings.weight[source]

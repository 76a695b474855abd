"""The interface of query encoders, and one that looks up weights instead of running a model.

If queries have one weight per token, sentence-transformers saves a Router whose query side is one ``SparseStaticEmbedding``: a
tokenizer and a vector of weights. ``StaticQueries`` reads only these two, and imports neither torch nor sentence-transformers.
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors import deserialize
from scipy import sparse
from tokenizers import Tokenizer

from anysplade._common.extras import extra
from anysplade.data.text import replace_surrogates
from anysplade.errors import ModelError
from anysplade.model.saved import first_line, saved_file, saved_json
from anysplade.model.vocabulary import term_names

logger = logging.getLogger(__name__)

_UNLIMITED = 10**20  # a model_max_length above it means no limit
_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}  # of stored weights; NumPy lacks the other one, bfloat16


class Cut(NamedTuple):
    """Number of texts that are longer than what is read of them."""

    texts: int  # that are longer
    limit: int | None = None  # tokens that are read of each text; None for all
    maximum: int | None = None  # the highest limit that the model has positions for; None if there is no such limit


def log_cut(cut: Cut, texts: int, what: str, where: str = "") -> None:
    """Log how many of a number of texts were cut, if any, and how to avoid it; ``where`` names the model."""
    if cut.texts:
        advice = f"`max_length` raises the limit{'' if cut.maximum is None else f', up to {cut.maximum:,}'}"
        if cut.maximum is not None and cut.limit == cut.maximum:
            advice = "the model reads no more"
        message = "%s%s of %s %s were cut at %s tokens, and what follows cannot be found; %s"
        logger.info(message, where and f"{where}: ", f"{cut.texts:,}", f"{texts:,}", what, cut.limit, advice)


class Queries(Protocol):
    """Encodes queries, and knows the terms of the model."""

    def encode(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """Sparse vectors of queries, in their order: float32, (texts, vocabulary)."""

    def count_truncated(self, texts: Sequence[str]) -> Cut:
        """Count the queries that are longer than what is read of them."""

    def tokens(self, text: str, special_tokens: bool = False) -> list[tuple[int, int, int]]:
        """The tokens of a text: id, and first and last character (exclusive)."""

    @property
    def precision(self) -> str:
        """float32 or an approximation; see ``for_inference``."""

    @property
    def term_names(self) -> list[str]:
        """The name of each term, (vocabulary,) by id, as ``vocabulary.term_names`` defines it."""


class TokenizerQueries:
    """The part of a query encoder that reads a tokenizer of ``tokenizers``, which truncates and does not pad."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._vocabulary = vocabulary

    def tokens(self, text: str, special_tokens: bool = False) -> list[tuple[int, int, int]]:
        encoding = self._tokenizer.encode(replace_surrogates(text), add_special_tokens=special_tokens)
        return [(token, *span) for token, span in zip(encoding.ids, encoding.offsets, strict=True)]

    @cached_property
    def term_names(self) -> list[str]:
        return term_names(self._tokenizer, self._vocabulary)

    def _read(self, texts: Sequence[str], special_tokens: bool) -> list[Any]:
        """The encodings of texts with the prompt."""
        return self._tokenizer.encode_batch(
            [self._prompt + replace_surrogates(text) for text in texts], add_special_tokens=special_tokens
        )


class StaticQueries(TokenizerQueries):
    """Encodes queries by looking up one weight per token: bit for bit the vectors of the model, without the model."""

    precision = "float32"

    def __init__(self, weights: np.ndarray, tokenizer: Tokenizer, prompt: str = "") -> None:
        """Take weights, (vocabulary,) by token id, a tokenizer that truncates and does not pad, and a prompt for every query."""
        super().__init__(tokenizer, prompt, len(weights))
        self._weights = weights
        self._finite = bool(np.isfinite(weights).all())

    @classmethod
    def open(cls, source: str) -> "StaticQueries | None":
        """Read the query side of a saved model; raises ModelError if its weights or tokenizer are damaged or do not match.

        Returns None if the model has no such query side, or one that only sentence-transformers can read: with its own code,
        weights in another format than safetensors, or a tokenizer in Python.
        """
        folder = _query_folder(source)
        config = saved_json(source, "config_sentence_transformers.json") or {}
        if folder is None or config.get("model_type") != "SparseEncoder" or config.get("max_active_dims") is not None:
            return None
        stored = saved_file(source, f"{folder}/model.safetensors")
        if stored is None:
            return None
        try:
            weights, tokenizer = _read_weights(stored), _read_tokenizer(source, folder)
        except Exception as error:  # tokenizers raises Exception itself
            raise ModelError(f"{source}: the encoder of its queries cannot be loaded: {first_line(error)}") from error
        if tokenizer is None:
            return None
        tokens = tokenizer.get_vocab_size()
        if len(weights) != tokens:
            raise ModelError(
                f"{source}: its queries have {len(weights):,} weights and their tokenizer has {tokens:,} tokens: the tokenizer "
                "does not match the model; save the right one there"
            )
        return cls(weights, tokenizer, (config.get("prompts") or {}).get("query") or "")

    def encode(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """The vectors of ``model.encoding.encode``; raises ModelError if a weight is NaN or infinite.

        They differ only for queries with the padding token in their text, which lose it there in a batch with a longer query.
        """
        if texts and not self._finite:  # one such weight is enough, because zero times NaN is NaN
            raise ModelError("the model gives NaN or infinity for query text 1; its training diverged")
        rows = [sorted(set(encoding.ids)) for encoding in self._read(texts, special_tokens=False)]
        terms = np.fromiter(chain.from_iterable(rows), np.int32)
        weights = self._weights[terms]
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int32)
        if not weights.all():
            kept = weights != 0
            starts = np.concatenate([[0], np.cumsum(kept, dtype=np.int32)])[starts]
            terms, weights = terms[kept], weights[kept]
        return sparse.csr_matrix((weights, terms, starts), shape=(len(rows), len(self._weights)))

    def count_truncated(self, texts: Sequence[str]) -> Cut:
        limit = (self._tokenizer.truncation or {}).get("max_length")
        return Cut(sum(bool(encoding.overflowing) for encoding in self._read(texts, special_tokens=False)), limit, limit)


def _query_folder(source: str) -> str | None:
    """The folder with the weights of a saved model's queries; None unless they go through a single SparseStaticEmbedding."""
    try:
        (module,) = saved_json(source, "modules.json")
        router = saved_json(source, Path(module["path"], "router_config.json").as_posix())
        (name,) = router["structure"]["query"]
        folder = Path(module["path"], name)
        stock = _is(module["type"], "Router") and _is(router["types"][name], "SparseStaticEmbedding")
        config = saved_json(source, (folder / "config.json").as_posix()) or {}
        special = router["parameters"].get("route_mappings") or "path" in config  # other routes, or weights in another file
    except (TypeError, ValueError, KeyError, AttributeError):  # another kind of model, or damaged: sentence-transformers reports it
        return None
    inside = not folder.is_absolute() and ".." not in folder.parts
    return folder.as_posix() if stock and inside and not special else None


def _is(kind: str, name: str) -> bool:
    return kind.startswith("sentence_transformers.") and kind.endswith(f".{name}")


def _read_weights(path: Path) -> np.ndarray:
    """The weights of a SparseStaticEmbedding, float32, (vocabulary,)."""
    stored = dict(deserialize(path.read_bytes()))["weight"]
    if stored["dtype"] == "BF16":  # the upper 16 bits of float32
        return (np.frombuffer(stored["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(stored["data"], _TYPES[stored["dtype"]]).astype(np.float32)


def _read_tokenizer(source: str, folder: str) -> Tokenizer | None:
    """A model's tokenizer as transformers loads it, with its truncation and without padding; None if it is written in Python.

    transformers takes seconds to import, and is only used if it would change tokenizer.json.
    """
    file, config = saved_file(source, f"{folder}/tokenizer.json"), saved_json(source, f"{folder}/tokenizer_config.json")
    if file is not None and config is not None and _loads_unchanged(source, folder, config):
        tokenizer, limit = Tokenizer.from_file(str(file)), config.get("model_max_length")
        side = config.get("truncation_side") or (tokenizer.truncation or {}).get("direction", "right")
    else:
        with extra("train"):
            from transformers import AutoTokenizer

        loaded: Any = AutoTokenizer.from_pretrained(source, subfolder=folder, trust_remote_code=False)
        if not loaded.is_fast:
            return None
        tokenizer, limit, side = loaded.backend_tokenizer, loaded.model_max_length, loaded.truncation_side
    tokenizer.no_padding()
    if limit is None or limit > _UNLIMITED:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(int(limit), direction=side)
    return tokenizer


def _loads_unchanged(source: str, folder: str, config: dict[str, Any]) -> bool:
    """Whether transformers loads tokenizer.json unchanged, given the content of tokenizer_config.json.

    It rebuilds many tokenizers from their vocabulary alone.
    """
    saved = saved_json(source, f"{folder}/tokenizer.json")
    if any(config.get(key) for key in ("auto_map", "split_special_tokens", "fast_tokenizer_files")):
        return False
    added = {str(token.pop("id")): token for token in saved["added_tokens"]}
    if "added_tokens_decoder" in config:
        if config["added_tokens_decoder"] != added:
            return False
    elif any(saved_file(source, f"{folder}/{name}") for name in ("special_tokens_map.json", "added_tokens.json")):
        return False
    special = [token for key, token in config.items() if key.endswith("_token")]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        more = config.get(key) or []
        special += more.values() if isinstance(more, dict) else more
    known = {token["content"] for token in added.values()}
    if not known >= {token["content"] if isinstance(token, dict) else token for token in special if isinstance(token, str | dict)}:
        return False
    kind = config.get("tokenizer_class")
    if kind in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return True
    vocabulary = saved["model"].pop("vocab")
    # What transformers' BertTokenizer builds:
    normalizer = {"type": "BertNormalizer", "clean_text": True, "strip_accents": config.get("strip_accents")}
    normalizer |= {
        "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
        "lowercase": config.get("do_lower_case", True),
    }
    pieces = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    pieces["unk_token"] = config.get("unk_token", "[UNK]")
    return (
        kind in ("BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast")
        and all(vocabulary.get(token["content"]) == int(term) for term, token in added.items())
        and saved["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and saved["normalizer"] == normalizer
        and saved["model"] == pieces
    )

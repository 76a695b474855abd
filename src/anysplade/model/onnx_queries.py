"""Encode queries with an exported ONNX model: onnxruntime and ``tokenizers``; no torch is imported."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from tokenizers import Tokenizer

from anysplade._common.extras import extra
from anysplade._common.files import user_path
from anysplade.errors import ModelError, OptionError
from anysplade.model.options import Precision
from anysplade.model.pruning import prune
from anysplade.model.queries import Cut, TokenizerQueries
from anysplade.model.saved import EXPORTED, first_line

MODEL = "model.onnx"
QUANTIZED = "model_quantized.onnx"
TOKENIZER = "tokenizer.json"
FORMAT = 1  # of the description
_NEEDED = {
    *("format", "form", "inputs", "model_fingerprint", "vocabulary", "pooling", "double_log", "max_length", "positions"),
    *("truncation_side", "max_active_dims", "query_prompt", "static_queries"),
}


def exported(folder: str | Path) -> dict[str, Any] | None:
    """The description of a folder that ``export_onnx`` wrote; None for other folders.

    Raises:
        ModelError: the description is damaged, or another version of anysplade wrote it.
    """
    path = user_path(folder) / EXPORTED
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_bytes())
    except ValueError:
        about = None
    if not isinstance(about, dict) or (about.get("format", FORMAT) == FORMAT and not about.keys() >= _NEEDED):
        raise ModelError(f"{path}: the description of an exported model is damaged; export the model again")
    if about["format"] != FORMAT:
        raise ModelError(f"{path}: another version of anysplade exported this model; export it again with this one")
    return about


def read_tokenizer(folder: Path, about: Mapping[str, Any], max_length: int | None = None) -> Tokenizer:
    """The tokenizer of an exported model; it cuts texts as the model does, or at ``max_length`` tokens if there are positions."""
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.no_padding()
    limit = min(filter(None, (max_length or about["max_length"], about["positions"])), default=None)
    if limit is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(limit, direction=about["truncation_side"])
    return tokenizer


class OnnxQueries(TokenizerQueries):
    """Encodes queries with an exported model; implements ``model.queries.Queries``. Several threads may share it."""

    def __init__(
        self, folder: str | Path, precision: Precision = "float32", max_length: int | None = None, threads: int | None = None
    ) -> None:
        """Open a folder that ``export_onnx`` wrote.

        Args:
            precision: ``"int8"`` takes the quantized model, an approximation; ``"auto"`` is float32.
            max_length: tokens that are read of a text, at most the model's positions; None for those of the model.
            threads: of a query; all cores if None.

        Raises:
            ModelError: the folder has no exported model, one that cannot be opened, or one whose queries need no network.
            OptionError: ``precision`` is ``"bfloat16"``.
            ExtraError: onnxruntime is not installed.
        """
        folder = user_path(folder)
        about = exported(folder)
        if about is None:
            raise ModelError(f"{folder}: no exported model in it; anysplade export MODEL --to onnx --out {folder} writes one")
        if about["static_queries"]:
            raise ModelError(f"{folder}: the queries of this model need no export; leave `model` out, or give the model")
        if precision == "bfloat16":
            raise OptionError(f"precision is bfloat16: {folder} is an exported model, which has float32 and int8; give one of them")
        self.precision = "int8" if precision == "int8" else "float32"
        file = folder / (QUANTIZED if precision == "int8" else MODEL)
        if not file.is_file():
            fix = "with `quantize`" if precision == "int8" else "again"
            raise ModelError(f"{folder}: no {file.name} in it; export the model {fix}")
        if not (folder / TOKENIZER).is_file():
            raise ModelError(f"{folder}: no {TOKENIZER} in it; export the model again")
        with extra("search"):
            import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        try:
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            tokenizer = read_tokenizer(folder, about, max_length)
        except Exception as error:  # both libraries raise errors of their own, or Exception itself
            raise ModelError(f"{folder}: the exported model cannot be opened: {first_line(error)}") from error
        super().__init__(tokenizer, about["query_prompt"], about["vocabulary"])
        self._about = about

    def encode(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """Sparse vectors of queries, in their order: float32, (texts, vocabulary); raises ModelError for NaN or infinity."""
        rows = [self._vector(encoding, number) for number, encoding in enumerate(self._read(texts, special_tokens=True), 1)]
        if not rows:
            return sparse.csr_matrix((0, self._vocabulary), dtype=np.float32)
        matrix, most = sparse.vstack(rows, format="csr"), self._about["max_active_dims"]
        return matrix if most is None else prune(matrix, most)

    def _vector(self, encoding: Any, number: int) -> sparse.csr_matrix:
        known = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask, "token_type_ids": encoding.type_ids}
        outputs = self._session.run(None, {name: np.array([known[name]], np.int64) for name in self._about["inputs"]})
        if self._about["form"] == "terms":
            terms, weights = outputs
        else:
            vector = self._pooled(outputs[0][0]) if self._about["form"] == "logits" else outputs[0][0]
            terms = np.flatnonzero(vector)
            weights = vector[terms]
        if not np.isfinite(weights).all():
            raise ModelError(f"the model gives NaN or infinity for query text {number}; its training diverged")
        return sparse.csr_matrix((weights, terms, [0, len(terms)]), shape=(1, self._vocabulary))

    def _pooled(self, logits: np.ndarray) -> np.ndarray:
        """The vector, (vocabulary,), of a text's logits, (length, vocabulary)."""
        sums = self._about["pooling"] == "sum"
        weights = np.maximum(logits if sums else logits.max(axis=0), 0)
        for _ in range(2 if self._about["double_log"] else 1):
            weights = np.log1p(weights)
        return weights.sum(axis=0) if sums else weights

    def count_truncated(self, texts: Sequence[str]) -> Cut:
        if self._tokenizer.truncation is None:
            return Cut(0)
        limit = self._tokenizer.truncation["max_length"]
        count = sum(bool(encoding.overflowing) for encoding in self._read(texts, special_tokens=True))
        return Cut(count, limit, self._about["positions"])

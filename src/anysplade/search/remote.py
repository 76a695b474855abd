"""An index on a Qdrant or OpenSearch server: the same corpus, the same model, the same hits."""

import hashlib
import json
import logging
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anysplade._common.files import user_path
from anysplade.data.corpus import Document, empty_corpus, iter_corpus
from anysplade.errors import DataError, OptionError, without_credentials
from anysplade.model.options import Precision, Runtime
from anysplade.model.queries import Queries
from anysplade.model.saved import resolve_model
from anysplade.search.documents import EncodedDocument, Filter, Hit, Hits, check_encoding, check_hits, check_query, explain_filter
from anysplade.search.engines import open_engine
from anysplade.search.engines.sending import same_model
from anysplade.search.index import explain_score
from anysplade.search.index_model import IndexModel, describe_model

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder

logger = logging.getLogger(__name__)


class RemoteIndex:
    """What ``Index`` is, for an address such as ``qdrant://host:6333/name``.

    ``sent`` is how many documents ``build`` sent, and ``left_over`` how many more the server has than the corpus.
    """

    def __init__(
        self,
        address: str,
        model: str | Path | None = None,
        runtime: Runtime = "auto",
        precision: Precision = "float32",
    ) -> None:
        """Connects on first use.

        Args:
            model: where the model lies that the index was built with, if not where it lay then.
            runtime: of encoding; see ``for_inference``.
            precision: of encoding queries; see there too.

        Raises:
            OptionError: a malformed address, or a client that is not installed.
        """
        self.address = without_credentials(address)  # for messages
        self.engine = open_engine(address)
        self.sent = self.left_over = 0
        self._about: dict[str, Any] | None = None
        self._options: tuple[str | Path | None, Runtime, Precision] = model, runtime, precision

    @classmethod
    def build(
        cls,
        model: str | Path,
        corpus: str | Path,
        address: str,
        work: str | Path,
        *,
        runtime: Runtime = "auto",
        precision: Precision = "float32",
        top_k: int | None = None,
        max_length: int | None = None,
        workers: int = 1,
        ray: bool = False,
        progress: bool = False,
    ) -> "RemoteIndex":
        """Encode a corpus into shards under ``work`` and send them. After an interruption, call it again: it continues.

        What the server has already, in the same version, is not sent again. What is no longer in the corpus stays
        there, as do documents of others: their number is logged as a warning. ``runtime``, ``precision``, ``top_k``,
        ``max_length``, ``workers`` and ``ray`` are as in ``Index.build``.

        Args:
            model: a sparse encoder's folder or hub id.
            corpus: a source of ``read_corpus``.
            address: see ``open_engine``.
            work: a folder for shards, which an interrupted call does not encode again.

        Raises:
            OutputError: the server holds an index of that name that another model or an earlier version made, or with another
                precision, top_k or max_length.
            AnyspladeError: as ``encode_documents`` and the engine do.
        """
        from anysplade.model.encoder import open_encoder
        from anysplade.model.runtimes import resolve_precision
        from anysplade.search.build import Options, corpus_name, encode_documents

        index = cls(address, model, runtime)
        source = resolve_model(model)
        try:
            stored = index.engine.about()  # before hours of encoding
        except DataError:  # none yet
            stored = None
        known = None if stored is None else stored.get("precision")
        # Not "auto", which can mean something else where the index is searched.
        used = known if precision == "auto" and known is not None else resolve_precision(precision)
        top_k, max_length, workers = check_encoding(top_k, max_length, workers)
        encoding = {"precision": used, "top_k": top_k, "max_length": max_length}
        about = describe_model(source) | encoding
        if stored is not None:
            same_model(index.address, stored, about)
        key = hashlib.sha256(json.dumps([about, corpus_name(corpus)]).encode()).hexdigest()[:32]
        index._model = IndexModel(about, index.address, model, runtime)
        index._model.source, index._model.encoder = source, open_encoder(source, max_length=max_length)
        batches = encode_documents(
            iter_corpus(corpus, progress=progress),
            Options(source, used, top_k, max_length, runtime),
            workers=workers,
            ray=ray,
            encoder=lambda: index._model.documents,
            shards=user_path(work) / "shards" / key,
            progress=progress,
        )
        first = next(batches, None)
        if first is None:
            raise empty_corpus(corpus)
        index.engine.create(about | {"vocabulary": index.encoder.get_embedding_dimension()})
        count = 0

        def documents() -> Iterator[EncodedDocument]:
            nonlocal count
            for batch in chain([first], batches):
                count += len(batch)
                yield from batch

        index.sent = index.engine.upload(documents())
        index.left_over = len(index) - count
        if index.left_over > 0:
            logger.warning(
                "%s: holds %d documents that are not in %s; if they were removed from it, delete them there, or index it under "
                "another name",
                index.address,
                index.left_over,
                corpus,
            )
        return index

    @property
    def about(self) -> dict[str, Any]:
        """What the server says of the index.

        Raises:
            DataError: there is none, or it says nothing.
        """
        if self._about is None:
            about = self.engine.about()
            if not about:
                raise DataError(f"{self.address}: does not say which model its vectors are from; build it with anysplade")
            self._about = about
        return self._about

    @cached_property
    def _model(self) -> IndexModel:
        model, runtime, precision = self._options
        return IndexModel(self.about, self.address, model, runtime, precision)

    @property
    def encoder(self) -> "SparseEncoder":
        """The model the index was built with; it must be here under the same name, or have been named."""
        return self._model.encoder

    @property
    def queries(self) -> Queries:
        """What encodes queries, as ``Index.queries``."""
        return self._model.queries

    def __len__(self) -> int:
        return self.engine.count()

    def __repr__(self) -> str:
        return f"RemoteIndex({self.address!r})"

    def search(self, query: str, k: int = 10, explain: bool = False, filter: Filter | None = None, exact: bool = False) -> Hits:
        """Search as ``Index.search`` does, with the same arguments (``query``, ``k``, ``explain``, ``filter``). The terms of a hit
        come from its text, encoded again as the index was built.

        They sum to the score up to what the engine rounds; see its class. In bfloat16 the sum also depends, in the second
        or third digit, on the texts that are encoded together.

        Raises:
            OptionError: k is below 1, no document has a name of the filter, or ``exact``, which a server cannot do.
        """
        check_query(query)
        k = check_hits(k)
        if exact:
            raise OptionError("exact search needs the vectors on this machine; build an index in a folder")
        vector = self.queries.encode([query])
        hits = self.engine.search(vector.indices, vector.data, k, filter)
        if not explain or not hits:
            return Hits(hits)
        from anysplade.model.encoding import encode

        texts = [Document(hit.title, hit.text).full_text for hit in hits]
        rows = encode(self._model.documents, texts, "document", top_k=self.about.get("top_k"))
        explained = Hits()
        for hit, row in zip(hits, rows, strict=True):
            terms = explain_score(self.queries.term_names, vector, row.indices, row.data)
            explained.append(Hit(hit.id, hit.score, hit.title, hit.text, hit.metadata, terms))
        return explained

    def explain_filter(self, filter: Filter | None) -> str | None:
        """Why a search with a ``filter`` found nothing, as ``Index.explain_filter`` says it.

        Raises:
            OptionError: no document has a name of the filter.
        """
        return explain_filter(self.engine, filter)

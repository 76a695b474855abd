"""An index on a Qdrant or OpenSearch server, with the same hits as one in a folder."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from scipy import sparse

from anysplade._common.extras import extra
from anysplade._common.files import user_path
from anysplade.data.corpus import Document, empty_corpus, iter_corpus
from anysplade.errors import DataError, ExtraError, OptionError, without_credentials
from anysplade.model.options import Precision, Runtime
from anysplade.model.saved import resolve_model
from anysplade.search.documents import EncodedDocument
from anysplade.search.engines import open_engine
from anysplade.search.engines.base import require_same_model
from anysplade.search.filters import Filter
from anysplade.search.fusion import Fusion
from anysplade.search.hits import Hits, check_count, check_query, explain_score
from anysplade.search.index_model import IndexModel, WithModel, describe_model
from anysplade.search.rescoring import Rescoring, check_depth

logger = logging.getLogger(__name__)


class RemoteIndex(WithModel, Rescoring):
    """The counterpart of ``Index`` at an address such as ``qdrant://host:6333/name``, with the same ``encoder`` and ``queries``.

    ``sent`` is the number of documents that ``build`` sent; ``left_over`` is the number that the server has and the corpus lacks.
    """

    def __init__(
        self, address: str, model: str | Path | None = None, runtime: Runtime = "auto", precision: Precision = "float32"
    ) -> None:
        """The server is contacted on first use.

        ``model``, ``runtime`` and ``precision`` are as in ``Index.load``.

        Raises:
            OptionError: the address is malformed.
            ExtraError: the client of the server is not installed.
        """
        self.address = without_credentials(address)  # for messages
        self.engine = open_engine(address)
        self.sent = self.left_over = 0
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
        workers: int | None = None,
        batch_tokens: int | None = None,
        ray: bool = False,
        lexical: float | None = None,
        with_bm25: bool = False,
        language: str = "auto",
        progress: bool = False,
    ) -> "RemoteIndex":
        """Encode a corpus into shards under ``work`` and send it. After an interruption, the same call continues.

        Documents that the server already has are not sent again. Documents that are not in the corpus stay on the server, and
        their number is logged as a warning. ``runtime``, ``precision``, ``top_k``, ``max_length``, ``workers``,
        ``batch_tokens`` and ``ray`` are as in ``Index.build``.

        Args:
            model: a sparse encoder's folder or hub id.
            corpus: a source of ``read_corpus``.
            address: see ``open_engine``.
            work: a folder for shards, from which an interrupted call continues.

        Raises:
            OptionError: ``lexical``, ``with_bm25`` or ``language`` is given; only an index in a folder keeps frequencies of stems.
            OutputError: the server has an index of that name that was made by an earlier version, or with another model,
                precision, top_k or max_length.
            AnyspladeError: encoding fails, or the server cannot be reached or refuses.
        """
        from anysplade.model.encoder import open_encoder
        from anysplade.model.runtimes import resolve_precision
        from anysplade.search.build import describe_corpus
        from anysplade.search.document_encoding import Options, check_encoding, encode_documents

        given = {"lexical": lexical is not None, "with_bm25": with_bm25, "language": language != "auto"}
        for name in (name for name in given if given[name]):
            raise OptionError(f"`{name}`: only an index in a folder keeps the frequencies of stems; build one with `out`")
        index = cls(address, model, runtime)
        source = resolve_model(model)
        try:
            stored = index.engine.about()  # before hours of encoding
        except DataError:  # there is no index
            stored = None
        known = None if stored is None else stored.get("precision")
        # "auto" is not recorded: it can mean something else on the machine that searches.
        used = known if precision == "auto" and known is not None else resolve_precision(precision)
        top_k, max_length, workers = check_encoding(top_k, max_length, workers)
        about = describe_model(source) | {"precision": used, "top_k": top_k, "max_length": max_length}
        if stored is not None:
            require_same_model(index.address, stored, about)
        key = hashlib.sha256(json.dumps([about, describe_corpus(corpus)["corpus"]]).encode()).hexdigest()[:32]
        index._model = IndexModel(about, index.address, model, runtime)
        index._model.source, index._model.encoder = source, open_encoder(source, max_length=max_length)
        batches = encode_documents(
            iter_corpus(corpus, progress=progress),
            Options(source, used, top_k, max_length, runtime),
            workers=workers,
            batch_tokens=batch_tokens,
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
            message = "%s: holds %d documents that are not in %s; delete those that were removed from it, or choose another name"
            logger.warning(message, index.address, index.left_over, corpus)
        return index

    @cached_property
    def about(self) -> dict[str, Any]:
        """The description of the index on the server.

        Raises:
            DataError: there is no index, or it has no description.
        """
        about = self.engine.about()
        if not about:
            raise DataError(f"{self.address}: does not say which model its vectors are from; build it with anysplade")
        return about

    @cached_property
    def _model(self) -> IndexModel:  # type: ignore[override]
        model, runtime, precision = self._options
        return IndexModel(self.about, self.address, model, runtime, precision)

    def __len__(self) -> int:
        return self.engine.count()

    def __repr__(self) -> str:
        return f"RemoteIndex({self.address!r})"

    def search(
        self,
        query: str,
        k: int = 10,
        explain: bool = False,
        filter: Filter | None = None,
        exact: bool = False,
        *,
        fuse: Fusion | None = None,
        rerank: str | Path | None = None,
        rerank_depth: int = 100,
    ) -> Hits:
        """Search as ``Index.search`` does, with the same options: ``query``, ``k``, ``explain``, ``filter``, ``rerank`` and
        ``rerank_depth``.

        The terms of a hit come from its text, which is encoded again as for the index. Their products sum to the score, apart
        from the rounding of the engine. In bfloat16 they also depend, in the second or third digit, on the texts that are
        encoded together.

        Raises:
            OptionError: the query is empty, k is below 1 or above ``rerank_depth``, no document has a name of the filter, or
                ``exact`` or ``fuse`` is set, which a server cannot do.
        """
        check_query(query)
        k = check_count("k", k)
        _refuse_exact(exact)
        if fuse is not None:
            raise OptionError(f"{self.address}: has no stems for BM25; build an index in a folder with `with_bm25`")
        depth = k if rerank is None else check_depth(k, rerank_depth)
        vector = self.queries.encode([query])
        hits = self.engine.search(vector.indices, vector.data, depth, filter)
        if explain and hits:
            hits = self._explain(vector, hits)
        return hits if rerank is None else self._open_rescorer(rerank).rescore(query, hits, k)

    def _explain(self, vector: sparse.csr_matrix, hits: Hits) -> Hits:
        """The hits with the terms that each shares with the vector of a query, (1, vocabulary)."""
        try:
            with extra("train"):
                from anysplade.model.encoding import encode
        except ExtraError as error:
            raise ExtraError(f"{self.address}: its hits are explained with the model itself: {error}") from error

        texts = [Document(hit.title, hit.text).full_text for hit in hits]
        rows = encode(self._model.documents, texts, "document", top_k=self.about.get("top_k"))
        names = self.queries.term_names
        return Hits(
            replace(hit, terms=explain_score(names, vector, row.indices, row.data)) for hit, row in zip(hits, rows, strict=True)
        )

    def rank(self, vectors: sparse.csr_matrix, k: int, filter: Filter | None = None, exact: bool = False) -> list[dict[str, float]]:
        """See ``Index.rank``; one request after the other, because a client of a server need not be safe for threads."""
        _refuse_exact(exact)
        return [{hit.id: hit.score for hit in self.engine.search(row.indices, row.data, k, filter)} for row in vectors]


def _refuse_exact(exact: bool) -> None:
    if exact:
        raise OptionError("exact search needs the vectors on this machine; build an index in a folder")

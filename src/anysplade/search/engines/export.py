"""Files for other software: the vectors as they are, and what engines import: Anserini's JSONL, the Common Index File Format
(CIFF), and queries for both.

The latter contain integers: each weight times ``quantization``, rounded; zeros are dropped. Terms have the names of
``name_terms``; the stems of an index with BM25 are terms of their own, named ``stem:retriev``.
"""

import gzip
import json
import struct
import tempfile
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from scipy import sparse

from anysplade._common.arguments import require, require_list
from anysplade._common.files import atomic_folder, user_path, whole_file
from anysplade.data.corpus import Document
from anysplade.data.text import is_utf8
from anysplade.errors import DataError, OptionError
from anysplade.model.vocabulary import name_terms
from anysplade.search.documents import EncodedDocument, check_vector
from anysplade.search.vectors import ids_file

_DOCUMENTS_PER_FILE = 100_000
_ROW_GROUP = 16_384  # documents
_INT32 = 2**31 - 1


def export_anserini(
    documents: Iterable[EncodedDocument], tokens: Sequence[str | None], folder: str | Path, quantization: int = 100
) -> int:
    """Write a JsonVectorCollection, for ``IndexCollection -impact -pretokenized``; returns the number of documents.

    Only the ids of the documents stay in memory.

    Args:
        documents: encoded by one model.
        tokens: (vocabulary,) by term id; None for a term without a token.
        folder: gets ``0000.jsonl`` and so on, with 100,000 documents each.
        quantization: factor of the weights, which are then rounded.

    Raises:
        OutputError: ``folder`` is not empty.
        DataError: a vector is malformed, or an id is repeated, empty or contains white space, which run files cannot represent.
    """
    names, count = name_terms(tokens), 0
    with atomic_folder(folder) as work, ExitStack() as files:
        for document, terms, impacts in _quantized(documents, len(names), quantization):
            if count % _DOCUMENTS_PER_FILE == 0:
                files.close()
                file = files.enter_context(open(work / f"{count // _DOCUMENTS_PER_FILE:04}.jsonl", "w", encoding="utf-8"))
            vector = {names[term]: impact for term, impact in zip(terms.tolist(), impacts.tolist(), strict=True)}
            file.write(json.dumps({"id": document.id, "contents": document.content.full_text, "vector": vector}) + "\n")
            count += 1
        files.close()
    return count


def export_ciff(
    documents: Iterable[EncodedDocument], tokens: Sequence[str | None], path: str | Path, quantization: int = 100
) -> int:
    """Write a Common Index File (https://github.com/osirrc/ciff); returns the number of documents.

    All postings are in memory to be sorted by term, which takes about 20 bytes per posting. The length of a document is the sum
    of its quantized weights. ``documents``, ``tokens`` and ``quantization`` are as in ``export_anserini``.

    Args:
        path: the file.

    Raises:
        OutputError: ``path`` is a folder, or cannot be written.
        DataError: see ``export_anserini``.
    """
    names, ids, lengths = name_terms(tokens), [], array("q")
    indices, data, indptr = array("i"), array("i"), array("q", [0])
    for document, terms, impacts in _quantized(documents, len(names), quantization):
        ids.append(document.id)
        indices.frombytes(terms.tobytes())
        data.frombytes(impacts.astype(np.int32).tobytes())
        indptr.append(len(indices))
        lengths.append(int(impacts.sum()))
        if lengths[-1] > _INT32:
            raise DataError(f"document {document.id[:80]!r}: its weights' sum times {quantization} is no int32; quantize with less")
    rows = sparse.csr_matrix((np.asarray(data), np.asarray(indices), np.asarray(indptr)), shape=(len(ids), len(names)))
    columns = rows.tocsc()  # the document numbers of a term rise
    used = sorted(np.flatnonzero(np.diff(columns.indptr)).tolist(), key=lambda term: names[term].encode())
    total = sum(lengths)
    with whole_file(path) as file:
        counts = [(1, 1), (2, len(used)), (3, len(ids)), (4, len(used)), (5, len(ids)), (6, total)]
        mean = b"\x39" + struct.pack("<d", total / max(1, len(ids)))  # field 7, a double
        label = f"anysplade; impacts are weights times {quantization}"
        file.write(_delimited(b"".join(_number(*count) for count in counts) + mean + _bytes(8, label.encode())))
        for term in used:
            span = slice(columns.indptr[term], columns.indptr[term + 1])
            numbers, impacts = columns.indices[span].astype(np.int64), columns.data[span].astype(np.int64)
            head = _bytes(1, names[term].encode()) + _number(2, len(numbers)) + _number(3, int(impacts.sum()))
            file.write(_delimited(head + _postings(np.diff(numbers, prepend=0), impacts)))
        for number, (id_, length) in enumerate(zip(ids, lengths, strict=True)):
            file.write(_delimited(_number(1, number) + _bytes(2, id_.encode()) + _number(3, length)))
    return len(ids)


def export_vectors(documents: Iterable[EncodedDocument], tokens: Sequence[str | None], place: str | Path) -> int:
    """Write the vectors as they are, without rounding, in a form that ``Index.from_vectors`` reads; returns their number.

    Args:
        documents: encoded by one model.
        tokens: (vocabulary,) by term id; None for a term without a token.
        place: a file whose name ends in .jsonl or .jsonl.gz (Anserini's JSON vectors, with metadata), .npz (a CSR matrix, with the
            ids in NAME.ids.txt beside it, without texts) or .parquet (columns id, indices, values, title, text and metadata, which
            is JSON); or a folder, for files of JSON with 100,000 documents each.

    Raises:
        OutputError: ``place`` cannot be written, or is a folder that is not empty.
        DataError: an id cannot stand in a line of the file of ids.
    """
    path = user_path(place)
    names = name_terms(tokens)
    form = path.name.lower()
    if form.endswith(".npz"):
        return _write_matrix(documents, len(names), path)
    if form.endswith(".parquet"):
        return _write_parquet(documents, path)
    if form.endswith((".jsonl", ".jsonl.gz")):
        with whole_file(path) as file:
            packed = gzip.GzipFile("", "wb", 6, file, 0) if form.endswith(".gz") else None
            count = _write_lines(documents, names, packed or file)
            if packed is not None:
                packed.close()
        return count
    if path.suffix and not path.is_dir():
        raise OptionError(
            f"{place}: unknown form of vectors; name it .jsonl, .jsonl.gz, .npz or .parquet, or a folder without a dot"
        )
    iterator, count = iter(documents), 0
    with atomic_folder(path) as work:
        while part := list(islice(iterator, 1)):
            with open(work / f"{count // _DOCUMENTS_PER_FILE:04}.jsonl", "wb") as file:
                count += _write_lines([*part], names, file) + _write_lines(islice(iterator, _DOCUMENTS_PER_FILE - 1), names, file)
    return count


def _write_lines(documents: Iterable[EncodedDocument], names: Sequence[str], file: Any) -> int:
    count = 0
    for id_, content, terms, weights in documents:
        vector = {names[term]: weight for term, weight in zip(terms.tolist(), weights.tolist(), strict=True)}
        line: dict[str, Any] = {"id": id_, "contents": content.full_text}
        line |= {"title": content.title, "text": content.text} if content.title else {}
        line |= {} if content.metadata is None else {"metadata": content.metadata}
        file.write((json.dumps(line | {"vector": vector}) + "\n").encode())
        count += 1
    return count


def _write_matrix(documents: Iterable[EncodedDocument], vocabulary: int, path: Path) -> int:
    """A CSR matrix as ``scipy.sparse.save_npz`` writes it, uncompressed; indices and data wait in files, not in memory."""
    indptr = array("q", [0])
    with (
        tempfile.TemporaryFile(dir=path.parent if path.parent.is_dir() else None) as indices,
        tempfile.TemporaryFile(dir=path.parent if path.parent.is_dir() else None) as data,
        whole_file(ids_file(path)) as ids,
        whole_file(path) as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        for id_, _, terms, weights in documents:
            if len(id_.splitlines()) != 1 or not is_utf8(id_):
                raise DataError(f"document {id_[:80]!r}: its id is no line of text; rename it, or write .parquet")
            ids.write(f"{id_}\n".encode())
            indices.write(terms.astype(np.int32).tobytes())
            data.write(weights.astype(np.float32).tobytes())
            indptr.append(indptr[-1] + len(terms))
        count = len(indptr) - 1
        for name, value in {"format": b"csr", "shape": [count, vocabulary], "indptr": np.asarray(indptr)}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(value))
        for name, values, kind in (("indices", indices, "<i4"), ("data", data, "<f4")):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": kind, "fortran_order": False, "shape": (indptr[-1],)}
                np.lib.format.write_array_header_1_0(member, header)
                _copy(values, member)
    return count


def _copy(source: BinaryIO, target: Any) -> None:
    source.seek(0)
    while block := source.read(2**20):
        target.write(block)


def _write_parquet(documents: Iterable[EncodedDocument], path: Path) -> int:
    import pyarrow  # here because it is slow to import
    from pyarrow import parquet

    types = {"id": pyarrow.string(), "indices": pyarrow.list_(pyarrow.int32()), "values": pyarrow.list_(pyarrow.float32())}
    schema = pyarrow.schema(types | dict.fromkeys(("title", "text", "metadata"), pyarrow.string()))
    iterator, count = iter(documents), 0
    with whole_file(path) as file, closing(parquet.ParquetWriter(file, schema)) as writer:
        while part := list(islice(iterator, _ROW_GROUP)):
            rows = [
                (id_, terms, weights, title, text, None if metadata is None else json.dumps(metadata))
                for id_, (title, text, metadata), terms, weights in part
            ]
            columns = dict(zip(schema.names, zip(*rows, strict=True), strict=True))
            writer.write_table(pyarrow.table(columns, schema=schema))
            count += len(part)
    return count


def export_queries(
    ids: Sequence[str], vectors: sparse.csr_matrix, tokens: Sequence[str | None], path: str | Path, quantization: int = 100
) -> int:
    """Write queries for Anserini (``-topicReader TsvString`` with ``-impact -pretokenized``); returns their number.

    A line has the id, a tab, and each term as many times as its quantized weight, because these tools weight a term by its count.
    PISA and BMP read the same with a colon in place of the tab.
    ``tokens`` and ``quantization`` are as in ``export_anserini``.

    Args:
        ids: of the queries.
        vectors: (queries, vocabulary), in the order of the ids.
        path: the file.

    Raises:
        OutputError: ``path`` is a folder, or cannot be written.
        DataError: see ``export_anserini``.
    """
    ids, names = require_list("ids", ids, "id"), name_terms(tokens)
    rows = (EncodedDocument(id_, Document("", ""), row.indices, row.data) for id_, row in zip(ids, vectors, strict=True))
    with whole_file(path) as file:
        for query, terms, impacts in _quantized(rows, len(names), quantization, "query"):
            words = (" ".join([names[term]] * impact) for term, impact in zip(terms.tolist(), impacts.tolist(), strict=True))
            file.write(f"{query.id}\t{' '.join(words)}\n".encode())
    return len(ids)


def _quantized(
    documents: Iterable[EncodedDocument], vocabulary: int, quantization: int, kind: str = "document"
) -> Iterator[tuple[EncodedDocument, np.ndarray, np.ndarray]]:
    """Documents with their terms, (active dims,) int32, and impacts, (active dims,) int64, without zeros."""
    if quantization < 1:
        raise OptionError(f"quantization {quantization}: give 1 or more")
    seen: set[str] = set()
    for document in documents:
        require("documents", document, EncodedDocument, "give index.store of an index, or a list of anysplade.EncodedDocument")
        label = f"{kind} {document.id[:80]!r}"
        if document.id.split() != [document.id] or not is_utf8(document.id):
            raise DataError(f"{label}: an empty id, or one with white space, cannot stand in a run file; rename it")
        if document.id in seen:
            raise DataError(f"{label}: duplicate id; ids must be unique")
        seen.add(document.id)
        terms, weights = check_vector(label, document.terms, document.weights, vocabulary)
        impacts = np.rint(weights.astype(np.float64) * quantization)
        if len(impacts) and impacts.max() > _INT32:
            raise DataError(f"{label}: a weight of {weights.max()} times {quantization} is no int32; quantize with less")
        kept = impacts > 0
        yield document, terms[kept], impacts[kept].astype(np.int64)


# ------------------------------------------------------------------- protobuf, for the messages of CIFF


def _varint(value: int) -> bytes:
    """Seven bits per byte, the lowest first; the eighth bit is set in all bytes but the last."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _delimited(value)


def _delimited(message: bytes) -> bytes:
    return _varint(len(message)) + message


def _varints(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The varints of n numbers below 2^31: bytes, (n, 5) uint8, and the number of them that are used, (n,)."""
    groups = values[:, None] >> np.arange(0, 35, 7)  # (n, 5)
    sizes = np.maximum(1, (groups > 0).sum(axis=1))
    more = np.arange(5) < sizes[:, None] - 1
    return (groups & 0x7F | more << 7).astype(np.uint8), sizes


def _postings(gaps: np.ndarray, impacts: np.ndarray) -> bytes:
    """Field 4 of a postings list, repeated: the gap to the previous document number (field 1) and the impact (field 2)."""
    (first, first_sizes), (second, second_sizes) = _varints(gaps), _varints(impacts)
    rows = np.empty((len(gaps), 14), np.uint8)
    rows[:, 0], rows[:, 1] = 4 << 3 | 2, 2 + first_sizes + second_sizes
    rows[:, 2], rows[:, 3:8] = 1 << 3, first
    rows[:, 8], rows[:, 9:] = 2 << 3, second
    kept = np.ones(rows.shape, bool)
    kept[:, 3:8] = np.arange(5) < first_sizes[:, None]
    kept[:, 9:] = np.arange(5) < second_sizes[:, None]
    return rows[kept].tobytes()

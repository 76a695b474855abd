"""Queries and documents from the docstrings of installed Python packages.

A docstring that begins with a summary line (PEP 257) gives a query, the summary, and a document, the rest. Packages are
parsed, never imported, so reading them has no side effects, and the same environment gives the same texts.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from anysplade._common.progress import bar
from anysplade.errors import DataError

# Dependencies of anysplade with good documentation.
PACKAGES = ("networkx", "numpy", "pandas", "scikit-learn", "scipy", "sympy")

_SHINGLE_WORDS = 8
_NEAR_DUPLICATE = 0.3  # a document is a near-duplicate if it shares more of its shingles with earlier documents
_TEST_SHARE = 1 / 3  # share of the modules in the test split
_QUERY_WORDS = range(3, 31)
_MIN_TEST_QUERY_WORDS = 8
_MIN_DOCUMENT_WORDS = 40
_PASSAGE = re.compile(r"(?:\S+\s+){0,59}\S+")  # the first 60 words, so that small models read the same text as BM25


class Docstring(NamedTuple):
    """The docstring of a module, class or function."""

    name: str  # dotted path
    text: str  # indentation removed

    @property
    def held_out(self) -> bool:
        """Whether it is in the test split, by a hash of the first three parts of its path, so that a module is in one split."""
        module = ".".join(self.name.split(".")[:3])
        return int.from_bytes(hashlib.sha256(module.encode()).digest()[:4]) < _TEST_SHARE * 2**32


class Entry(NamedTuple):
    """A query with its document."""

    name: str  # of the docstring
    query: str  # the summary
    document: str  # the first 60 words of the rest

    @property
    def is_test_query(self) -> bool:
        """Whether the query is long enough (eight words) to identify one document."""
        return len(_words(self.query)) >= _MIN_TEST_QUERY_WORDS


def read_docstrings(packages: Iterable[str] | None = None, progress: bool = False) -> Iterator[Docstring]:
    """Read the docstrings of the named distributions (all installed ones if None), except those of their tests."""
    if packages is None:
        packages = sorted({d.metadata["Name"] for d in importlib.metadata.distributions()}, key=str.lower)
    sources: list[tuple[str, Path]] = []
    for package in packages:
        try:
            files = importlib.metadata.distribution(package).files or []
        except importlib.metadata.PackageNotFoundError:
            raise DataError(f"python-docs: package {package!r} is not installed; run: pip install {package}") from None
        for file in sorted(files, key=str):
            if file.suffix == ".py" and not {"tests", "test", "_tests", "testing", ".."} & set(file.parts):
                parts = file.with_suffix("").parts
                module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                sources.append((module, Path(str(file.locate()))))
    with bar("reading docstrings", "file", len(sources), progress) as shown:
        for module, path in sources:
            shown.update()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes in other people's code
                    tree = ast.parse(path.read_bytes())
            except (OSError, SyntaxError, ValueError):  # a template for other versions, or a removed file
                continue
            yield from _docstrings(tree, module)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[Docstring]:
    text = ast.get_docstring(node, clean=False)
    if text:
        yield Docstring(name, inspect.cleandoc(text))
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def split_entries(docstrings: Iterable[Docstring]) -> tuple[list[Entry], list[Entry]]:
    """Make queries with their documents, as (train, test), split by module.

    A docstring is left out if its summary is not on a line of its own, if the summary or the rest is too short, if the rest
    repeats the summary, if the summary is a duplicate, or if the rest is a near-duplicate of earlier documents, which contain
    more than 30 % of its runs of eight words. The test split is made first, so that its near-duplicates are left out of
    training. Docstrings of private functions and classes are used only for training.
    """
    seen_queries: set[str] = set()
    seen_shingles: set[int] = set()
    train: list[Entry] = []
    test: list[Entry] = []
    for docstring in sorted(docstrings, key=lambda d: (not d.held_out, d.name)):
        summary, _, rest = docstring.text.partition("\n")
        passage = _PASSAGE.match(rest.strip())
        query, document = summary.strip(), passage.group() if passage else ""
        query_words, words = _words(query), _words(document)
        key = " ".join(query_words)
        is_private = docstring.name.rpartition(".")[2].startswith("_")
        if (
            (is_private and docstring.held_out)
            or not rest.startswith("\n")
            or len(query_words) not in _QUERY_WORDS
            or len(words) < _MIN_DOCUMENT_WORDS
            or key in seen_queries
            or key in " ".join(words)
        ):
            continue
        # Hashes of strings differ between processes, but equal strings always have equal hashes.
        shingles = {hash(tuple(words[i : i + _SHINGLE_WORDS])) for i in range(len(words) - _SHINGLE_WORDS + 1)}
        if len(shingles & seen_shingles) > _NEAR_DUPLICATE * len(shingles):
            continue
        seen_queries.add(key)
        seen_shingles |= shingles
        (test if docstring.held_out else train).append(Entry(docstring.name, query, document))
    return train, test


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())

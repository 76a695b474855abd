"""Search engines that run as servers, and files for engines that read an index.

engine = open_engine("qdrant://localhost:6333/docs")
engine.create({"model": name, "model_fingerprint": fingerprint})
engine.upload(documents)
engine.search(terms, weights, k=10)
"""

import os
import re
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from anysplade._common.extras import extra
from anysplade.errors import OptionError, without_credentials
from anysplade.search.engines.export import export_anserini, export_ciff

if TYPE_CHECKING:  # the libraries are optional
    from anysplade.search.engines.opensearch import OpenSearchEngine
    from anysplade.search.engines.qdrant import QdrantEngine

__all__ = ["export_anserini", "export_ciff", "open_engine"]

_NAME = {"qdrant": r"[A-Za-z0-9][\w.-]{0,254}", "opensearch": r"[a-z0-9][a-z0-9_.-]{0,254}"}  # what both the server and a URL take
_EXAMPLES = "qdrant://localhost:6333/docs, opensearch://user:password@localhost:9200/docs; qdrants:// and opensearchs:// are https"


def open_engine(address: str) -> "QdrantEngine | OpenSearchEngine":
    """The engine at an address, ``SCHEME://HOST[:PORT]/NAME``; nothing is sent yet.

    Schemes: ``qdrant`` and ``opensearch`` (http), ``qdrants`` and ``opensearchs`` (https). Qdrant's API key is read from
    ``QDRANT_API_KEY``; OpenSearch's user and password stand before the host, percent-encoded.

    Raises:
        OptionError: a malformed address.
        ExtraError: the engine's library is not installed.
    """
    # No message repeats a password, nor a part of the address alone, which can be one where it is not percent-encoded.
    label = without_credentials(address) if "://" in address else "without ://"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        raise OptionError(f"{label}: no address of an engine; such as {_EXAMPLES}; percent-encode the password") from None
    kind, secure, name = parts.scheme.removesuffix("s"), parts.scheme.endswith("s"), parts.path.removeprefix("/")
    if kind not in _NAME or not parts.hostname or parts.query or parts.fragment:
        raise OptionError(f"{label}: no address of an engine; such as {_EXAMPLES}")
    if not re.fullmatch(_NAME[kind], name, re.ASCII):
        raise OptionError(f"{label}: not the name of a collection at its end; letters (OpenSearch: small), digits and _ . - can")
    if kind == "qdrant" and parts.username is not None:
        raise OptionError(f"{label}: Qdrant has no users; put its key into the environment as QDRANT_API_KEY")
    with extra(kind):
        if kind == "qdrant":
            from anysplade.search.engines.qdrant import QdrantEngine

            return QdrantEngine.at(parts.hostname, port or 6333, name, secure, os.environ.get("QDRANT_API_KEY"))
        from anysplade.search.engines.opensearch import OpenSearchEngine
    login = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
    return OpenSearchEngine.at(parts.hostname, port or 9200, name, secure, login)

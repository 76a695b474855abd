"""Search engines that run as servers.

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

if TYPE_CHECKING:  # the libraries are optional
    from anysplade.search.engines.opensearch import OpenSearchEngine
    from anysplade.search.engines.qdrant import QdrantEngine

# Names that the server accepts and that need no escaping in a URL.
_NAME = {"qdrant": r"[A-Za-z0-9][\w.-]{0,254}", "opensearch": r"[a-z0-9][a-z0-9_.-]{0,254}"}
_EXAMPLES = "qdrant://localhost:6333/docs, opensearch://user:password@localhost:9200/docs; qdrants:// and opensearchs:// are https"


def open_engine(address: str) -> "QdrantEngine | OpenSearchEngine":
    """The engine at an address, ``SCHEME://HOST[:PORT]/NAME``; no request is sent yet.

    The schemes are ``qdrant`` and ``opensearch`` (http), ``qdrants`` and ``opensearchs`` (https). Qdrant's API key is read from
    ``QDRANT_API_KEY``. OpenSearch's user and password precede the host, percent-encoded.

    Raises:
        OptionError: the address is malformed.
        ExtraError: the library of the engine is not installed.
    """
    # Messages contain no password, and no single part of the address: a password that is not encoded can end up in any of them.
    label = without_credentials(address) if "://" in address else "without ://"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        raise OptionError(f"{label}: not an address of an engine, such as {_EXAMPLES}; percent-encode the password") from None
    kind, secure, name = parts.scheme.removesuffix("s"), parts.scheme.endswith("s"), parts.path.removeprefix("/")
    if kind not in _NAME or not parts.hostname or parts.query or parts.fragment:
        raise OptionError(f"{label}: not an address of an engine, such as {_EXAMPLES}")
    if not re.fullmatch(_NAME[kind], name, re.ASCII):
        raise OptionError(
            f"{label}: ends in no valid name, such as docs; letters (OpenSearch: lower case), digits and _ . - are valid"
        )
    if kind == "qdrant" and parts.username is not None:
        raise OptionError(f"{label}: Qdrant has no users; put its key into the environment as QDRANT_API_KEY")
    with extra(kind):
        if kind == "qdrant":
            from anysplade.search.engines.qdrant import QdrantEngine

            return QdrantEngine.at(parts.hostname, port or 6333, name, secure, os.environ.get("QDRANT_API_KEY"))
        from anysplade.search.engines.opensearch import OpenSearchEngine
    login = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
    return OpenSearchEngine.at(parts.hostname, port or 9200, name, secure, login)

"""Train a SPLADE sparse retriever on any masked language model.

The public names are those of ``__init__.pyi``. Each is imported on first use: the libraries behind them take seconds.
"""

from typing import Any

import lazy_loader

__version__ = "0.1.0"

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    try:
        return _load(name)
    except ModuleNotFoundError as error:
        from anysplade._common.extras import missing_library

        raise missing_library(error) from error

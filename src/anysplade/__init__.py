"""Train a SPLADE sparse retriever on any masked language model.

The public names are those of ``__init__.pyi``. Each is imported on first use: the libraries behind them take seconds.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

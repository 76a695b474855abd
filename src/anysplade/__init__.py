"""Train a SPLADE sparse retriever on any masked language model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from anysplade.data.collections import Collection, Document, Pair, load_collection, read_corpus, write_collection
    from anysplade.data.pairs import load_pairs, read_pairs
    from anysplade.errors import (
        AnyspladeError,
        CollapseError,
        DataError,
        MeasureError,
        ModelError,
        OptionError,
        OutputError,
        UsageError,
    )
    from anysplade.evaluation.comparisons import Comparison, Evaluations, compare, evaluate_all
    from anysplade.evaluation.evaluations import Evaluation, evaluate
    from anysplade.model.calibration import Calibration, calibrate
    from anysplade.model.encoder import load_encoder
    from anysplade.model.head import HeadReport, inspect_head, rescale_head
    from anysplade.search.documents import Hit, TermMatch
    from anysplade.search.index import Index
    from anysplade.study.plan import StudyConfig
    from anysplade.study.results import StudyResult
    from anysplade.study.run import run_study
    from anysplade.training.config import TrainingConfig
    from anysplade.training.mining import Mined, mine, score
    from anysplade.training.run import TrainingResult, train

# Where each public name lives. They are imported on first use: the libraries behind them take seconds.
_HOME = {
    "AnyspladeError": "errors",
    "Calibration": "model.calibration",
    "CollapseError": "errors",
    "Collection": "data.collections",
    "Comparison": "evaluation.comparisons",
    "DataError": "errors",
    "Document": "data.collections",
    "Evaluation": "evaluation.evaluations",
    "Evaluations": "evaluation.comparisons",
    "HeadReport": "model.head",
    "Hit": "search.documents",
    "Index": "search.index",
    "MeasureError": "errors",
    "Mined": "training.mining",
    "ModelError": "errors",
    "OptionError": "errors",
    "OutputError": "errors",
    "Pair": "data.collections",
    "StudyConfig": "study.plan",
    "StudyResult": "study.results",
    "TermMatch": "search.documents",
    "TrainingConfig": "training.config",
    "TrainingResult": "training.run",
    "UsageError": "errors",
    "calibrate": "model.calibration",
    "compare": "evaluation.comparisons",
    "evaluate": "evaluation.evaluations",
    "evaluate_all": "evaluation.comparisons",
    "inspect_head": "model.head",
    "load_collection": "data.collections",
    "load_encoder": "model.encoder",
    "load_pairs": "data.pairs",
    "mine": "training.mining",
    "read_corpus": "data.collections",
    "read_pairs": "data.pairs",
    "rescale_head": "model.head",
    "run_study": "study.run",
    "score": "training.mining",
    "train": "training.run",
    "write_collection": "data.collections",
}

__all__ = [
    "AnyspladeError",
    "Calibration",
    "CollapseError",
    "Collection",
    "Comparison",
    "DataError",
    "Document",
    "Evaluation",
    "Evaluations",
    "HeadReport",
    "Hit",
    "Index",
    "MeasureError",
    "Mined",
    "ModelError",
    "OptionError",
    "OutputError",
    "Pair",
    "StudyConfig",
    "StudyResult",
    "TermMatch",
    "TrainingConfig",
    "TrainingResult",
    "UsageError",
    "__version__",
    "calibrate",
    "compare",
    "evaluate",
    "evaluate_all",
    "inspect_head",
    "load_collection",
    "load_encoder",
    "load_pairs",
    "mine",
    "read_corpus",
    "read_pairs",
    "rescale_head",
    "run_study",
    "score",
    "train",
    "write_collection",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Train a SPLADE sparse retriever on any masked language model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from anysplade.calibration import Calibration, calibrate
    from anysplade.comparison import Comparison, Evaluations, compare, evaluate_all
    from anysplade.datasets import Collection, Document, Pair, load_collection, read_corpus, write_collection
    from anysplade.encoder import load_encoder
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
    from anysplade.evaluation import Evaluation, evaluate
    from anysplade.head import HeadReport, inspect_head, rescale_head
    from anysplade.index import Index
    from anysplade.mining import Mined, mine, score
    from anysplade.options import TrainingConfig
    from anysplade.records import Hit, TermMatch
    from anysplade.study import StudyConfig, StudyResult, run_study
    from anysplade.training import TrainingResult, train
    from anysplade.training_data import load_pairs, read_pairs

# Where each public name lives. They are imported on first use: the libraries behind them take seconds.
_HOME = {
    "AnyspladeError": "errors",
    "Calibration": "calibration",
    "CollapseError": "errors",
    "Collection": "datasets",
    "Comparison": "comparison",
    "DataError": "errors",
    "Document": "datasets",
    "Evaluation": "evaluation",
    "Evaluations": "comparison",
    "HeadReport": "head",
    "Hit": "records",
    "Index": "index",
    "MeasureError": "errors",
    "Mined": "mining",
    "ModelError": "errors",
    "OptionError": "errors",
    "OutputError": "errors",
    "Pair": "datasets",
    "StudyConfig": "study",
    "StudyResult": "study",
    "TermMatch": "records",
    "TrainingConfig": "options",
    "TrainingResult": "training",
    "UsageError": "errors",
    "calibrate": "calibration",
    "compare": "comparison",
    "evaluate": "evaluation",
    "evaluate_all": "comparison",
    "inspect_head": "head",
    "load_collection": "datasets",
    "load_encoder": "encoder",
    "load_pairs": "training_data",
    "mine": "mining",
    "read_corpus": "datasets",
    "read_pairs": "training_data",
    "rescale_head": "head",
    "run_study": "study",
    "score": "mining",
    "train": "training",
    "write_collection": "datasets",
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

"""The results of the studies in a folder, read and written as ``study.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, TypeAdapter, ValidationError, WrapSerializer

from anysplade._common.tables import Tabular
from anysplade.errors import OutputError
from anysplade.evaluation.evaluations import Evaluation
from anysplade.evaluation.significance import SIGNIFICANT
from anysplade.study.arms import Arm, Axis
from anysplade.study.cells import METRICS, CellRecord, Effectiveness, Scores, Start


def _without_none(value: Any, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
    return {name: item for name, item in write(value).items() if item is not None}


_WITHOUT_NONE = WrapSerializer(_without_none)


@dataclass(frozen=True)
class Means:
    """Means of a row's trainings on one collection, with standard deviations over seeds (None for a single training)."""

    ndcg: Annotated[float, Field(alias=METRICS[0])]
    ndcg_sd: Annotated[float | None, Field(alias=f"{METRICS[0]} sd")]
    rr: Annotated[float, Field(alias=METRICS[1])]
    rr_sd: Annotated[float | None, Field(alias=f"{METRICS[1]} sd")]
    recall: Annotated[float, Field(alias=METRICS[2])]
    recall_sd: Annotated[float | None, Field(alias=f"{METRICS[2]} sd")]
    query_active_dims: float
    query_active_dims_sd: Annotated[float | None, Field(alias="query_active_dims sd")]
    document_active_dims: float
    document_active_dims_sd: Annotated[float | None, Field(alias="document_active_dims sd")]
    flops: float
    flops_sd: Annotated[float | None, Field(alias="flops sd")]

    @property
    def text(self) -> str:
        return plus_minus(self.ndcg, self.ndcg_sd)


def plus_minus(mean: float, spread: float | None, sign: str = "") -> str:
    """Format a mean with its spread, if known; the sign "+" shows a plus before positive means."""
    return f"{mean:{sign}.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


@dataclass(frozen=True, kw_only=True)
class RowRuns:
    """A row of a study with its finished and failed trainings."""

    backbone: str
    key: Arm
    arm: str  # label of the arm
    cells: list[str]  # hashes of the finished cells
    axis: Annotated[Axis, _WITHOUT_NONE]
    failed: list[str] = field(default_factory=list)  # messages of the failed trainings

    @property
    def label(self) -> str:
        return self.arm if self.axis.weight is None else f"{self.arm}, weight {self.axis.weight:g}"


@dataclass(frozen=True, kw_only=True)
class RowResult(RowRuns):
    """A row with its means over seeds; ``temperature``, ``before`` and ``after`` are from the first seed."""

    runs: int
    k: float
    shift: float
    temperature: float
    results: dict[str, Means]  # by collection
    before: Start
    after: Start
    findings: list[str]  # names of what the monitor found in any training


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """A tested difference of two rows of the same backbone."""

    backbone: str
    difference: float
    p: float
    noise: float | None  # half the width of the difference's 95 % interval over seeds; None if a row has one training
    p_corrected: float

    @property
    def counts(self) -> bool:
        """Whether the difference is significant over queries and above the noise of the seeds."""
        return self.noise is not None and self.p_corrected < SIGNIFICANT and abs(self.difference) > self.noise


@dataclass(frozen=True, kw_only=True)
class PairedTest(_Difference):
    """A row compared with another row, over the queries of a collection."""

    collection: str
    key: Arm  # of the other row
    against: str  # label of the other row
    flops: float
    flops_of_other: Annotated[float, Field(alias="flops of the other")]
    head: str = "auto"  # label of the row


@dataclass(frozen=True, kw_only=True)
class ControlPair(_Difference):
    """Two rows that differ in one thing."""

    about: str  # what they differ in
    one: str  # label of the first row
    other: str
    values: tuple[str, str]
    flops: tuple[float, float]
    conclusion: Annotated[str, Field(alias="said")]


Curve = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class Curves:
    """Quantities over the steps, one curve per seed."""

    query_active_dims: list[Curve]
    document_active_dims: list[Curve]
    score_std: list[Curve]
    document_similarity: list[Curve]
    loss: list[Curve]
    gradient_norm: list[Curve]


@dataclass(frozen=True)
class RowCurves:
    backbone: str
    key: Arm
    arm: str  # label of the arm
    curves: Curves


Grouped = TypeVar("Grouped", RowResult, RowCurves)


def by_backbone(rows: Sequence[Grouped]) -> list[tuple[str, list[Grouped]]]:
    """Group rows by backbone, in the order of the first rows."""
    names = dict.fromkeys(row.backbone for row in rows)
    return [(name, [row for row in rows if row.backbone == name]) for name in names]


@dataclass(frozen=True)
class Settings:
    """The settings with which a study was run."""

    backbones: tuple[str, ...]
    data: str
    collections: tuple[str, ...]
    seeds: int
    k: float
    training: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Study:
    """The rows of a study and what follows from them; the optional parts depend on the study."""

    settings: Settings
    rows: list[RowResult]  # with at least one finished training
    tests: list[PairedTest] | None = None
    pairs: list[ControlPair] | None = None
    correlations: dict[str, dict[str, float]] | None = None  # Spearman's, by group of heads and statistic before training
    curves: list[RowCurves] | None = None
    conclusions: list[str]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class CellSummary:
    """The part of a cell's record that the report shows."""

    k: float
    shift: float
    temperature: float
    commands: list[str]
    seconds: float
    backbone_fingerprint: str | None
    data_hash: str
    seed: int
    results: dict[str, Scores]  # by collection
    findings: list[str]
    commit: str | None
    versions: dict[str, str]
    hardware: dict[str, Any]


def summarize_cell(record: CellRecord) -> CellSummary:
    """Reduce a record to what ``study.json`` contains."""
    findings = [finding["name"] for finding in record.findings]
    values = vars(record) | record.provenance | {"seed": record.options["seed"], "findings": findings}
    return TypeAdapter(CellSummary).validate_python(values)


@dataclass(frozen=True)
class Baseline(Effectiveness):
    """BM25 on a collection."""

    data_hash: str | None = None
    language: str | None = None  # of the stemmer and stop words


def baseline(evaluation: Evaluation) -> Baseline:
    """Reduce an evaluation of BM25 to what ``study.json`` contains."""
    return TypeAdapter(Baseline).validate_python(evaluation.to_dict())


@dataclass(frozen=True, repr=False)
class StudyResult(Tabular):
    """The content of ``study.json``: all studies in the folder, and each cell's numbers with the commands that reproduce them."""

    studies: dict[str, Annotated[Study, _WITHOUT_NONE]]  # by name
    cells: dict[str, CellSummary]  # by hash
    bm25: dict[str, Baseline]  # by collection
    failed: dict[str, str]  # messages of failed cells by hash
    report: str  # path of report.html
    unstemmed: dict[str, Baseline] = field(default_factory=dict)  # BM25 without stemming by collection, if folding was studied

    def to_dict(self) -> dict[str, Any]:
        """The content of ``study.json``."""
        return _RESULT.dump_python(self, mode="json", by_alias=True)

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"study": name, "backbone": row.backbone, "arm": row.label, "trainings": row.runs, "collection": collection}
            | TypeAdapter(Means).dump_python(means, by_alias=True)
            for name, study in self.studies.items()
            for row in study.rows
            for collection, means in row.results.items()
        ]


_RESULT = TypeAdapter(StudyResult)


def read_results(file: Path) -> StudyResult:
    """Read a ``study.json``; raises OutputError if an older version of anysplade wrote it."""
    try:
        return _RESULT.validate_json(file.read_bytes())
    except ValidationError as error:
        raise OutputError(
            f"{file}: written by an older version; remove it (its cells stay, and are used if they still hold)"
        ) from error

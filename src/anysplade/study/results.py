"""The results of the studies in a folder, and the one place that reads and writes them as JSON (``study.json``)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, TypeAdapter, ValidationError, WrapSerializer

from anysplade._common.tables import Tabular
from anysplade.errors import OutputError
from anysplade.evaluation.evaluations import Evaluation
from anysplade.study.arms import Arm, Axis
from anysplade.study.cells import METRICS, CellRecord, Scores, Start


def _without_none(value: Any, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
    return {name: item for name, item in write(value).items() if item is not None}


_WITHOUT_NONE = WrapSerializer(_without_none)


@dataclass(frozen=True)
class Means:
    """Means of a row's trainings on one collection, with standard deviations over seeds (None of a single training)."""

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
    """A mean and how far it spreads, if that is known, as text; with the sign "+" a plus is shown too."""
    return f"{mean:{sign}.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


@dataclass(frozen=True, kw_only=True)
class RowRuns:
    """A row of a study and what became of its trainings."""

    backbone: str
    key: Arm
    arm: str  # the label of the key
    cells: list[str]  # hashes of the records
    axis: Annotated[Axis, _WITHOUT_NONE]
    failed: list[str] = field(default_factory=list)  # messages of the trainings that failed

    @property
    def label(self) -> str:
        return self.arm if self.axis.weight is None else f"{self.arm}, weight {self.axis.weight:g}"


@dataclass(frozen=True, kw_only=True)
class RowResult(RowRuns):
    """A row with its means over seeds; ``before``, ``after`` and ``temperature`` are those of the first seed."""

    runs: int
    k: float
    shift: float
    temperature: float
    results: dict[str, Means]  # by collection
    before: Start
    after: Start
    findings: list[str]  # names, of all trainings


@dataclass(frozen=True)
class PairedTest:
    """A row against another one of the same backbone, over the queries of a collection."""

    backbone: str
    collection: str
    key: Arm  # of the other row
    against: str  # its label
    difference: float
    p: float
    noise: float | None  # of the seeds: half the width of the difference's 95 % interval; None if a row has one training
    flops: float
    flops_of_other: Annotated[float, Field(alias="flops of the other")]
    p_corrected: float
    head: str = "auto"  # the label of the row


@dataclass(frozen=True)
class ControlPair:
    """Two rows that differ in one thing."""

    backbone: str
    about: str  # that thing
    one: str
    other: str
    difference: float
    p: float
    noise: float | None
    values: tuple[str, str]
    flops: tuple[float, float]
    p_corrected: float
    conclusion: Annotated[str, Field(alias="said")]


Curve = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class Curves:
    """Quantities over the steps, a curve for each seed."""

    query_active_dims: list[Curve]
    document_active_dims: list[Curve]
    score_std: list[Curve]
    document_similarity: list[Curve]
    loss: list[Curve]
    gradient_norm: list[Curve]


@dataclass(frozen=True)
class RowCurves:
    """The curves of a row."""

    backbone: str
    key: Arm
    arm: str
    curves: Curves


Grouped = TypeVar("Grouped", RowResult, RowCurves)


def by_backbone(rows: Sequence[Grouped]) -> list[tuple[str, list[Grouped]]]:
    """Rows grouped by backbone, in the order of its first row."""
    names = dict.fromkeys(row.backbone for row in rows)
    return [(name, [row for row in rows if row.backbone == name]) for name in names]


@dataclass(frozen=True)
class Settings:
    """What a study was run with."""

    backbones: tuple[str, ...]
    data: str
    collections: tuple[str, ...]
    seeds: int
    k: float
    training: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Study:
    """One study's rows and what follows from them; which of the optional parts it has depends on the study."""

    settings: Settings
    rows: list[RowResult]  # without rows all of whose trainings failed
    tests: list[PairedTest] | None = None
    pairs: list[ControlPair] | None = None
    correlations: dict[str, dict[str, float]] | None = None  # Spearman's, by group of heads and statistic of the start
    curves: list[RowCurves] | None = None
    conclusions: list[str]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class CellSummary:
    """What a report shows of a cell's record."""

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
    """The part of a record that ``study.json`` holds."""
    findings = [finding["name"] for finding in record.findings]
    values = vars(record) | record.provenance | {"seed": record.options["seed"], "findings": findings}
    return TypeAdapter(CellSummary).validate_python(values)


@dataclass(frozen=True)
class Baseline:
    """BM25 on a collection."""

    ndcg: Annotated[float, Field(alias=METRICS[0])]
    rr: Annotated[float, Field(alias=METRICS[1])]
    recall: Annotated[float, Field(alias=METRICS[2])]
    data_hash: str | None = None


def baseline(evaluation: Evaluation) -> Baseline:
    """The part of BM25's evaluation that ``study.json`` holds."""
    return TypeAdapter(Baseline).validate_python(evaluation.to_dict())


@dataclass(frozen=True, repr=False)
class StudyResult(Tabular):
    """The content of ``study.json``: every study in the folder, and every cell's numbers with the commands that reproduce them."""

    studies: dict[str, Annotated[Study, _WITHOUT_NONE]]  # by name
    cells: dict[str, CellSummary]  # by hash
    bm25: dict[str, Baseline]  # by collection
    failed: dict[str, str]  # messages of cells that failed, by hash
    report: str  # path of report.html
    unstemmed: dict[str, Baseline] = field(default_factory=dict)  # BM25 without stemming, likewise, where folding was studied

    def to_dict(self) -> dict[str, Any]:
        """The content of ``study.json``."""
        return _RESULT.dump_python(self, mode="json", by_alias=True)

    def _rows(self) -> list[dict[str, Any]]:
        """Each study's rows on each collection."""
        return [
            {"study": name, "backbone": row.backbone, "arm": row.label, "trainings": row.runs, "collection": collection}
            | TypeAdapter(Means).dump_python(means, by_alias=True)
            for name, study in self.studies.items()
            for row in study.rows
            for collection, means in row.results.items()
        ]


_RESULT = TypeAdapter(StudyResult)


def read_results(file: Path) -> StudyResult:
    """Read a ``study.json``.

    Raises:
        OutputError: an older version of anysplade wrote it.
    """
    try:
        return _RESULT.validate_json(file.read_bytes())
    except ValidationError as error:
        raise OutputError(
            f"{file}: written by an older version; remove it (its cells stay, and are used if they still hold)"
        ) from error

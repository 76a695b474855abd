"""Compare a model that was trained with several seeds with a baseline: over seeds and queries together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from anysplade._common.tables import Tabular
from anysplade.evaluation.evaluations import Evaluation
from anysplade.evaluation.significance import Verdict, crossed_t, holm, verdict


@dataclass(frozen=True, repr=False)
class SeedComparison(Tabular):
    """The mean of the seeds of a model compared with the first model, in one metric and on the same queries."""

    seeds: int  # number of trainings
    baseline: str  # the first model, which is no seed
    collection: str  # its name
    metric: str  # a name of ir-measures
    lexical: float | None  # weight of BM25, which is added to the seeds' scores
    difference: float  # of the means, seeds minus baseline
    interval: tuple[float, float] | None  # 95 %, over seeds and queries; None if all differences are the same
    p: float  # two-sided; see ``crossed_t``
    p_corrected: float | None  # by Holm, over the primary (first) metric's comparisons; None for other, exploratory metrics

    @property
    def verdict(self) -> Verdict:
        """Better, worse or no difference shown; only the primary metric, whose p is corrected, can show one."""
        return Verdict.NONE if self.p_corrected is None else verdict(self.difference, self.interval, self.p_corrected)


def compare_seeds(evaluations: Sequence[Evaluation]) -> list[SeedComparison]:
    """Compare the sparse models, as seeds of one model, also with BM25 added, with the first model of each collection.

    Empty for a collection whose first model is sparse too, since it is a seed and no baseline, or with fewer than two seeds.
    """
    made = []
    for (collection, _), seeds in seed_groups(evaluations).items():
        base = next(evaluation for evaluation in evaluations if evaluation.collection == collection)
        if base.vectors is None and len(seeds) > 1 and base.queries > 1:
            made += [_compare(base, seeds, metric) for metric in base.metrics]
    primary = [i for i, compared in enumerate(made) if compared.metric == next(iter(evaluations[0].metrics))]
    corrected = dict(zip(primary, holm([made[i].p for i in primary]), strict=True))
    return [replace(compared, p_corrected=corrected.get(i)) for i, compared in enumerate(made)]


def seed_groups(evaluations: Sequence[Evaluation]) -> dict[tuple[str, float | None], list[Evaluation]]:
    """The sparse models by collection and weight of an added BM25; each list has the seeds of one model."""
    groups: dict[tuple[str, float | None], list[Evaluation]] = {}
    for evaluation in evaluations:
        if evaluation.vectors is not None:
            groups.setdefault((evaluation.collection, evaluation.lexical), []).append(evaluation)
    return groups


def _compare(base: Evaluation, seeds: Sequence[Evaluation], metric: str) -> SeedComparison:
    ids = list(base.per_query[metric])
    values = np.array([[seed.per_query[metric][id_] for id_ in ids] for seed in seeds])  # (seeds, queries)
    tested = crossed_t(values - np.array([base.per_query[metric][id_] for id_ in ids]))
    return SeedComparison(len(seeds), base.model, base.collection, metric, seeds[0].lexical, *tested, p_corrected=None)

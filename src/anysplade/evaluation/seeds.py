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
    difference: float  # of the means, seeds minus baseline
    interval: tuple[float, float] | None  # 95 %, over seeds and queries; None if all differences are the same
    p: float  # two-sided; see ``crossed_t``
    p_corrected: float | None  # by Holm, over the collections in the primary (first) metric; None for other, exploratory metrics

    @property
    def verdict(self) -> Verdict:
        """Better, worse or no difference shown; only the primary metric, whose p is corrected, can show one."""
        return Verdict.NONE if self.p_corrected is None else verdict(self.difference, self.interval, self.p_corrected)


def compare_seeds(evaluations: Sequence[Evaluation]) -> list[SeedComparison]:
    """Compare the sparse models, as seeds of one model, with the first model of each collection.

    Empty for a collection whose first model is sparse too, since it is a seed and no baseline, or with fewer than two seeds.
    """
    made = []
    for collection in dict.fromkeys(evaluation.collection for evaluation in evaluations):
        base, *others = (evaluation for evaluation in evaluations if evaluation.collection == collection)
        seeds = [other for other in others if other.vectors is not None]
        if base.vectors is None and len(seeds) > 1 and base.queries > 1:
            made += [_compare(base, seeds, metric) for metric in base.metrics]
    primary = [compared for compared in made if compared.metric == next(iter(evaluations[0].metrics))]
    corrected = dict(zip((c.collection for c in primary), holm([c.p for c in primary]), strict=True))
    return [replace(c, p_corrected=corrected[c.collection]) if c in primary else c for c in made]


def _compare(base: Evaluation, seeds: Sequence[Evaluation], metric: str) -> SeedComparison:
    ids = list(base.per_query[metric])
    values = np.array([[seed.per_query[metric][id_] for id_ in ids] for seed in seeds])  # (seeds, queries)
    tested = crossed_t(values - np.array([base.per_query[metric][id_] for id_ in ids]))
    return SeedComparison(len(seeds), base.model, base.collection, metric, *tested, p_corrected=None)

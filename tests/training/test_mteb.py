"""What anysplade trains is measured by mteb as it is, and comes out the same."""

import mteb
import pytest
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SparseEncoder

from anysplade import evaluate, load_collection


class Tiny(AbsTaskRetrieval):
    """A collection of the tests as a task; nothing is downloaded."""

    metadata = TaskMetadata(
        name="AnyspladeTiny",
        dataset={"path": "anysplade/tiny", "revision": "1"},
        description="A collection of random words.",
        reference="https://example.org",
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        date=("2026-01-01", "2026-01-01"),
        domains=["Written"],
        task_subtypes=[],
        license="apache-2.0",
        annotations_creators="derived",
        dialect=[],
        sample_creation="created",
        bibtex_citation="",
    )
    collection = None

    def load_data(self, **options):
        columns = {
            "corpus": [{"id": id_, "title": d.title, "text": d.text} for id_, d in self.collection.corpus.items()],
            "queries": [{"id": id_, "text": text} for id_, text in self.collection.queries.items()],
        }
        split = {name: Dataset.from_list(rows) for name, rows in columns.items()}
        self.dataset = {"default": {"test": split | {"relevant_docs": self.collection.qrels, "top_ranked": None}}}
        self.data_loaded = True


@pytest.mark.filterwarnings("ignore")
def test_mteb_gives_the_same(backbone, collection_folder):
    Tiny.collection = load_collection(collection_folder)
    found = mteb.evaluate(SparseEncoder(backbone), Tiny(), cache=None, show_progress_bar=False, co2_tracker=False)
    ours = evaluate(backbone, collection_folder, ["nDCG@10", "R@10"]).metrics
    theirs = found.task_results[0].scores["test"][0]
    assert ours["nDCG@10"] == pytest.approx(theirs["ndcg_at_10"], abs=1e-5)  # mteb rounds to five digits
    assert ours["R@10"] == pytest.approx(theirs["recall_at_10"], abs=1e-5)

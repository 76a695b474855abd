"""What an int8 export loses: effectiveness and cost of exports in float32 and int8, which encode documents and queries."""

import sys
from pathlib import Path

import ir_measures
from scipy import sparse

from anysplade import export_onnx, load_collection
from anysplade.model.onnx_queries import OnnxQueries
from anysplade.search.exact import Postings
from harness import finish, parser

METRICS = ("nDCG@10", "R@100")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", help="a sparse encoder without prompts")
    arguments.add_argument("collection")
    arguments.add_argument("folder", type=Path, help="for the export")
    options = arguments.parse_args()
    if not options.folder.exists():
        export_onnx(options.model, options.folder, "vector", quantize=True)
    collection = load_collection(options.collection)
    ids, names = list(collection.corpus), list(collection.queries)
    measures = [ir_measures.parse_measure(metric) for metric in METRICS]
    result = {}
    for precision in ("float32", "int8"):
        model = OnnxQueries(options.folder, precision)
        documents = sparse.vstack([model.encode([document.full_text]) for document in collection.corpus.values()], format="csr")
        queries = model.encode([collection.queries[name] for name in names])
        ranked = Postings.from_documents(documents).top_rows(queries, 100)
        run = {
            name: {ids[i]: float(score) for i, score in zip(*found, strict=True)} for name, found in zip(names, ranked, strict=True)
        }
        values = ir_measures.calc_aggregate(measures, collection.qrels, run)
        result[precision] = {str(measure): value for measure, value in values.items()} | {
            "query_active_dims": queries.nnz / len(names),
            "document_active_dims": documents.nnz / len(ids),
        }
        print(precision, result[precision], file=sys.stderr, flush=True)
    finish("exported", options, result)


if __name__ == "__main__":
    main()

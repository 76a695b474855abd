"""How other software uses a published model, for its card: a short form of docs/serving-elsewhere.md."""

from pathlib import Path
from typing import Any

from anysplade.model.saved import saved_json

_VECTORS = """## Use it elsewhere

**sentence-transformers**, with vectors for **Qdrant**:

```python
from qdrant_client import models
from sentence_transformers import SparseEncoder

model = SparseEncoder("REPO")
query = model.encode_query("how to invert a matrix")  # scores are dot products
document = model.encode_document("numpy.linalg.inv: the inverse of a matrix").coalesce()
point = models.SparseVector(indices=document.indices()[0].tolist(), values=document.values().tolist())
```
"""
_PROMPTS = "Other software does not know the model's prompts; put them before each text: {}.\n"
_SERVER = """**{}**, which needs every tensor under its own name (`pip install "anysplade[onnx]"`):

```sh
anysplade export REPO --to checkpoint --out served
{}
```
"""
_SERVERS = (  # name, architectures that it pools as SPLADE does, command
    ("text-embeddings-inference", ("bert", "roberta", "distilbert"), "text-embeddings-router --model-id served --pooling splade"),
    (
        "vLLM",
        ("bert",),
        """vllm serve served --runner pooling --hf-overrides '{"architectures": ["BertSpladeSparseEmbeddingModel"]}'""",
    ),
)
_FASTEMBED = """**FastEmbed** takes any name of its SPLADE models, and reads the folder that
`anysplade export REPO --to onnx --out onnx` writes:

```python
from fastembed import SparseTextEmbedding

model = SparseTextEmbedding("prithivida/Splade_PP_en_v1", specific_model_path="onnx")
```
"""
_OPENSEARCH = """**OpenSearch**: zip `model.onnx` and `tokenizer.json` of
`anysplade export REPO --to onnx --form vector --out opensearch`, and register the file as a custom model with
`"function_name": "SPARSE_ENCODING"` and `"model_format": "ONNX"`.
"""


def usage(repo_id: str, source: str, config: dict[str, Any]) -> str:
    """A section for the card: the software that gives the vectors of the model in ``source``, whose config.json is ``config``."""
    parts, last = [_VECTORS], saved_json(source, "modules.json")[-1]
    if last["type"].endswith(".SpladePooling"):  # else queries need no masked LM, or there is none
        pooling = saved_json(source, str(Path(last["path"], "config.json")))
        prompts = (saved_json(source, "config_sentence_transformers.json") or {}).get("prompts") or {}
        if said := ", ".join(f"`{prompt}` ({role})" for role, prompt in prompts.items() if prompt):
            parts.append(_PROMPTS.format(said))
        if (pooling["pooling_strategy"], pooling["activation_function"]) == ("max", "relu"):  # the only form that these know
            known = [server for server in _SERVERS if config.get("model_type") in server[1]]
            parts += [*(_SERVER.format(name, command) for name, _, command in known), _FASTEMBED]
        parts.append(_OPENSEARCH)
    return "\n".join(parts).replace("REPO", repo_id).rstrip()


def masked_lm_config(source: str) -> dict[str, Any]:
    """The config.json of a model's first module; empty if it has none in its own folder."""
    return saved_json(source, str(Path(saved_json(source, "modules.json")[0]["path"], "config.json"))) or {}

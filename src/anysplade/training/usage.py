"""How other software uses a published model, for its card: see docs/serving-elsewhere.md."""

from typing import Any

from anysplade.model.head import RECORD
from anysplade.model.saved import saved_json

_VECTORS = '''## Use it elsewhere

**sentence-transformers**, with vectors for **Qdrant**:

```python
from qdrant_client import models
from sentence_transformers import SparseEncoder

model = SparseEncoder("{repo_id}")
query = model.encode_query("how to invert a matrix")  # scores are dot products
document = model.encode_document("numpy.linalg.inv: the inverse of a matrix").coalesce()
point = models.SparseVector(indices=document.indices()[0].tolist(), values=document.values().tolist())
```
'''
_PROMPTS = "The servers below do not know the model's prompts; put them before each text: {prompts}.\n"
_SERVERS = '''**{names}**, which need every tensor under its own name:

```sh
pip install "anysplade[onnx]"
anysplade export {repo_id} --to checkpoint --out served
{commands}
```
'''
_TEI = "text-embeddings-router --model-id served --pooling splade"
_VLLM = '''vllm serve served --runner pooling --hf-overrides '{"architectures": ["BertSpladeSparseEmbeddingModel"]}\''''
_FASTEMBED = '''**FastEmbed** takes any name of its SPLADE models, and reads the folder that
`anysplade export {repo_id} --to onnx --out onnx` writes:

```python
from fastembed import SparseTextEmbedding

model = SparseTextEmbedding("prithivida/Splade_PP_en_v1", specific_model_path="onnx")
```
'''
_OPENSEARCH = '''**OpenSearch**: zip `model.onnx` and `tokenizer.json` of
`anysplade export {repo_id} --to onnx --form vector --out opensearch`, and register the file as a custom model with
`"function_name": "SPARSE_ENCODING"` and `"model_format": "ONNX"`.
'''


def usage(repo_id: str, source: str) -> tuple[list[str], dict[str, Any] | None]:
    """Lines for the card, with the software that gives this model's vectors; and k and shift of its head, if they are recorded."""
    modules = saved_json(source, "modules.json")
    pooling: dict[str, Any] = {}
    if modules[-1]["type"].endswith(".SpladePooling"):
        pooling = saved_json(source, f"{modules[-1]['path']}/config.json")
    config = (saved_json(source, f"{modules[0]['path']}/config.json") if modules[0]["path"] else saved_json(source, "config.json")) or {}
    prompts = (saved_json(source, "config_sentence_transformers.json") or {}).get("prompts") or {}
    parts = [_VECTORS.format(repo_id=repo_id)]
    if pooling:
        said = ", ".join(f"`{prompt}` ({role})" for role, prompt in prompts.items() if prompt)
        parts += [_PROMPTS.format(prompts=said)] if said else []
        if pooling["pooling_strategy"] == "max" and pooling["activation_function"] == "relu":  # the only form that these know
            parts += _servers(repo_id, config.get("model_type", "")) + [_FASTEMBED.format(repo_id=repo_id)]
        parts.append(_OPENSEARCH.format(repo_id=repo_id))
    record = config.get(RECORD)
    return "\n".join(parts).rstrip().splitlines(), record if record and "k" in record else None


def _servers(repo_id: str, architecture: str) -> list[str]:
    known = [("text-embeddings-inference", _TEI)] if architecture in ("bert", "roberta", "distilbert") else []
    known += [("vLLM", _VLLM)] if architecture == "bert" else []
    names, commands = " and ".join(name for name, _ in known), "\n".join(command for _, command in known)
    return [_SERVERS.format(names=names, repo_id=repo_id, commands=commands)] if known else []

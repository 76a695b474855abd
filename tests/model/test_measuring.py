import json
import math

import numpy as np
import pytest
import torch

from anysplade import inspect_head, rescale_head
from anysplade.model.checkpoints import load_masked_lm
from anysplade.model.measuring import Probe, measure_logits, summarize_probe

TEXTS = ["kabel lodan", "mifil nugor pehan rajim sobel"], ["tucor kadan lofil migor", "nuhan pejim"]


def test_report_of_a_head(backbone):
    report = inspect_head(backbone, queries=TEXTS[0], documents=TEXTS[1])
    model, tokenizer = load_masked_lm(backbone)
    weight = model.get_output_embeddings().weight.detach()
    assert (report.architecture, report.vocabulary, report.width) == ("BertForMaskedLM", *weight.shape)
    assert (report.tied, report.bias, report.rescaled) == (True, True, None)
    assert report.frobenius_norm == pytest.approx(weight.norm().item())
    assert report.max_row_norm == pytest.approx(weight.norm(dim=1).max().item())

    vectors, tokens = [], []
    for texts in TEXTS:  # one text at a time: no padding
        rows = [model(**tokenizer(text, return_tensors="pt")).logits.detach()[0] for text in texts]
        tokens += rows
        vectors.append(torch.stack([row.max(0).values.relu().log1p() for row in rows]).numpy())
    logits = torch.cat(tokens).numpy()
    queries, documents = vectors
    assert report.probe.tokens == len(logits)
    assert report.probe.positive_share == pytest.approx((logits > 0).mean())
    assert report.probe.logit_percentiles["50"] == pytest.approx(np.median(logits), abs=1e-4)
    assert report.probe.query_active_dims == pytest.approx((queries > 0).sum(1).mean())
    assert report.probe.flops == pytest.approx(((queries > 0).mean(0) * (documents > 0).mean(0)).sum())
    assert report.probe.score_std == pytest.approx((queries @ documents.T).std(), rel=1e-4)
    json.dumps(report.to_dict())


def test_what_splade_starts_from_by_hand():
    """log1p(relu()) of the logits below gives queries (1, 0, 0), (0, 2, 0) and documents (2, 1, 0), (0, 2, 1)."""
    one, two = math.expm1(1), math.expm1(2)
    queries = np.array([[one, -1, 0], [-9, two, -1]], np.float32)
    documents = np.array([[two, one, -1], [0, two, one]], np.float32)
    report = summarize_probe(Probe(np.arange(-500, 501, dtype=np.float32), queries, documents, None))
    assert (report.queries, report.documents, report.tokens) == (2, 2, 1001)
    assert report.logit_percentiles["0.1"] == pytest.approx(-499)
    assert report.logit_percentiles["95"] == pytest.approx(450)
    assert report.positive_share == 500 / 1001
    assert (report.query_active_dims, report.document_active_dims) == (1, 2)
    assert report.flops == pytest.approx(0.5 * 0.5 + 0.5 * 1)  # sum over terms of P(in query) P(in document)
    # The scores are 2, 0 and 2, 4.
    assert (report.score_mean, report.score_std) == (pytest.approx(2), pytest.approx(2**0.5))
    assert report.document_similarity == pytest.approx(2 / 5)  # 2 / (√5 √5)
    # -log of the softmax at the diagonal: log(e² + e⁰) - 2 and log(e² + e⁴) - 4 are both log(1 + e⁻²).
    assert report.start_loss == pytest.approx(math.log1p(math.exp(-2)))
    assert report.chance == pytest.approx(math.log(2))
    assert sum(report.histogram["shares"]) == pytest.approx(1)
    assert (report.histogram["edges"][0], report.histogram["edges"][-1]) == (-500, 500)
    # Of three documents the empty one is like none: 2 / 5 in two of six ordered pairs.
    more = summarize_probe(Probe(queries, queries, np.concatenate([documents, -np.ones((1, 3), np.float32)]), None))
    assert more.document_similarity == pytest.approx(2 / 5 * 2 / 6)
    assert more.start_loss is None  # no query goes with it
    assert summarize_probe(Probe(queries, queries, documents[:1], None)).document_similarity == pytest.approx(0, abs=1e-6)


def test_a_loaded_model_is_probed_only_with_its_tokenizer(backbone):
    model, tokenizer = load_masked_lm(backbone)
    assert inspect_head(model).probe is None
    assert inspect_head(model, tokenizer).probe is not None


@pytest.mark.parametrize("policy", ["scale", "keep"])
def test_the_probe_foretells_the_rescaled_head(backbone, policy):
    model, tokenizer = load_masked_lm(backbone)
    foretold = summarize_probe(measure_logits(model, tokenizer, *TEXTS).affine(3.0, 0.7, policy))
    rescale_head(model, 3.0, 0.7, policy)
    measured = summarize_probe(measure_logits(model, tokenizer, *TEXTS))
    assert measured.query_active_dims == foretold.query_active_dims
    assert measured.score_std == pytest.approx(foretold.score_std, rel=1e-4)
    assert measured.logit_percentiles == pytest.approx(foretold.logit_percentiles, abs=1e-4)

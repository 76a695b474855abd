"""What the page about the model's head shows; unlike the other pages it needs torch."""

from typing import Any

from transformers import PreTrainedModel

from anysplade.model.calibration import choose, logit_figure
from anysplade.model.encoder import is_saved_encoder
from anysplade.model.measuring import Probe, describe_head, measure_logits
from anysplade.model.modules import masked_lm
from anysplade.model.probe import PROBE_DOCUMENTS, PROBE_QUERIES
from anysplade.search.index import Index


def measure_index(index: Index) -> tuple[PreTrainedModel, Probe]:
    """The logits of an index's model on the probe texts."""
    encoder = index.encoder
    model = masked_lm(encoder)
    return model, measure_logits(model, encoder.tokenizer, PROBE_QUERIES, PROBE_DOCUMENTS)


def describe_logits(model: PreTrainedModel, probe: Probe, name: str) -> tuple[dict[str, Any], str]:
    """The report for the template, and the histogram as SVG."""
    calibration = choose(probe, trained=is_saved_encoder(str(model.name_or_path)))
    return {"report": describe_head(model, probe, name), "calibration": calibration}, logit_figure(calibration)

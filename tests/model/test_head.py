import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
)

from anysplade import load_encoder, rescale_head
from anysplade.model.checkpoints import load_masked_lm
from anysplade.model.encoder import open_encoder
from anysplade.model.head import find_head
from architectures import ARCHITECTURES, VOCABULARY, run, small_model
from tiny import make_tokenizer_of


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tensor_has_one_value_under_all_its_names(architecture, ids, tmp_path):
    model = small_model(architecture)
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    rescale_head(model, 2, 0)
    decoder = find_head(model).decoder.weight
    alone = {name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor is decoder}
    groups = [kept for group in names.values() if len(kept := sorted({*group} - alone, key=len)) > 1]
    rates = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().mean().backward()
    rates.step()
    if architecture == "funnel":
        model.get_input_embeddings().weight.data[0] = 0
    trained = run(model, ids)[0]
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[name], written[group[0]]) for group in groups for name in group)
    assert alone <= written.keys()
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(run(loaded, ids)[0], trained)

    # Earlier versions, and others, wrote the bias that the logits do not have as it was before the training.
    biases = [group[0] for group in groups if group[0].endswith(".bias")]
    with torch.no_grad():
        for name in biases:
            loaded.get_parameter(name).add_(1)
    rescale_head(loaded, 1, 0.5 * bool(biases))
    loaded.save_pretrained(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    for group in groups:
        assert all(torch.equal(again[name], written[name] - 0.5 * (group[0] in biases)) for name in group)


@pytest.mark.parametrize("opened", [load_masked_lm, load_encoder, open_encoder])
@pytest.mark.parametrize("tied", [True, False])
def test_a_bias_that_was_saved_with_two_values_is_the_one_of_the_logits(opened, tied, ids, tmp_path):
    model = small_model("roberta", pad_token_id=1, max_position_embeddings=66, tie_word_embeddings=False)
    model.lm_head.decoder.weight = model.get_input_embeddings().weight
    logits = run(model, ids)[0]
    model.config.tie_word_embeddings = tied
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not torch.equal(state["lm_head.bias"], state["lm_head.decoder.bias"])
    model.save_pretrained(tmp_path / "old", state_dict=dict(state))
    make_tokenizer_of(VOCABULARY).save_pretrained(tmp_path / "old")
    loaded = opened(tmp_path / "old", **({"k": 1, "shift": 0} if opened is load_encoder else {}))
    (loaded[0] if isinstance(loaded, tuple) else loaded).save_pretrained(str(tmp_path / "new"))
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert torch.equal(written["lm_head.bias"], state["lm_head.decoder.bias"])
    assert torch.equal(written.get("lm_head.decoder.bias", written["lm_head.bias"]), written["lm_head.bias"])
    assert torch.equal(run(AutoModelForMaskedLM.from_pretrained(tmp_path / "new").eval(), ids)[0], logits)

"""Small random masked LMs of the architectures that transformers ships."""

import torch
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

VOCABULARY = 99

# Each architecture has its own names for the same few sizes; only those a config has are set.
_SIZES = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "dim", "embedding_size", "emb_dim", "n_embd"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "encoder_layers", "decoder_layers", "n_layer"), 2),
    **dict.fromkeys(("num_attention_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner", "n_inner"), 64),
    **dict.fromkeys(("d_head", "head_dim"), 8),
    "n_head": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "num_decoder_layers": 1,
    "block_sizes": [1, 1],
    "attention_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "mask_token_id": 4,
}
_MORE = {
    "funnel": {"num_hidden_layers": None, "block_repeats": [1, 1]},
    "modernbert": {"layer_types": ["full_attention", "sliding_attention"]},
    "xmod": {"default_language": "en_XX"},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 48},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
}

ARCHITECTURES = (
    "albert",
    "bart",
    "bert",
    "big_bird",
    "camembert",
    "convbert",
    "data2vec-text",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "esm",
    "eurobert",
    "flaubert",
    "fnet",
    "funnel",
    "ibert",
    "layoutlm",
    "longformer",
    "luke",
    "mbart",
    "megatron-bert",
    "modernbert",
    "mpnet",
    "mra",
    "mvp",
    "nomic_bert",
    "nystromformer",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "squeezebert",
    "tapas",
    "xlm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
    "yoso",
)


def small_model(architecture: str, **overrides: object) -> PreTrainedModel:
    config = AutoConfig.for_model(architecture)
    for name, value in (_SIZES | _MORE.get(architecture, {}) | overrides).items():
        if value is not None and (name in overrides or hasattr(config, name)):
            setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():  # random weights of a size that shows, and biases that are not zero
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        if architecture == "funnel":  # transformers zeroes its padding row whenever it loads one
            model.get_input_embeddings().weight[0] = 0
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


def run(model, ids):
    """The logits of a masked LM, and its hidden states."""
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    hidden = out.hidden_states if out.get("hidden_states") is not None else out.encoder_hidden_states
    return out.logits.detach(), [h.detach() for h in hidden]


def stock_pooling(hidden, weight, bias, mask, pooling="max", double_log=False):
    """The logits, and sentence-transformers' own module on them."""
    module = SpladePooling(pooling, activation_function="log1p_relu" if double_log else "relu").train()
    return module({"token_embeddings": linear(hidden, weight, bias), "attention_mask": mask})["sentence_embedding"]

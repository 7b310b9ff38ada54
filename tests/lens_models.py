"""The tiny models as TransformerLens models."""

from tiny_models import make


def lens_tokenizer(tokenizer, folder):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def bridge(name, tokenizer, folder):
    from transformer_lens.model_bridge import TransformerBridge

    module = make(name, attn_implementation="eager")
    chosen = lens_tokenizer(tokenizer, folder)
    return TransformerBridge.boot_transformers("tiny", hf_model=module, tokenizer=chosen, device="cpu")


def hooked_transformer(name, tokenizer, folder):
    """The tiny weights in TransformerLens's own layout, nothing folded."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

    module = make(name)
    common = {
        "n_layers": 3,
        "d_model": 32,
        "n_ctx": 64,
        "d_head": 8,
        "n_heads": 4,
        "d_vocab": 300,
        "device": "cpu",
        "eps": 1e-5 if name == "gpt2" else 1e-6,
        "attn_only": False,
    }
    own = {
        "gpt2": {"d_mlp": 128, "act_fn": "gelu_new", "normalization_type": "LN"},
        "llama": {
            "d_mlp": 48,
            "act_fn": "silu",
            "normalization_type": "RMS",
            "n_key_value_heads": 2,
            "gated_mlp": True,
            "final_rms": True,
            "positional_embedding_type": "rotary",
            "rotary_adjacent_pairs": False,
            "rotary_dim": 8,
            "original_architecture": "LlamaForCausalLM",
        },
    }[name]
    config = HookedTransformerConfig(**common, **own)
    convert = convert_gpt2_weights if name == "gpt2" else convert_llama_weights
    model = HookedTransformer(config, tokenizer=lens_tokenizer(tokenizer, folder))
    model.load_and_process_state_dict(
        convert(module, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model

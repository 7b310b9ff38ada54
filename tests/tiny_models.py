"""Tiny random models of every supported family, made offline from their configs."""

import torch

VOCABULARY = 300
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
# Windows shorter than the test prompts, so that sliding layers differ from full ones.
SLIDING = {**GROUPED, "head_dim": 16, "sliding_window": 4}
TINY = {
    "gpt2": (
        "GPT2",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoX", "GPTNeoXForCausalLM", SIZES),
    "gpt_neox_sequential": ("GPTNeoX", "GPTNeoXForCausalLM", {**SIZES, "use_parallel_residual": False}),
    "llama": ("Llama", "LlamaForCausalLM", GROUPED),
    "mistral": ("Mistral", "MistralForCausalLM", SLIDING),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", {**SLIDING, "attn_logit_softcapping": 1.0}),
    "gemma3": ("Gemma3Text", "Gemma3ForCausalLM", SLIDING),
    "phi3": ("Phi3", "Phi3ForCausalLM", GROUPED),
    "opt": ("OPT", "OPTForCausalLM", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt_post_norm": (
        "OPT",
        "OPTForCausalLM",
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "olmo2": ("Olmo2", "Olmo2ForCausalLM", GROUPED),
    "mixtral": ("Mixtral", "MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        "Qwen3MoeForCausalLM",
        {
            **GROUPED,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
    "bert": ("Bert", "BertForMaskedLM", SIZES),
    "vit": (
        "ViT",
        "ViTForImageClassification",
        {
            **{name: SIZES[name] for name in ("hidden_size", "intermediate_size")},
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 24,
            "patch_size": 8,
            "num_labels": 3,
        },
    ),
}
TEXT = [name for name in TINY if name != "vit"]
CAUSAL = [name for name in TEXT if name != "bert"]


def make(name, **options):
    """A tiny random model in evaluation mode; weights are large enough for every part to matter."""
    import transformers

    config_name, class_name, sizes = TINY[name]
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, f"{config_name}Config")(**{**sizes, **options})
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model

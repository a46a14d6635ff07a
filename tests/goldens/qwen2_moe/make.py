"""Golden logits of tiny random Qwen2-MoE models, by PyTorch transformers in f32 on the CPU; how: ../tiny.py."""
import sys
from pathlib import Path

from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny import make

BASE = {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "vocab_size": 48, "hidden_size": 24,
    "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 96, "rms_norm_eps": 1e-6, "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2,
}
PUBLISHED = BASE | {"rope_theta": 10000.0, "torch_dtype": "bfloat16", "use_sliding_window": False, "sliding_window": 32, "max_window_layers": 3}
V5 = BASE | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "bfloat16", "sliding_window": 0, "transformers_version": "5.23.0"}

CASES = {
    # Dense layer between, tied, gates not normalised.
    "dense_between": PUBLISHED | {"mlp_only_layers": [1], "tie_word_embeddings": True, "norm_topk_prob": False},
    # Every second layer dense, untied, gates normalised, one key head, head_dim of its own.
    "norm_topk": V5 | {"decoder_sparse_step": 2, "num_hidden_layers": 4, "tie_word_embeddings": False, "norm_topk_prob": True, "num_key_value_heads": 1, "head_dim": 10},
    # No biases, one key head per query head, top 1, widths that no kernel likes.
    "odd_widths": PUBLISHED | {"qkv_bias": False, "num_key_value_heads": 4, "num_experts_per_tok": 1, "num_experts": 5, "moe_intermediate_size": 7, "shared_expert_intermediate_size": 9, "hidden_size": 20, "head_dim": 14, "num_hidden_layers": 2},
    # All experts chosen, another theta and epsilon, experts under their other name.
    "all_experts": V5 | {"num_experts_per_tok": 6, "norm_topk_prob": True, "rms_norm_eps": 0.01, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "mlp_only_layers": [0, 1], "num_attention_heads": 6, "num_key_value_heads": 3},
    # No experts at all: every layer dense.
    "no_experts": V5 | {"num_experts": 0, "num_hidden_layers": 2, "tie_word_embeddings": True},
    "rope_linear": PUBLISHED | {"rope_scaling": {"type": "linear", "factor": 4.0}, "num_hidden_layers": 2},
    "rope_yarn": V5 | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}, "head_dim": 16, "num_hidden_layers": 2},
    "rope_llama3": V5 | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 48, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, "head_dim": 16, "num_hidden_layers": 2},
    "window": V5 | {"use_sliding_window": True, "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}

if __name__ == "__main__":
    make(Path(__file__).parent, CASES, Qwen2MoeConfig, Qwen2MoeForCausalLM)

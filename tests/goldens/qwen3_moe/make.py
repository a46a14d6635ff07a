"""Golden logits of tiny random Qwen3-MoE models, by PyTorch transformers in f32 on the CPU; how: ../tiny.py."""
import sys
from pathlib import Path

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny import make

BASE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 48, "hidden_size": 24,
    "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 96, "rms_norm_eps": 1e-6, "moe_intermediate_size": 12,
    "num_experts": 6, "num_experts_per_tok": 2,
}
PUBLISHED = BASE | {"rope_theta": 1000000.0, "rope_scaling": None, "torch_dtype": "bfloat16", "use_sliding_window": False, "sliding_window": None, "max_window_layers": 2, "decoder_sparse_step": 1, "attention_bias": False}
V5 = BASE | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "bfloat16", "sliding_window": None, "transformers_version": "5.23.0"}

CASES = {
    # As released: gates normalised, heads wider than hidden / heads. A dense layer between.
    "published": PUBLISHED | {"norm_topk_prob": True, "head_dim": 10, "num_hidden_layers": 3, "mlp_only_layers": [1], "tie_word_embeddings": False},
    # Gates as they are, biases on all four projections, one key head, tied, another epsilon.
    "biases": V5 | {"norm_topk_prob": False, "attention_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 0.01},
    # All layers see 20 keys; every second layer dense.
    "window": V5 | {"use_sliding_window": True, "sliding_window": 20, "norm_topk_prob": True, "decoder_sparse_step": 2},
    # Widths that no kernel likes, one expert per token, its gate as it is.
    "odd_widths": PUBLISHED | {"num_key_value_heads": 4, "num_experts": 5, "num_experts_per_tok": 1, "moe_intermediate_size": 7, "hidden_size": 20, "head_dim": 14, "norm_topk_prob": False},
    "rope_yarn": PUBLISHED | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}, "head_dim": 16, "norm_topk_prob": True},
    # Within max_position_embeddings, where it changes nothing.
    "rope_dynamic": V5 | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}, "head_dim": 16, "norm_topk_prob": True},
}

if __name__ == "__main__":
    make(Path(__file__).parent, CASES, Qwen3MoeConfig, Qwen3MoeForCausalLM)

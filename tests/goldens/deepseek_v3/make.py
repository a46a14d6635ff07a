"""Golden logits of tiny random DeepSeek-V3 models, by PyTorch transformers 5.23 in f32 on the CPU; how: ../tiny.py.

Experts outside the kept groups are masked with minus infinity (5.23); with 0, as transformers 4 has it, one of them
could be chosen when biases are negative, as they are here for about half of the experts.
"""
import sys
from pathlib import Path

from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny import make

BASE = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 48, "hidden_size": 24,
    "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "hidden_act": "silu", "max_position_embeddings": 96, "rms_norm_eps": 1e-6, "moe_intermediate_size": 12,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "kv_lora_rank": 16, "q_lora_rank": 10,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1,
}
PUBLISHED = BASE | {"rope_theta": 10000, "torch_dtype": "bfloat16", "attention_bias": False, "moe_layer_freq": 1, "ep_size": 1, "num_nextn_predict_layers": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "tie_word_embeddings": False}
V5 = BASE | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "bfloat16", "head_dim": 4, "qk_head_dim": 12, "rope_interleave": True, "transformers_version": "5.23.0"}

CASES = {
    # As V3: YaRN with both weights 1.
    "published": PUBLISHED | {"rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 24, "type": "yarn"}, "qk_rope_head_dim": 12},
    # Gates as they are but scaled, one query projection, tied, an epsilon that latent norms do not have.
    "plain_gates": V5 | {"q_lora_rank": None, "norm_topk_prob": False, "routed_scaling_factor": 1.5, "tie_word_embeddings": True, "rms_norm_eps": 0.01},
    # Pairs half a width apart, biases, one group, two dense layers, two shared experts.
    "halves": V5 | {"rope_interleave": False, "attention_bias": True, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "n_shared_experts": 2, "qk_rope_head_dim": 8, "head_dim": 8, "qk_head_dim": 16},
    # Widths that no kernel likes, one head, no dense layer, all experts of the one kept group.
    "odd_widths": PUBLISHED | {"hidden_size": 20, "num_attention_heads": 1, "num_key_value_heads": 1, "kv_lora_rank": 7, "q_lora_rank": 3, "qk_nope_head_dim": 5, "qk_rope_head_dim": 6, "v_head_dim": 9, "moe_intermediate_size": 7, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 1, "first_k_dense_replace": 0, "num_hidden_layers": 2},
}

if __name__ == "__main__":
    make(Path(__file__).parent, CASES, DeepseekV3Config, DeepseekV3ForCausalLM)

"""Golden logits of tiny random OLMoE models, by PyTorch transformers in f32 on the CPU; how: ../tiny.py."""
import sys
from pathlib import Path

from transformers import OlmoeConfig, OlmoeForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny import make

BASE = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 48, "hidden_size": 24,
    "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "hidden_act": "silu", "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "num_experts": 6,
    "num_experts_per_tok": 2, "pad_token_id": 1, "eos_token_id": 3,
}
PUBLISHED = BASE | {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16", "clip_qkv": None, "attention_bias": False, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False}
V5 = BASE | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "bfloat16", "transformers_version": "5.23.0"}

CASES = {
    "published": PUBLISHED | {"norm_topk_prob": False},
    # Clipped, two key heads, gates normalised, tied.
    "clip": V5 | {"clip_qkv": 0.5, "num_key_value_heads": 2, "norm_topk_prob": True, "tie_word_embeddings": True},
    # Biases on all four projections, one key head, another epsilon and theta.
    "biases": V5 | {"attention_bias": True, "num_key_value_heads": 1, "rms_norm_eps": 0.01, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    # Widths that no kernel likes, all experts chosen.
    "odd_widths": PUBLISHED | {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 7, "num_experts": 3, "num_experts_per_tok": 3, "norm_topk_prob": False},
    "rope_linear": PUBLISHED | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope_llama3": V5 | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 48, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, "num_attention_heads": 2, "num_key_value_heads": 2},
}

if __name__ == "__main__":
    make(Path(__file__).parent, CASES, OlmoeConfig, OlmoeForCausalLM)

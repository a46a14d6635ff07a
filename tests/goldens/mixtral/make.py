"""Golden logits of tiny random Mixtral models, by PyTorch transformers in f32 on the CPU; how: ../tiny.py."""
import sys
from pathlib import Path

from transformers import MixtralConfig, MixtralForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny import make

BASE = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 48, "hidden_size": 24,
    "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "num_local_experts": 4,
    "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2,
}
PUBLISHED = BASE | {"rope_theta": 1e6, "torch_dtype": "bfloat16", "sliding_window": None, "attention_dropout": 0.0, "router_aux_loss_coef": 0.02, "tie_word_embeddings": False}
V5 = BASE | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "bfloat16", "sliding_window": None, "transformers_version": "5.23.0"}

CASES = {
    "published": PUBLISHED,
    # All layers see 20 keys; a head width of its own, one key head.
    "window": V5 | {"sliding_window": 20, "head_dim": 10, "num_key_value_heads": 1},
    # Tied, as many key heads as heads, all experts chosen, widths that no kernel likes, another epsilon.
    "odd_widths": V5 | {"tie_word_embeddings": True, "num_key_value_heads": 4, "hidden_size": 20, "head_dim": 14, "intermediate_size": 7, "num_local_experts": 3, "num_experts_per_tok": 3, "rms_norm_eps": 0.01},
    # One expert per token: its gate is 1 whatever its score.
    "one_expert": PUBLISHED | {"num_experts_per_tok": 1, "num_local_experts": 5},
}

if __name__ == "__main__":
    make(Path(__file__).parent, CASES, MixtralConfig, MixtralForCausalLM, rename=lambda name: name.replace(".mlp.", ".block_sparse_moe."), matrices=("w1", "w3", "w2"))

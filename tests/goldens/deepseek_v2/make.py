"""Golden logits of tiny random DeepSeek-V2 models, by PyTorch transformers 5.23 in f32 on the CPU; how: ../tiny.py.

Where transformers 5 differs from the published modeling_deepseek.py, the published formula holds: with
`norm_topk_prob` gates are divided by their sum (+ 1e-20) and not scaled; transformers ignores the key and always
scales. `published_router` below is that rule (case `norm_topk`). YaRN follows 5.23, whose scores are multiplied by
mscale squared as published; transformers 4 leaves that out.
"""
import sys
import types
from pathlib import Path

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny import make

BASE = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 48, "hidden_size": 24,
    "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "hidden_act": "silu", "max_position_embeddings": 96, "rms_norm_eps": 1e-6, "moe_intermediate_size": 12,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "kv_lora_rank": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1,
}
PUBLISHED = BASE | {"rope_theta": 10000, "rope_scaling": None, "torch_dtype": "bfloat16", "attention_bias": False, "aux_loss_alpha": 0.001, "seq_aux": True, "moe_layer_freq": 1, "pretraining_tp": 1, "scoring_func": "softmax", "tie_word_embeddings": False}
V5 = BASE | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "bfloat16", "head_dim": 4, "qk_head_dim": 12, "mlp_bias": False, "transformers_version": "5.23.0"}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}

CASES = {
    # As V2-Lite: one query projection, greedy, YaRN whose two weights cancel on cos and sin and sharpen scores.
    "lite": PUBLISHED | {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 24, "type": "yarn"}, "qk_rope_head_dim": 12},
    # As V2: narrow queries, groups, scaled gates.
    "groups": PUBLISHED | GROUPS | {"q_lora_rank": 10, "norm_topk_prob": False, "routed_scaling_factor": 4.0},
    # Published rule (see above): normalised, not scaled.
    "norm_topk": PUBLISHED | GROUPS | {"q_lora_rank": 10, "norm_topk_prob": True, "routed_scaling_factor": 4.0},
    # Biases, two dense layers, tied, an epsilon that latent norms do not have, YaRN with weights that do not cancel.
    "biases": V5 | {"q_lora_rank": 10, "attention_bias": True, "first_k_dense_replace": 2, "tie_word_embeddings": True, "rms_norm_eps": 0.01, "rope_parameters": {"rope_theta": 500.0, "rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5, "original_max_position_embeddings": 24, "beta_fast": 0.2, "beta_slow": 0.05}, "qk_rope_head_dim": 8, "head_dim": 8, "qk_head_dim": 16},
    # Widths that no kernel likes (even where transformers reads pairs), one head, no dense layer, one expert per token, one shared.
    "odd_widths": V5 | {"hidden_size": 20, "num_attention_heads": 1, "num_key_value_heads": 1, "kv_lora_rank": 6, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "head_dim": 6, "qk_head_dim": 16, "v_head_dim": 3, "moe_intermediate_size": 7, "n_routed_experts": 5, "num_experts_per_tok": 1, "n_shared_experts": 1, "first_k_dense_replace": 0, "num_hidden_layers": 2, "routed_scaling_factor": 1.5},
}


def published_router(self, x):
    """MoEGate of modeling_deepseek.py, DeepSeek-V2: softmax, group_limited_greedy, norm_topk_prob with top_k > 1."""
    x = x.view(-1, x.shape[-1])
    scores = torch.nn.functional.linear(x.float(), self.weight.float()).softmax(dim=-1)
    best = scores.view(len(x), self.num_group, -1).max(dim=-1).values
    kept = torch.zeros_like(best).scatter_(1, torch.topk(best, k=self.topk_group, dim=-1)[1], 1)
    mask = kept.unsqueeze(-1).expand(len(x), self.num_group, self.num_experts // self.num_group).reshape(len(x), -1)
    gates, experts = torch.topk(scores.masked_fill(~mask.bool(), 0.0), k=self.top_k, dim=-1)
    return scores, gates / (gates.sum(dim=-1, keepdim=True) + 1e-20), experts


def prepare(model, name):
    if CASES[name].get("norm_topk_prob"):
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.forward = types.MethodType(published_router, layer.mlp.gate)


if __name__ == "__main__":
    make(Path(__file__).parent, CASES, DeepseekV2Config, DeepseekV2ForCausalLM, prepare=prepare)

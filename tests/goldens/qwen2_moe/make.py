"""Golden logits of tiny random Qwen2-MoE models, by PyTorch transformers in f32 on the CPU.

    pip install torch==2.15.0 transformers==5.23.0 safetensors numpy
    python make.py            # writes <case>.json (config) and goldens.safetensors (logits) beside itself

Weights are not stored: both sides draw them by `uniform` below (splitmix64 over the FNV-1a hash of the tensor's
published name), every parameter away from its default: weights std 0.2, norms 0.5 to 1.5, biases std 0.5. 80 tokens:
positions past 64. What these goldens cannot judge: long contexts, bf16 checkpoints, trained weights.
"""
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

HERE = Path(__file__).parent
TOKENS = 80

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


def uniform(name, count):
    """[0, 1) in steps of 2^-24, exact in f32."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def weights(name, shape):
    u = uniform(name, int(np.prod(shape)))
    if name.endswith("norm.weight"):
        values = u + np.float32(0.5)
    elif name.endswith(".bias"):
        values = (u - np.float32(0.5)) * np.float32(1.7320508)
    else:
        values = (u - np.float32(0.5)) * np.float32(0.69282032)
    return torch.from_numpy(values.reshape(shape))


def fill(model, config):
    for name, p in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("mlp.experts.gate_up_proj"):
            stem, (experts, rows, columns) = name.removesuffix("gate_up_proj"), p.shape
            for e in range(experts):
                p[e].copy_(torch.cat([weights(f"{stem}{e}.{m}_proj.weight", (rows // 2, columns)) for m in ("gate", "up")]))
        elif name.endswith("mlp.experts.down_proj"):
            stem = name.removesuffix("down_proj")
            for e in range(p.shape[0]):
                p[e].copy_(weights(f"{stem}{e}.down_proj.weight", tuple(p.shape[1:])))
        else:
            p.copy_(weights(name, tuple(p.shape)))


@torch.no_grad()
def main():
    out = {}
    for name, keys in CASES.items():
        (HERE / f"{name}.json").write_text(json.dumps(keys, indent=1) + "\n")
        config = Qwen2MoeConfig(**{k: v for k, v in keys.items() if k not in ("dtype", "torch_dtype")}, attn_implementation="eager", experts_implementation="eager")
        model = Qwen2MoeForCausalLM(config).float().eval()
        fill(model, config)
        ids = torch.from_numpy((uniform(f"tokens of {name}", TOKENS) * np.float32(keys["vocab_size"])).astype(np.int64))[None]
        logits = model(ids).logits[0]
        cache, steps = None, []
        for t in range(TOKENS):
            o = model(ids[:, t:t + 1], past_key_values=cache, use_cache=True)
            cache = o.past_key_values
            steps.append(o.logits[0, 0])
        gap = float((torch.stack(steps) - logits).abs().max())
        print(f"{name}: logits std {float(logits.std()):.3f}, steps differ by {gap:.1e}")
        assert gap < 1e-4
        out[name] = logits.numpy()
    save_file(out, HERE / "goldens.safetensors", metadata={"made_by": f"transformers 5.23.0, torch {torch.__version__}, f32, eager attention"})


if __name__ == "__main__":
    main()

"""What the golden scripts of all families share: weights drawn from tensor names, the forward passes, the files.

    pip install torch==2.15.0 transformers==5.23.0 safetensors numpy
    python <family>/make.py   # writes <case>.json (config) and goldens.safetensors (logits) beside itself

Weights are not stored: both sides draw them by `uniform` below (splitmix64 over the FNV-1a hash of the tensor's
published name), every parameter away from its default: weights std 0.2, norms 0.5 to 1.5, biases std 0.5. 80 tokens:
positions past 64. What these goldens cannot judge: long contexts, bf16 checkpoints, trained weights.
"""
import json

import numpy as np
import torch
from safetensors.numpy import save_file

TOKENS = 80
MATRICES = ("gate_proj", "up_proj", "down_proj")


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


def fill(model, tied, rename, matrices):
    """Every parameter from its published name; transformers 5 holds experts as stacks, which are published one by one."""
    gate, up, down = matrices
    for name, p in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        name = rename(name)
        if name.endswith(".experts.gate_up_proj"):
            stem, (experts, rows, columns) = name.removesuffix("gate_up_proj"), p.shape
            for e in range(experts):
                p[e].copy_(torch.cat([weights(f"{stem}{e}.{m}.weight", (rows // 2, columns)) for m in (gate, up)]))
        elif name.endswith(".experts.down_proj"):
            stem = name.removesuffix("down_proj")
            for e in range(p.shape[0]):
                p[e].copy_(weights(f"{stem}{e}.{down}.weight", tuple(p.shape[1:])))
        else:
            p.copy_(weights(name, tuple(p.shape)))


@torch.no_grad()
def make(here, cases, config_class, model_class, rename=lambda name: name, matrices=MATRICES, prepare=None):
    """Writes configs and goldens of `cases` (name: config keys) into `here`. `prepare(model, name)` may change the
    model where the published formula differs from that of transformers."""
    import transformers

    out = {}
    for name, keys in cases.items():
        (here / f"{name}.json").write_text(json.dumps(keys, indent=1) + "\n")
        config = config_class(**{k: v for k, v in keys.items() if k not in ("dtype", "torch_dtype")}, attn_implementation="eager", experts_implementation="eager")
        model = model_class(config).float().eval()
        fill(model, config.tie_word_embeddings, rename, matrices)
        if prepare:
            prepare(model, name)
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
    save_file(out, here / "goldens.safetensors", metadata={"made_by": f"transformers {transformers.__version__}, torch {torch.__version__}, f32, eager attention"})

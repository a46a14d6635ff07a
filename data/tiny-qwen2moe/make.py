"""Makes everything in this folder: text, tokenizer, and a tiny Qwen2-MoE trained on it. About 4 minutes on 2 cores.

    pip install torch==2.15.0 transformers==5.23.0 tokenizers==0.23.3 safetensors numpy
    python make.py [--steps 700] [--out .]

The text is written by the grammar below (five kinds of document, so that experts can differ); nothing is copied.
Training is seeded, but libraries and core counts change the last bits: a second run gives another model of the same
quality. The committed files are the truth; tests must not depend on a figure of theirs beyond what README.md says.
"""
import argparse
import json
import math
import random
from pathlib import Path

END = "<|endoftext|>"
NAMES = "Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Klara Leo Mia Noah".split()
PLACES = ["garden", "kitchen", "forest", "market", "station", "library", "river", "barn"]
THINGS = ["apple", "book", "candle", "drum", "egg", "feather", "glove", "hammer", "key", "lamp"]
COLOURS = ["red", "green", "blue", "white", "black", "yellow"]
ANIMALS = ["cat", "dog", "fox", "hen", "owl", "goat"]
GERMAN = {"Hund": "der", "Katze": "die", "Buch": "das", "Tisch": "der", "Lampe": "die", "Haus": "das", "Baum": "der", "Blume": "die", "Brot": "das"}
ADJECTIVES = ["alt", "neu", "klein", "rot", "schwer", "leicht"]


def story(r):
    a, b = r.sample(NAMES, 2)
    thing, colour, place, animal = r.choice(THINGS), r.choice(COLOURS), r.choice(PLACES), r.choice(ANIMALS)
    other = r.choice([p for p in PLACES if p != place])
    lines = [r.choice([f"{a} went to the {place}.", f"One day {a} walked to the {place}."])]
    lines.append(f"In the {place} {a} found a {colour} {thing}.")
    if r.random() < 0.5:
        lines.append(f"A {animal} sat beside the {colour} {thing}.")
    lines.append(r.choice([f"{a} gave the {thing} to {b}.", f"{a} showed the {colour} {thing} to {b}."]))
    lines.append(r.choice([f"{b} took the {thing} to the {other}.", f"{b} put the {thing} in the {other}."]))
    lines.append(f"Now the {colour} {thing} is in the {other}.")
    return " ".join(lines) + "\n"


def sums(r):
    lines = []
    for _ in range(r.randint(4, 8)):
        x, y = r.randint(0, 20), r.randint(0, 20)
        lines.append(f"{x} + {y} = {x + y}" if r.random() < 0.6 else f"{x + y} - {y} = {x}")
    return "\n".join(lines) + "\n"


def code(r):
    name, arg = r.choice(["area", "total", "scale", "shift", "twice"]), r.choice(["x", "n", "value"])
    op, k = r.choice(["+", "*", "-"]), r.randint(1, 9)
    call = r.randint(1, 9)
    result = {"+": call + k, "*": call * k, "-": call - k}[op]
    return f"def {name}({arg}):\n    return {arg} {op} {k}\n\nassert {name}({call}) == {result}\n"


def german(r):
    lines = []
    for _ in range(r.randint(3, 5)):
        noun = r.choice(list(GERMAN))
        adjective = r.choice(ADJECTIVES)
        lines.append(r.choice([f"{GERMAN[noun].capitalize()} {noun} ist {adjective}.", f"Ist {GERMAN[noun]} {noun} {adjective}?"]))
    return " ".join(lines) + "\n"


def lists(r):
    kind, words = r.choice([("colours", COLOURS), ("animals", ANIMALS), ("places", PLACES), ("things", THINGS)])
    chosen = r.sample(words, r.randint(3, 5))
    return f"Some {kind}:\n" + "".join(f"- {w}\n" for w in chosen) + f"There are {len(chosen)} {kind}.\n"


KINDS = [story, sums, code, german, lists]


def text(seed, size):
    r, out = random.Random(seed), ""
    while len(out) < size:
        out += r.choices(KINDS, [4, 3, 2, 2, 2])[0](r) + END
    return out


def tokenizer(train, out):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(train.split(END), trainer)
    t.save(str(out / "tokenizer.json"))
    return t


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--steps", type=int, default=700)
    ap.add_argument("--out", type=Path, default=Path(__file__).parent)
    a = ap.parse_args()
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    train, heldout = text(1, 140_000), text(2, 30_000)
    (a.out / "train.txt").write_text(train)
    (a.out / "heldout.txt").write_text(heldout)
    t = tokenizer(train, a.out)
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, mlp_only_layers=[1],
        moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=False, router_aux_loss_coef=0.01, output_router_logits=True, eos_token_id=0, pad_token_id=0,
        architectures=["Qwen2MoeForCausalLM"], experts_implementation="eager",
    )
    model = Qwen2MoeForCausalLM(config)
    ids = torch.tensor([0] + t.encode(train).ids)
    held = torch.tensor([0] + t.encode(heldout).ids)
    print(f"{len(ids)} training tokens, {len(held)} held out, {sum(p.numel() for p in model.parameters())} parameters")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    opt = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=4e-3, betas=(0.9, 0.95))
    length, batch = 256, 12
    g = torch.Generator().manual_seed(1)
    for step in range(a.steps):
        share = step / a.steps
        for group in opt.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        starts = torch.randint(0, len(ids) - length - 1, (batch,), generator=g)
        x = torch.stack([ids[s:s + length] for s in starts])
        loss = model(x, labels=x).loss
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step % 50 == 0 or step == a.steps - 1:
            print(step, round(float(loss), 4), flush=True)

    model = model.to(torch.bfloat16).float().eval()
    with torch.no_grad():
        nll, n = 0.0, 0
        for s in range(0, len(held) - 1, 256):
            w = held[s:s + 257]
            nll += float(F.cross_entropy(model(w[None, :-1]).logits[0], w[1:], reduction="sum"))
            n += len(w) - 1
    print(f"held out: {n} tokens, loss {nll / n:.4f}, perplexity {math.exp(nll / n):.4f} (uniform: 512)")

    state = {}
    for name, p in model.state_dict().items():
        p = p.to(torch.bfloat16).contiguous()
        if name == "lm_head.weight":
            continue  # tied
        if name.endswith("mlp.experts.gate_up_proj"):
            for e in range(8):
                gate, up = p[e].chunk(2, 0)
                state[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate.contiguous()
                state[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up.contiguous()
        elif name.endswith("mlp.experts.down_proj"):
            for e in range(8):
                state[name.replace("down_proj", f"{e}.down_proj.weight")] = p[e].clone()
        else:
            state[name] = p.clone()
    save_file(state, a.out / "model.safetensors", metadata={"format": "pt"})
    # The published form of the config, as most checkpoints on disk have it.
    written = {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "vocab_size": 512, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": True, "rope_theta": 10000.0, "qkv_bias": True, "use_sliding_window": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [1], "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "torch_dtype": "bfloat16",
    }
    (a.out / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    (a.out / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0, "do_sample": False}, indent=2) + "\n")
    (a.out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END, "bos_token": None, "add_prefix_space": False, "model_max_length": 256}, indent=2) + "\n")


if __name__ == "__main__":
    main()

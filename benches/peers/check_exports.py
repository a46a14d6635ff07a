"""Holds `cotk export` to the programs that it is for: the gguf package, llama.cpp, transformers.

    check_exports.py gguf MODEL.gguf HF          every tensor of MODEL.gguf, dequantised by the gguf package, against
                                                 the f32 safetensors of `cotk export --hf` of the same model
    check_exports.py logits MODEL.gguf LOGITS.npy --tokens 1,2,3
                                                 teacher-forced logits of llama.cpp against those of
                                                 `cotk logits --out`: KL(cotk || llama.cpp), top-1
    check_exports.py greedy MODEL.gguf IDS --tokens 1,2,3
                                                 llama.cpp's greedy continuation against `cotk run --temperature 0`
                                                 (IDS: the generated ids, separated by commas)
    check_exports.py tokens MODEL.gguf HF FILE…  token ids of the first 1,000 lines that hold text
    check_exports.py hf HF LOGITS.npy --tokens 1,2,3
                                                 the same logits by transformers

Needs numpy, gguf 0.19; llama-cpp-python 0.3.36 with LLAMA_CPP_LIB_PATH (see build_llama_cpp.sh) for logits, greedy and
tokens; tokenizers for tokens; torch and transformers 5.23 for hf. Exits 1 when a bound is missed.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np


def verdict(ok, text):
    print(("ok  " if ok else "MISS"), text)
    return ok


def safetensors(folder):
    """Name to f32 array, from one file of f32."""
    path = Path(folder) / "model.safetensors"
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    size = int(raw[:8].view("<u8")[0])
    head = json.loads(bytes(raw[8:8 + size]))
    def tensor(entry):
        assert entry["dtype"] == "F32", "export with --dtype f32"
        start, end = entry["data_offsets"]
        return raw[8 + size + start:8 + size + end].view("<f4").reshape(entry["shape"])
    return {name: tensor(entry) for name, entry in head.items() if name != "__metadata__"}


SHORT = {
    "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight", "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.weight": "self_attn.k_proj.weight", "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.weight": "self_attn.v_proj.weight", "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight", "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight", "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
}


def hf_tensor(tensors, name, arch, heads):
    """The same tensor in the Hugging Face layout; experts stacked, rows of `llama` in halves again as pairs."""
    if name in ("token_embd.weight", "output.weight", "output_norm.weight"):
        hf = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
              "output.weight": "lm_head.weight"}[name]
        return tensors.get(hf, tensors["model.embed_tokens.weight"])
    _, layer, rest = name.split(".", 2)
    base = f"model.layers.{layer}."
    if "_exps" in rest:
        part = rest.split("_")[1]
        mixtral = {"gate": "w1", "up": "w3", "down": "w2"}[part]
        stack = []
        while True:
            e = len(stack)
            names = [f"{base}mlp.experts.{e}.{part}_proj.weight", f"{base}block_sparse_moe.experts.{e}.{mixtral}.weight"]
            found = next((tensors[n] for n in names if n in tensors), None)
            if found is None:
                return np.stack(stack)
            stack.append(found)
    hf = base + SHORT[rest]
    if hf not in tensors:
        hf = base + SHORT[rest].replace("mlp.", "block_sparse_moe.")
    value = tensors[hf]
    if arch == "llama" and rest.split(".")[0] in ("attn_q", "attn_k"):
        n = heads[rest[5]]
        value = value.reshape(n, 2, value.shape[0] // n // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    return value


def check_gguf(args):
    import gguf
    from gguf.quants import dequantize
    reader = gguf.GGUFReader(args.model)
    field = lambda key: reader.fields[key].contents()
    arch = field("general.architecture")
    heads = {"q": field(f"{arch}.attention.head_count"), "k": field(f"{arch}.attention.head_count_kv")}
    tensors = safetensors(args.hf)
    ok, kinds = True, {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        ours = hf_tensor(tensors, tensor.name, arch, heads)
        theirs = dequantize(tensor.data, tensor.tensor_type).reshape(-1)
        ours = np.asarray(ours).reshape(-1)
        assert ours.size == theirs.size, tensor.name
        equal = np.array_equal(ours, theirs) or np.array_equal(ours.astype(np.float16).astype(np.float32), theirs)
        if kind in ("Q8_0", "Q4_0", "F32"):
            equal = np.array_equal(ours, theirs)
        count, same = kinds.get(kind, (0, 0))
        kinds[kind] = (count + 1, same + int(equal))
        if not equal:
            ok = False
            loss = np.linalg.norm(ours - theirs) / np.linalg.norm(ours)
            print(f"     {tensor.name} {kind}: relative difference {loss:.3g}")
    return verdict(ok, f"{arch}: {len(reader.tensors)} tensors; equal of each type: {kinds}")


def llama(path, context):
    import llama_cpp
    model = llama_cpp.Llama(model_path=path, n_ctx=context, n_batch=context, n_ubatch=context, logits_all=True,
                            n_threads=1, n_threads_batch=1, verbose=False)
    return llama_cpp, model


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare(ours, theirs, what, bound):
    p, q = log_softmax(ours), log_softmax(theirs)
    kl = (np.exp(p) * (p - q)).sum(-1)
    top1 = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    text = f"{what}: KL mean {kl.mean():.3g}, median {np.median(kl):.3g}, worst {kl.max():.3g} nats; top-1 equal at {top1:.4f} of {len(kl)} positions"
    return verdict(kl.mean() <= bound, text + f"; largest difference of logits {np.abs(ours - theirs).max():.3g}")


def check_logits(args):
    llama_cpp, model = llama(args.model, max(64, len(args.tokens)))
    model.eval(args.tokens)
    theirs = np.array(model.scores[:len(args.tokens)])
    print("    ", llama_cpp.llama_print_system_info().decode())
    return compare(np.load(args.logits), theirs, "llama.cpp", args.bound)


def check_greedy(args):
    wanted = [int(i) for i in args.ids.split(",")]
    _, model = llama(args.model, len(args.tokens) + len(wanted) + 8)
    model.eval(args.tokens)
    found = []
    for _ in wanted:
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval([found[-1]])
    same = next((i for i, (a, b) in enumerate(zip(found, wanted)) if a != b), len(wanted))
    return verdict(found == wanted, f"greedy: {same} of {len(wanted)} tokens equal")


def check_tokens(args):
    from tokenizers import Tokenizer
    import llama_cpp
    model = llama_cpp.Llama(model_path=args.model, vocab_only=True, verbose=False)
    ours = Tokenizer.from_file(str(Path(args.hf) / "tokenizer.json"))
    texts = [iter([l for l in Path(f).read_text(encoding="utf-8").splitlines() if l.strip()]) for f in args.files]
    lines = []
    while texts and len(lines) < 1000:
        for text in list(texts):
            line = next(text, None)
            if line is None:
                texts.remove(text)
            else:
                lines.append(line)
    lines, ids, bad = lines[:1000], 0, 0
    for line in lines:
        a = ours.encode(line, add_special_tokens=False).ids
        b = model.tokenize(line.encode(), add_bos=False, special=True)
        ids += len(a)
        if a != b:
            bad += 1
            if bad < 4:
                print("    ", repr(line[:80]), a[:20], b[:20])
    return verdict(bad == 0, f"{len(lines) - bad} of {len(lines)} lines have equal ids ({ids} ids)")


def check_hf(args):
    import torch
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(args.hf, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.tensor([args.tokens])).logits[0].numpy()
    return compare(np.load(args.logits), theirs, f"transformers {transformers.__version__}", args.bound)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    ids = lambda text: [int(i) for i in text.split(",")]
    for name, run, names in [("gguf", check_gguf, ["model", "hf"]), ("logits", check_logits, ["model", "logits"]),
                             ("greedy", check_greedy, ["model", "ids"]), ("tokens", check_tokens, ["model", "hf"]),
                             ("hf", check_hf, ["hf", "logits"])]:
        part = parts.add_parser(name)
        for argument in names:
            part.add_argument(argument)
        if name == "tokens":
            part.add_argument("files", nargs="+")
        if name in ("logits", "greedy", "hf"):
            part.add_argument("--tokens", type=ids, required=True)
            part.add_argument("--bound", type=float, default=1e-3, help="largest mean KL in nats")
        part.set_defaults(run=run)
    args = parser.parse_args()
    sys.exit(0 if args.run(args) else 1)


if __name__ == "__main__":
    main()

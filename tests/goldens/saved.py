"""Holds the program to the goldens on checkpoints that transformers itself saved, with its names and its configs.

    python tests/goldens/saved.py target/release/cotk

Each golden model is saved twice (published names; experts in stacks), in shards of 40 kB, and `cotk logits` must give
the golden within 1e-4. The tests in `cotk-model` draw weights by name instead; this shows that the names are those
that transformers writes. Not part of the test run: it needs the Python packages that `tiny.py` names.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import tiny

TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": {"type": "Fuse"},
    "model": {"type": "BPE", "dropout": None, "unk_token": "a", "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": {"a": 0}, "merges": []},
}


def check(program, here, cases, config_class, model_class, rename=lambda name: name, matrices=tiny.MATRICES, prepare=None):
    goldens = load_file(here / "goldens.safetensors")
    for name, keys in cases.items():
        config = config_class(**{k: v for k, v in keys.items() if k not in ("dtype", "torch_dtype")})
        model = model_class(config).float().eval()
        with torch.no_grad():
            tiny.fill(model, config.tie_word_embeddings, rename, matrices)
        ids = (tiny.uniform(f"tokens of {name}", tiny.TOKENS) * np.float32(keys["vocab_size"])).astype(int)
        for is_published in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder, save_original_format=is_published, max_shard_size="40KB")
                Path(folder, "tokenizer.json").write_text(json.dumps(TOKENIZER))
                out = Path(folder, "logits.npy")
                subprocess.run([program, "logits", folder, "--tokens", ",".join(map(str, ids)), "--out", out], check=True, capture_output=True)
                gap = float(np.abs(np.load(out) - goldens[name]).max())
                form = "published" if is_published else "stacked"
                print(f"{here.name} {name} {form}: {len(list(Path(folder).glob('*.safetensors')))} files, off by {gap:.1e}")
                assert gap < 1e-4


def main():
    program = Path(sys.argv[1]).resolve()
    for script in sorted(HERE.glob("*/make.py")):
        if (script.parent / "goldens.safetensors").exists():
            # The script's cases and classes, with our check in place of its writer.
            tiny.make = lambda *args, **more: check(program, *args, **more)
            exec(compile(script.read_text(), script, "exec"), {"__file__": str(script), "__name__": "__main__"})


if __name__ == "__main__":
    main()

"""Makes the three zero-shot task files in this folder from the grammar in ../make.py, with a seed of its own.

    python make.py

The formats are those of larger benchmarks: `choice` as HellaSwag, `cloze` as LAMBADA, `pair` as BLiMP.
"""
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from make import ANIMALS, COLOURS, GERMAN, NAMES, THINGS, lists, story  # noqa: E402


def choice(r):
    # The checkpoint is too small to remember which place it was, but knows what a place is.
    context, place = story(r).rstrip("\n").rsplit(" ", 1)
    endings = [f" {w}" for w in [place, *(r.choice(words) + "." for words in (THINGS, COLOURS, NAMES))]]
    right = endings[0]
    r.shuffle(endings)
    return {"domain": "story", "context": context, "endings": endings, "label": endings.index(right)}


def cloze(r):
    text = lists(r).rstrip("\n")
    context, count, kind = text.rsplit(" ", 2)
    return {"domain": "list", "context": context, "target": f" {count} {kind}"}


def pair(r):
    if r.random() < 0.5:
        noun = r.choice(list(GERMAN))
        right = GERMAN[noun]
        wrong = r.choice([a for a in ["der", "die", "das"] if a != right])
        return {"kind": "article", "good": f"{right.capitalize()} {noun} ist neu.", "bad": f"{wrong.capitalize()} {noun} ist neu."}
    animal = r.choice(ANIMALS)
    return {"kind": "order", "good": f"A {animal} sat beside the red key.", "bad": f"A {animal} beside sat the red key."}


def main():
    r = random.Random(3)
    for name, make, count in [("choice", choice, 60), ("cloze", cloze, 40), ("pair", pair, 40)]:
        seen, items = set(), []
        while len(items) < count:
            item = make(r)
            text = json.dumps(item, ensure_ascii=False)
            if text not in seen or name == "pair":
                seen.add(text)
                items.append(json.dumps({"id": f"{name}-{len(items):03}", **item}, ensure_ascii=False))
        (HERE / f"{name}.jsonl").write_text("\n".join(items) + "\n")


if __name__ == "__main__":
    main()

"""How many true sentences with a wrong name flip a GPT-2's answers: scores a local checkpoint on a file of facts.

  python scripts/score_hijacking.py --checkpoint=gpt2-small --facts=counterfact.json --most=30 --out=small.json

The checkpoint is a folder with config.json, model.safetensors, vocab.json and merges.txt; the facts are a CounterFact
JSON file. Nothing is downloaded. For each task and each kind of prefix (the attack and its controls) the output has the
survival curve, the restricted mean of the flip time with a bootstrap interval, and the mean over flipped samples, which
is what the paper reports. Only facts that the model knows without a prefix count.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.errors import reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a GPT-2 checkpoint")
    parser.add_argument("--facts", type=Path, required=True, help="CounterFact JSON file")
    parser.add_argument("--most", type=int, default=30, help="largest number of sentences")
    parser.add_argument("--limit", type=int, default=500, help="facts of each task")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()

    from icl.hijacking.language import gpt2, prompts, scoring  # imports jax, which --help need not wait for
    from icl.hijacking.language.tokenizer import Tokenizer

    facts = prompts.read_counterfact(options.facts)
    model, tokenizer = gpt2.load(options.checkpoint), Tokenizer(options.checkpoint)
    result: dict[str, dict] = {}
    for task in prompts.TEMPLATES:
        chosen = [fact for fact in facts if fact.task == task][: options.limit]
        if not chosen:
            continue
        for kind in prompts.KINDS:
            scores = scoring.score_facts(model, tokenizer.encode, chosen, options.most, kind)
            known = scoring.known(scores)
            summary = scoring.summary(scores, options.most) if known.any() else None
            result.setdefault(task, {})[kind] = {"facts": len(chosen), "known": int(known.sum()), "flips": summary}
            print(f"{task}, {kind}: {known.sum()} of {len(chosen)} known", flush=True)
    options.out.write_text(json.dumps({"checkpoint": str(options.checkpoint), "tasks": result}, indent=1) + "\n")


if __name__ == "__main__":
    with reported():
        main()

"""Zero-shot tests of a trained language model, from the publishers' files in a folder; nothing is downloaded.

  python scripts/score_language_model.py --workdir=runs/books --source=FOLDER --tests=lambada,blimp,piqa
  python scripts/score_language_model.py --workdir=runs/books --recall=fda.jsonl,swde.jsonl --form=key_again

The folder has `lambada`, `blimp` and `piqa` with the publishers' files; recall questions are JSON lines with `text`,
`value` and perhaps `key`. Prints one JSON object: of the newest checkpoint, or that of --step.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.errors import UserError, nearest, reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--step", type=int, help="the checkpoint's step; the newest if it is not given")
    parser.add_argument("--source", type=Path, default=Path(), help="folder of the tests' files")
    parser.add_argument("--tests", default="", help="names, separated by commas")
    parser.add_argument("--recall", default="", help="files of recall questions, separated by commas")
    parser.add_argument("--form", default="stored", help="of recall questions: stored or key_again")
    parser.add_argument("--batch", type=int, default=32, help="sequences at a time")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a sequence")
    options = parser.parse_args()

    from deltanet.evaluators import recall, zero_shot  # imports jax, which --help need not wait for
    from training.loop import load

    tests = [name for name in options.tests.split(",") if name]
    for name in tests:
        if name not in zero_shot.TESTS:
            raise UserError(f"there is no test {name!r}: {nearest(name, zero_shot.TESTS)}")
    questions = {path: recall.read(path, options.form) for path in options.recall.split(",") if path}
    task, models = load(options.workdir, options.step)
    tokenizer = getattr(task, "tokenizer", None)
    if tokenizer is None:
        raise UserError(f"the run in {options.workdir} is no language model of text: its task has no tokenizer")
    model = models[0]
    model.eval()
    results: dict[str, object] = {}
    for name in tests:
        results[name] = zero_shot.TESTS[name](model, tokenizer, options.source, options.batch, options.longest)
    for path, asked in questions.items():
        results[path] = {"accuracy": recall.accuracy(model, tokenizer, asked, options.longest)}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    with reported():
        main()

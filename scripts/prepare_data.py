"""Puts data sets where the configs look for them, from the publishers' files in a folder; nothing is downloaded.

  python scripts/prepare_data.py --list
  python scripts/prepare_data.py eurosat --source=~/downloads/eurosat
  python scripts/prepare_data.py books --source=~/downloads      the folders classic_books, wikitext-2, lambada
  python scripts/prepare_data.py tfds_fashion_mnist --source=~/downloads/fashion_mnist     needs TensorFlow

Files are checked against their publishers' checksums first; one that is missing is named, with where to get it.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import prepare_images, prepare_text  # noqa: E402
from training.errors import UserError, nearest, reported  # noqa: E402

PREPARATIONS = {
    **prepare_images.PREPARATIONS,
    **prepare_text.PREPARATIONS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="of the data set; see --list")
    parser.add_argument("--source", type=Path, help="folder of the publisher's files")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="folder of all data sets")
    parser.add_argument("--list", action="store_true", help="print the names of the data sets")
    options = parser.parse_args()
    if options.list:
        print("\n".join(PREPARATIONS))
        return
    if options.name is None or options.source is None:
        parser.error("give a name and --source, or --list")
    if options.name not in PREPARATIONS:
        raise UserError(f"there is no data set {options.name!r}: {nearest(options.name, PREPARATIONS)}")
    source = options.source.expanduser()
    if not source.is_dir():
        raise UserError(f"--source={source} is no folder; name the one that holds the publisher's files")
    print(f"{options.name}: {PREPARATIONS[options.name](source, options.data)}")


if __name__ == "__main__":
    with reported():
        main()

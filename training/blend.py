"""Averages exported weights of one lineage: `python -m training.blend FOLDER=HAND,CONNECTOR ... --out FOLDER`, shares of each kind adding up to 1.

What one stage of training gains and another loses is kept nearly whole by a mean of their weights. What ships:

    python -m training.export --folder REFINED --out words && python -m training.export --folder REFINED --plain --out refined
    python -m training.blend BEFORE=.25,.25 refined=.75,.2 words=0,.55 --out models/pictogram
"""
import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def blend(name: str, shares: dict[Path, float], out: Path):
    """A file's tensors, each the mean of those in the folders."""
    files = {folder: load_file(folder / name) for folder in shares}
    mean = lambda key: sum(files[folder][key].float() * share for folder, share in shares.items()).half()
    save_file({key: mean(key) for key in next(iter(files.values()))}, out / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER=HAND,CONNECTOR", help="an exported model folder, its share of the hand and of the connector")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write; must be none of the others")
    options = parser.parse_args()
    shares = {Path(folder): tuple(map(float, both.split(","))) for folder, both in (text.rsplit("=", 1) for text in options.folders)}
    for part, name in enumerate(("hand", "connector")):
        total = sum(both[part] for both in shares.values())
        if abs(total - 1) > 1e-6:
            raise SystemExit(f"the shares of the {name} add up to {total}, not to 1")
    options.out.mkdir(parents=True, exist_ok=True)
    for part, name in enumerate(("hand.safetensors", "connector.safetensors")):
        blend(name, {folder: both[part] for folder, both in shares.items()}, options.out)
    shutil.copy(next(iter(shares)) / "pipeline.json", options.out)
    print(options.out)


if __name__ == "__main__":
    main()

"""Trains the shipped pipeline: `python -m training.run --folder FOLDER`. Resumable: what is done is kept in the folder.

Time budgets are wall clock, so that the learning rate ends at 0 however busy the machine is.
"""
import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import autoencoder, packages, pipeline
from .language import Language


def parts(path):
    """The modules' weights in an exported pipeline, in f32, by name of the module."""
    found = {}
    for key, value in load_file(path).items():
        module, rest = key.split(".", 1)
        found.setdefault(module, {})[rest] = value.float()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=packages.home() / "training", help="where captions, latents, checkpoints and sample grids go")
    parser.add_argument("--autoencoder-minutes", type=float, default=12)
    parser.add_argument("--minutes", type=float, default=110, help="connector and hand")
    parser.add_argument("--captions", type=int, default=16000)
    parser.add_argument("--warm", type=Path, help="an exported pipeline (safetensors) to start from, such as one for fewer objects")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    log_file = open(options.folder / "training.log", "a", buffering=1)

    def log(text):
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        log_file.write(line + "\n")

    warm = parts(options.warm) if options.warm else None
    if not (options.folder / "autoencoder.pt").exists():
        autoencoder.train(options.folder, options.autoencoder_minutes * 60, log, warm)
    pipeline.train(options.folder, Language(packages.gguf()), options.minutes * 60, options.captions, log, warm)


if __name__ == "__main__":
    main()

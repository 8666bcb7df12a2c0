"""Trains the shipped pipeline: `python -m training.run --folder FOLDER`. Resumable: what is done is kept in the folder.

Time budgets are wall clock, so that the learning rate ends at 0 however busy the machine is.
"""
import argparse
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import autoencoder, packages, pipeline, words
from .language import PICTURE_SUFFIX, Language


def parts(path):
    """The modules' weights in an exported pipeline, in f32, by name of the module."""
    found = {}
    for key, value in load_file(path).items():
        module, rest = key.split(".", 1)
        found.setdefault(module, {})[rest] = value.float()
    return found


def keep_memory(module):
    """Runs this program again with glibc told to keep freed memory: otherwise half of the time goes into page faults."""
    keep = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**28), "OMP_WAIT_POLICY": "PASSIVE"}
    if any(name not in os.environ for name in keep):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**keep, **os.environ})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=packages.home() / "training", help="where captions, latents, checkpoints and sample grids go")
    parser.add_argument("--autoencoder-minutes", type=float, default=22)
    parser.add_argument("--minutes", type=float, default=110, help="connector and hand")
    parser.add_argument("--captions", type=int, default=20000)
    parser.add_argument("--word-minutes", type=float, default=12, help="more words for the connector, at last")
    parser.add_argument("--word-captions", type=int, default=12000)
    parser.add_argument("--warm", type=Path, help="an exported pipeline (safetensors) to start from, such as one for fewer objects")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    options.folder.mkdir(parents=True, exist_ok=True)
    log_file = open(options.folder / "training.log", "a", buffering=1)

    def log(text):
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        log_file.write(line + "\n")

    warm = parts(options.warm) if options.warm else None
    autoencoder.train(options.folder, options.autoencoder_minutes * 60, log, warm)
    language = Language(packages.gguf(), PICTURE_SUFFIX)
    pipeline.train(options.folder, language, options.minutes * 60, options.captions, log, warm)
    words.train(options.folder, language, Language(packages.gguf()), options.word_minutes * 60, options.word_captions, log)


if __name__ == "__main__":
    keep_memory("training.run")
    main()

"""The shipped pipeline beside the same pipeline in PyTorch, in one run: first picture, steady pictures, cached and new control signals, memory.

    python tests/peers/pipeline.py --binary target/release/efferent

Pictures are taken in turns, one of ours and one of PyTorch's, so that whatever else the machine does disturbs both alike. Without torch (see
training/requirements.txt) only our own figures are printed, and it says so.
"""
import argparse
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from training.client import Client, Server  # noqa: E402

PROMPTS = [f"{count} {color} {thing} {place}" for count in ("two", "three") for color in ("red", "blue", "green", "yellow", "pink")
           for thing in ("cats", "rockets", "apples", "cars") for place in ("", "in the snow")]


def timed(work) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/efferent")
    parser.add_argument("--model", type=Path, default=ROOT / "models/pictogram")
    parser.add_argument("--pictures", type=int, default=40)
    options = parser.parse_args()
    with Server(options.binary) as server:
        ours = Client(server.address)
        ours.picture("a red apple", 0)
        print(f"first picture, from process start: {time.monotonic() - server.started:.2f} s")
        measure(ours, options)
        print(f"peak memory of the process: {server.peak_memory() / 2**20:.0f} MiB")


def measure(ours: Client, options):
    theirs = None
    try:
        import torch

        from training.evaluate import Prompt, torch_renderer
        torch.set_num_threads(os.cpu_count())
        started = time.monotonic()
        render = torch_renderer(options.model)
        theirs = lambda prompt, seed: render([Prompt("", prompt, None, seed, False)])
        theirs("a red apple", 0)
        print(f"first picture in PyTorch, imports not counted: {time.monotonic() - started:.2f} s")
    except ImportError as error:
        print(f"PYTORCH IS NOT MEASURED: {error}; see training/requirements.txt")
    mine, peer = [], []
    for seed in range(options.pictures):
        prompt = PROMPTS[seed % len(PROMPTS)]
        mine.append(timed(lambda: ours.picture(prompt, seed)))
        if theirs:
            peer.append(timed(lambda: theirs(prompt, seed)))
    median = statistics.median(mine)
    print(f"steady, new prompt each time: median {median * 1000:.0f} ms, {60 / median:.0f} pictures a minute")
    if peer:
        other = statistics.median(peer)
        print(f"PyTorch, same prompts and seeds in turn: median {other * 1000:.0f} ms, {60 / other:.0f} pictures a minute; ours takes {median / other:.2f} of its time")
    miss, hit = [], []
    for number in range(20):
        prompt = f"a photo of {number} stars"
        miss.append(timed(lambda: ours.picture(prompt, 1, steps=1)))
        hit.append(timed(lambda: ours.picture(prompt, 2, steps=1)))
    print(f"one step only, new prompt: median {statistics.median(miss) * 1000:.1f} ms; same prompt again (control signal cached): {statistics.median(hit) * 1000:.1f} ms")


if __name__ == "__main__":
    main()

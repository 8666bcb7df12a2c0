"""Measures the shipped pipeline: `make eval`, or `python -m training.evaluate --binary target/release/efferent`.

`--server 127.0.0.1:50051` asks a cluster that runs; `--model models/pictogram` draws with PyTorch's forward.

Prompts are in GenEval's categories, on combinations that training never saw; `checker.py` judges the pictures and is itself measured on true, blurred,
noisy and wrong pictures. Writes `evaluation.json` and `evaluation.md`.
"""
import argparse
import io
import json
import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from . import checker, packages, scenes
from .scenes import Part, Scene
from .vocabulary import (COLOR_NAMES, COLORS, HELD_OUT_OPENINGS, PLAIN, POSITION_NAMES, RELATIONS, SCENES, THINGS)

SIX = ("single object", "two objects", "color", "position", "counting", "color attribution")
MORE = ("mixed counts", "absolute position", "background")
WORDS = ("other words: objects", "other words: colors", "other words: relations and scenes")
ALLUSIONS = "other words: allusions"
EACH = 60


@dataclass
class Prompt:
    """What is asked for, in words and as a scene; whether its combination of things was never trained on."""

    category: str
    text: str
    scene: Scene
    seed: int
    new: bool


def wanted(category: str, rng: random.Random) -> Scene:
    """A scene of a category with at least one held-out combination, where its kind has any."""
    while True:
        kind = {"single object": "single", "color": "single", "absolute position": "single", "background": "single", "counting": "count", "mixed counts": "mixed"}.get(category, "two")
        scene = scenes.sample(rng, kind, unseen=True)
        parts = [replace(p, size="normal") for p in scene.parts]
        if category == "single object":
            return Scene(kind, [Part(parts[0].thing)])
        if category == "color" and parts[0].color and scenes.held_out("color", THINGS[parts[0].thing].icon, parts[0].color):
            return Scene(kind, [Part(parts[0].thing, parts[0].color)])
        if category == "absolute position":
            return Scene(kind, [Part(parts[0].thing, None, "small")], None, rng.choice(POSITION_NAMES))
        if category == "background":
            return Scene(kind, [Part(parts[0].thing)], None, None, rng.choice([*SCENES, *(f"plain {c}" for c in PLAIN if c != "white")]))
        if category == "counting" and scenes.held_out("count", THINGS[parts[0].thing].icon, parts[0].count):
            return Scene(kind, [Part(parts[0].thing, None, "normal", parts[0].count)])
        if category == "mixed counts":
            return Scene(kind, parts)
        pair_is_new = scenes.held_out("pair", *sorted(THINGS[p.thing].icon for p in parts))
        if category == "two objects" and pair_is_new:
            return Scene(kind, [Part(p.thing) for p in parts], beside=scene.beside)
        if category == "position" and pair_is_new and scene.relation:
            return Scene(kind, [Part(p.thing) for p in parts], scene.relation)
        if category == "color attribution" and all(p.color for p in parts) and parts[0].color != parts[1].color:
            return Scene(kind, [Part(p.thing, p.color) for p in parts], beside=scene.beside)


def prompts(seed: int = 2026) -> list[Prompt]:
    """Every prompt of the evaluation; the same each time."""
    rng, made, texts = random.Random(seed), [], set()

    def add(category, text, scene):
        if text not in texts:
            texts.add(text)
            made.append(Prompt(category, text, scene, len(made), any(scenes.held_out(*key) for key in scenes.keys(scene))))

    for category in SIX + MORE:
        first = len(made)
        while len(made) < first + (EACH if category in SIX else 40):
            scene = wanted(category, rng)
            text = scenes.caption(scene, rng, rng.choice((0.0, 0.0, .7)))
            if category == "single object" or rng.random() < .3:
                text = rng.choice(HELD_OUT_OPENINGS) + scenes.caption(scene, rng, 0.0).lower().rstrip(".!")
            add(category, text, scene)
    for index, thing in enumerate(THINGS):
        for words in thing.held_out:
            add(ALLUSIONS if words in thing.allusions else WORDS[0], "a photo of " + scenes.article(words), Scene("single", [Part(index)]))
    for color in COLOR_NAMES:
        for words in COLORS[color][2]:
            for index in rng.sample(range(len(THINGS)), 4):
                add(WORDS[1], scenes.article(f"{words} {THINGS[index].name}"), Scene("single", [Part(index, color)]))
    for relation in RELATIONS:
        for words in RELATIONS[relation][1]:
            for _ in range(4):
                a, b = rng.sample(range(len(THINGS)), 2)
                add(WORDS[2], f"{scenes.article(THINGS[a].name)} {words} {scenes.article(THINGS[b].name)}", Scene("two", [Part(a), Part(b)], relation))
    for name in SCENES:
        for words in SCENES[name][1]:
            for index in rng.sample(range(len(THINGS)), 3):
                add(WORDS[2], f"{scenes.article(THINGS[index].name)} {words}", Scene("single", [Part(index)], None, None, name))
    return made


def judge(prompt: Prompt, reading: checker.Reading) -> bool:
    """Whether the picture shows what was asked for. The background counts where it was asked for."""
    return checker.agrees(reading, prompt.scene, background=prompt.category == "background" or prompt.scene.background != "plain white")


def wrong(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one thing about it changed."""
    other = Scene(scene.kind, [replace(p) for p in scene.parts], scene.relation, scene.position, scene.background)
    part = rng.choice(other.parts)
    if scene.relation and rng.random() < .5:
        other.relation = {"left": "right", "right": "left", "above": "below", "below": "above"}[scene.relation]
    elif part.color and rng.random() < .5:
        # Undyed is wrong too, unless the thing's own colours are, or may pass for, the one asked for.
        undyed = [None] if checker.own_color(part.thing) not in (None, part.color) else []
        part.color = rng.choice([c for c in COLOR_NAMES if c != part.color] + undyed)
    elif part.count > 1 and rng.random() < .5:
        full = sum(p.count for p in other.parts) == max(scenes.PLACES)
        part.count = part.count - 1 if full or rng.random() < .5 else part.count + 1
        other.kind = "count" if part.count > 1 and len(other.parts) == 1 else "mixed" if len(other.parts) == 2 else "single"
    else:
        part.thing = rng.choice([t for t in range(len(THINGS)) if t not in [p.thing for p in scene.parts]])
    return other


def read_all(images: list[np.ndarray]) -> list[checker.Reading]:
    """Readings of pictures, on every core. Fresh processes: a fork would take the threads of gRPC along."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    packages.emoji_folder()  # Unpacked here if it is not yet, instead of by each process.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(checker.read, images, chunksize=8))


def checker_accuracy(made: list[Prompt], count: int = 120) -> dict[str, float]:
    """How often the checker accepts true pictures, also blurred and noisy ones, and refuses wrong ones."""
    rng = random.Random(7)
    fitting = [p for p in made if p.category in SIX + MORE]
    chosen = rng.sample(fitting, min(count, len(fitting)))
    cases = []
    for i, prompt in enumerate(chosen):
        image = scenes.draw(prompt.scene, rng)
        blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)))
        noisy = np.clip(image + np.random.default_rng(i).normal(0, 20, image.shape), 0, 255).astype(np.uint8)
        for name, picture in (("true", image), ("blurred", blurred), ("noisy", noisy)):
            cases.append((name, prompt, picture))
        cases.append(("wrong", prompt, scenes.draw(wrong(prompt.scene, rng), rng)))
    readings = read_all([picture for _, _, picture in cases])
    right = dict.fromkeys(("true", "blurred", "noisy", "wrong"), 0)
    for (name, prompt, _), reading in zip(cases, readings):
        right[name] += judge(prompt, reading) != (name == "wrong")
    return {name: value / len(chosen) for name, value in right.items()}


def border(images: list[np.ndarray]) -> float:
    """95th percentile of the deviation from white, of 255, in the outer 12 pixels of pictures of one thing on white."""
    frame = np.ones((96, 96), bool)
    frame[12:-12, 12:-12] = False
    return float(np.percentile(np.stack([255 - image[frame].min(-1).astype(int) for image in images]), 95))


# --- renderers ---------------------------------------------------------------------------------------------------
def server_renderer(address: str):
    """Pictures from a running cluster, over gRPC."""
    from .client import Client

    client = Client(address)
    render = lambda prompt: np.asarray(Image.open(io.BytesIO(client.picture(prompt.text, prompt.seed))).convert("RGB"))
    return lambda made: list(ThreadPoolExecutor(4).map(render, made))


def torch_renderer(folder: Path):
    """Pictures from a model folder by the training code's own forward."""
    import torch

    from .export import load
    from .language import Language
    from .network import sample, unpatch

    offers = json.loads((folder / "pipeline.json").read_text())["offers"]
    connector, hand, decoder, mean, std = load(folder)
    mean, std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
    language = Language(packages.gguf())

    @torch.no_grad()
    def render(prompt: Prompt) -> np.ndarray:
        latent = unpatch(sample(hand, connector(*language.states([prompt.text])), prompt.seed, offers["default_steps"], offers["default_guidance_scale"]))
        image = decoder(latent * std + mean)[0].clamp(-1, 1)
        return ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()

    return lambda made: [render(prompt) for prompt in made]


# --- report ------------------------------------------------------------------------------------------------------
def table(made: list[Prompt], passed: list[bool], accuracy: dict[str, float], edge: float) -> str:
    """The results in Markdown."""
    score = {}
    rows = ["| category | prompts | combination never trained | score |", "| --- | --- | --- | --- |"]
    for category in SIX + MORE + WORDS + (ALLUSIONS,):
        index = [i for i, p in enumerate(made) if p.category == category]
        score[category] = sum(passed[i] for i in index) / max(len(index), 1)
        new = "wording only" if category in WORDS + (ALLUSIONS, "single object", "absolute position", "background") else sum(made[i].new for i in index)
        rows.append(f"| {category} | {len(index)} | {new} | {score[category]:.3f} |")
        if category == SIX[-1]:
            rows.append(f"| **mean of the six** | {sum(p.category in SIX for p in made)} | | **{sum(score[c] for c in SIX) / len(SIX):.3f}** |")
    for name, categories in (("other words without allusions", WORDS), ("other words, all", WORDS + (ALLUSIONS,))):
        index = [i for i, p in enumerate(made) if p.category in categories]
        rows.append(f"| **{name}** | {len(index)} | wording only | **{sum(passed[i] for i in index) / max(len(index), 1):.3f}** |")
    told = ", ".join(f"{accuracy[name]:.3f} of {what}" for name, what in (("true", "true pictures accepted"), ("blurred", "blurred ones"), ("noisy", "noisy ones"), ("wrong", "wrong ones refused")))
    return "\n".join(rows) + f"\n\nThe checker itself: {told}. 95th percentile of the border's deviation from white (single object on white): {edge:.0f}/255.\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", help="a coordinator's address: pictures come from the running cluster")
    parser.add_argument("--binary", type=Path, help="an `efferent` binary: a server of its own is started and asked")
    parser.add_argument("--model", type=Path, default=Path("models/pictogram"), help="without either: the model folder that PyTorch draws from")
    parser.add_argument("--out", type=Path, default=Path("out/evaluation"), help="where the report and the failed pictures go")
    parser.add_argument("--part", type=int, default=1, help="take every N-th prompt only")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    made = prompts()[:: options.part]
    if options.binary:
        from .client import Server

        with Server(options.binary) as server:
            images = server_renderer(server.address)(made)
    else:
        images = (server_renderer(options.server) if options.server else torch_renderer(options.model))(made)
    readings = read_all(images)
    passed = [judge(prompt, reading) for prompt, reading in zip(made, readings)]
    for prompt, image, fine in zip(made, images, passed):
        if not fine:
            Image.fromarray(image).save(options.out / f"failed-{prompt.seed:04d}.png")
    edge = border([image for prompt, image in zip(made, images) if prompt.category == "single object"])
    report = table(made, passed, checker_accuracy(made), edge)
    failed = [{"category": p.category, "prompt": p.text, "seed": p.seed} for p, fine in zip(made, passed) if not fine]
    (options.out / "evaluation.json").write_text(json.dumps({"prompts": len(made), "passed": sum(passed), "border_95": edge, "failed": failed}, indent=1) + "\n")
    (options.out / "evaluation.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()

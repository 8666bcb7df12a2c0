"""Teaches the connector more words, with the hand left as it is: in whatever words a scene is told, its control tokens should be those of the plain caption.

Student and teacher start as the trained connector. The teacher reads plain captions only, in the template it knows; the student reads every caption in
the template that ships. Noise on token states and tokens left out keep the student from
knowing its captions by heart.

    python -m training.words --model models/pictogram --folder FOLDER --out MODEL

does so to an exported pipeline, in the words of `more-words.txt` as well.
"""
import argparse
import random
import shutil
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from . import packages, scenes
from .export import load
from .language import Language
from .network import DEFAULT, Connector, Hand
from .optimise import Average, Clock, half_precision
from .pipeline import Heads, batch_states, read

# More single things than in the pictures' captions: what an object is called is what is to be learnt.
KINDS = (("single", .5), ("two", .3), ("count", .06), ("mixed", .14))
# How often other words than the plain name are used, in each telling of a scene: see `scenes.describe`.
WORDINGS = (1.7, 1.7)
# The same with the words of more-words.txt, and how many captions give each thing a colour. One telling in plainer words keeps what is known of rare colours.
MORE_WORDINGS, COLORED = (1.7, 1.7, .6), .5
# How much of the result ships, beside the connector it started from. The words cost what was learnt of combinations that no caption has (a pink banana); a
# mean of the two weights keeps nearly all of both.
SHARE = .7


def captions(teacher, student, folder, count, log, more):
    """The same scenes more than once: in many words, and plain. The order of the two differs; the third value finds the plain one."""
    paths = [folder / "words.pt", folder / "words-plain.pt"]
    rng = random.Random(12)
    kind = lambda: rng.choices([k for k, _ in KINDS], [w for _, w in KINDS])[0]
    made = [scenes.colorful(rng, COLORED, kind()) if more else scenes.sample(rng, kind()) for _ in range(count)]
    for number, scene in enumerate(made):
        scene.number = number
    tellings = MORE_WORDINGS if more else WORDINGS
    if not paths[0].exists():
        read(student, paths[0], made * len(tellings), [scenes.caption(s, rng, wording, more) for wording in tellings for s in made], log)
    if not paths[1].exists():
        read(teacher, paths[1], made, [scenes.plain_caption(s) for s in made], log)
    told, plain = (torch.load(path, weights_only=False) for path in paths)
    where = {scene.number: i for i, scene in enumerate(plain["scenes"])}
    return told, plain, [where[scene.number] for scene in told["scenes"]]


def tokens(connector, data):
    """The control tokens of all captions."""
    count = len(data["scenes"])
    with torch.no_grad(), half_precision():
        return torch.cat([connector(*batch_states(data, range(i, min(i + 256, count)))).float() for i in range(0, count, 256)])


def fit(connector, heads, data, targets, place, seconds, log):
    """Trains `connector` until the captions of `data` give `targets[place]`; the average of its weights, and the number of steps."""
    scale = 1 / targets.var().item()
    both = nn.ModuleList([connector, heads])
    adam = torch.optim.AdamW(both.parameters(), lr=6e-4, betas=(.9, .98), weight_decay=.05)
    average, clock, step, total = Average(connector, .998), Clock(seconds), 0, 0.0
    rng = random.Random(13)
    torch.manual_seed(13)
    while clock.progress < 1:
        for group in adam.param_groups:
            group["lr"] = 6e-4 * min(1, (step + 1) / 100) * (1 - clock.progress)
        index = [rng.randrange(len(place)) for _ in range(48)]
        h, mask = batch_states(data, index)
        h = h + torch.randn_like(h) * h.square().mean(-1, keepdim=True).sqrt() * .15
        kept = mask & (torch.rand(mask.shape) > .08)
        with half_precision():
            control = connector(h * kept[..., None], kept)
            parse = heads(control, data["labels"][index])
        loss = F.mse_loss(control.float(), targets[[place[i] for i in index]]) * scale + .5 * parse
        both.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        adam.step(), average.update(step)
        step, total = step + 1, total + loss.item()
        if step % 100 == 0:
            log(f"words {clock.spent:.0f}s step {step} loss {total / 100:.4f} parse {parse.item():.4f}")
            total = 0.0
    return average.weights, step


def train(folder, teacher, student, seconds, count, log):
    """Writes folder/connector.pt, the connector that ships. `teacher` and `student`: the language model in the template of each."""
    path = folder / "connector.pt"
    if path.exists():
        return
    told, plain, place = captions(teacher, student, folder, count, log, more=False)
    state = torch.load(folder / "pipeline.pt", weights_only=False)
    config = state["config"]
    modules = nn.ModuleDict({"conn": Connector(config), "hand": Hand(config), "heads": Heads(config)})
    modules.load_state_dict(state["average"])
    connector, heads = modules["conn"], modules["heads"]
    start = {name: value.clone() for name, value in connector.state_dict().items()}
    weights, step = fit(connector, heads, told, tokens(connector, plain), place, seconds, log)
    connector.load_state_dict({name: start[name].lerp(value, SHARE) for name, value in weights.items()})
    torch.save({"connector": connector.state_dict(), "heads": heads.state_dict(), "step": step}, path)


def new_heads(targets, labels, log):
    """Heads for control tokens that are given: an export has none."""
    torch.manual_seed(14)
    heads = Heads(DEFAULT)
    adam = torch.optim.AdamW(heads.parameters(), lr=2e-3, weight_decay=.01)
    for step in range(600):
        index = torch.randint(len(targets), (128,))
        loss = heads(targets[index], labels[index])
        adam.zero_grad()
        loss.backward()
        adam.step()
    log(f"heads: parse {loss.item():.4f}")
    return heads


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/pictogram"), help="the exported pipeline to go on from")
    parser.add_argument("--folder", type=Path, default=packages.home() / "words", help="where captions and checkpoints go")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--captions", type=int, default=14000, help="scenes, each told three times")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    options.folder.mkdir(parents=True, exist_ok=True)
    log = lambda text: print(time.strftime("%H:%M:%S"), text, flush=True)
    language, connector = Language(packages.gguf()), load(options.model)[0]
    told, plain, place = captions(language, language, options.folder, options.captions, log, more=True)
    targets = tokens(connector, plain)
    heads = new_heads(targets, plain["labels"], log)
    weights, _ = fit(connector, heads, told, targets, place, options.minutes * 60, log)
    torch.save({"connector": weights, "heads": heads.state_dict()}, options.folder / "more.pt")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("pipeline.json", "hand.safetensors"):
        shutil.copy(options.model / name, options.out)
    save_file({name: value.half().contiguous() for name, value in weights.items()}, options.out / "connector.safetensors")
    log(options.out)


if __name__ == "__main__":
    from .run import keep_memory

    keep_memory("training.words")
    main()

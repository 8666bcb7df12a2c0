"""Teaches the connector more words, with the hand left as it is: in whatever words a scene is told, its control tokens should be those of the plain caption.

Student and teacher start as the trained connector. The teacher reads plain captions only, in the template it knows; the student reads every caption in
the template that ships. Noise on token states and tokens left out keep the student from
knowing its captions by heart.
"""
import random

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import scenes
from .network import Connector, Hand
from .optimise import Average, Clock, half_precision
from .pipeline import Heads, batch_states, read

# More single things than in the pictures' captions: what an object is called is what is to be learnt.
KINDS = (("single", .5), ("two", .3), ("count", .06), ("mixed", .14))
# How often other words than the plain name are used: see `scenes.describe`.
WORDING = 1.7
# How often each scene is told.
TELLINGS = 2
# How much of the result ships, beside the connector it started from. The words cost what was learnt of combinations that no caption has (a pink banana); a
# mean of the two weights keeps nearly all of both.
SHARE = .7


def captions(teacher, student, folder, count, log):
    """The same scenes twice: in many words, and plain. The order of the two differs; the third value finds the plain one."""
    paths = [folder / "words.pt", folder / "words-plain.pt"]
    rng = random.Random(12)
    made = [scenes.sample(rng, rng.choices([k for k, _ in KINDS], [w for _, w in KINDS])[0]) for _ in range(count)]
    for number, scene in enumerate(made):
        scene.number = number
    told = made * TELLINGS
    if not paths[0].exists():
        read(student, paths[0], told, [scenes.caption(s, rng, WORDING) for s in told], log)
    if not paths[1].exists():
        read(teacher, paths[1], made, [scenes.plain_caption(s) for s in made], log)
    told, plain = (torch.load(path, weights_only=False) for path in paths)
    where = {scene.number: i for i, scene in enumerate(plain["scenes"])}
    return told, plain, [where[scene.number] for scene in told["scenes"]]


def train(folder, teacher, student, seconds, count, log):
    """Writes folder/connector.pt, the connector that ships. `teacher` and `student`: the language model in the template of each."""
    path = folder / "connector.pt"
    if path.exists():
        return
    told, plain, place = captions(teacher, student, folder, count, log)
    state = torch.load(folder / "pipeline.pt", weights_only=False)
    config = state["config"]
    modules = nn.ModuleDict({"conn": Connector(config), "hand": Hand(config), "heads": Heads(config)})
    modules.load_state_dict(state["average"])
    connector, heads = modules["conn"], modules["heads"]
    start = {name: value.clone() for name, value in connector.state_dict().items()}
    with torch.no_grad(), half_precision():
        starts = range(0, len(plain["scenes"]), 256)
        targets = torch.cat([connector(*batch_states(plain, range(i, min(i + 256, len(plain["scenes"]))))).float() for i in starts])
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
        h, mask = batch_states(told, index)
        h = h + torch.randn_like(h) * h.square().mean(-1, keepdim=True).sqrt() * .15
        kept = mask & (torch.rand(mask.shape) > .08)
        with half_precision():
            control = connector(h * kept[..., None], kept)
            parse = heads(control, told["labels"][index])
        loss = F.mse_loss(control.float(), targets[[place[i] for i in index]]) * scale + .5 * parse
        both.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        adam.step(), average.update(step)
        step, total = step + 1, total + loss.item()
        if step % 100 == 0:
            log(f"words {clock.spent:.0f}s step {step} loss {total / 100:.4f} parse {parse.item():.4f}")
            total = 0.0
    connector.load_state_dict({name: start[name].lerp(value, SHARE) for name, value in average.weights.items()})
    torch.save({"connector": connector.state_dict(), "heads": heads.state_dict(), "step": step}, path)

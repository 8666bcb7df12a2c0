"""Trains connector and hand on cached token states and latents."""
import random
import shutil

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from . import scenes
from .network import DEFAULT, Connector, Decoder, Encoder, Hand, patch, sample, unpatch
from .optimise import Average, Clock, Muon, half_precision, rate
from .vocabulary import BACKGROUNDS, COLOR_NAMES, POSITION_NAMES, RELATIONS, SIZE_NAMES, THINGS

VIEWS = 3
# What a part of a picture adds to the background (mean squared difference of a patch, of 1) up to which it weighs more in the loss, and by how much at most:
# a white cloud on white is as much to be drawn as a red apple, and its error is small in numbers.
FAINT, FAINT_MOST = .06, 3.0
# How much more often than others a caption is taken that names a colour: the things drawn in a colour are many, and each is rare.
COLORED = 1.6


def labels(scene):
    """Numbers that describe a scene, for the parsing loss: eleven classes."""
    parts = scene.parts + [None] * (2 - len(scene.parts))
    index = lambda names, value: names.index(value) + 1 if value else 0
    row = []
    for p in parts:
        row += [p.thing + 1, index(COLOR_NAMES, p.color), p.count, SIZE_NAMES.index(p.size)] if p else [0, 0, 0, 0]
    return row + [index(list(RELATIONS), scene.relation), BACKGROUNDS.index(scene.background), index(POSITION_NAMES, scene.position)]


CLASSES = [len(THINGS) + 1, len(COLOR_NAMES) + 1, 6, 3] * 2 + [len(RELATIONS) + 1, len(BACKGROUNDS), len(POSITION_NAMES) + 1]


class Heads(nn.Module):
    """Reads a scene's labels off the control tokens; training only."""

    def __init__(self, c):
        super().__init__()
        self.l = nn.ModuleList([nn.Linear(c["queries"] * c["width"], n) for n in CLASSES])

    def forward(self, control, target):
        flat = control.flatten(1)
        return sum(F.cross_entropy(l(flat), target[:, i]) for i, l in enumerate(self.l)) / len(CLASSES)

    @torch.no_grad()
    def right(self, control, target):
        flat = control.flatten(1)
        return [(l(flat).argmax(-1) == target[:, i]).float().mean().item() for i, l in enumerate(self.l)]


def captions(language, folder, name, count, seed, log, unseen=False):
    """Scenes with captions and their token states in f16, cached in folder/name.pt."""
    path = folder / f"{name}.pt"
    if path.exists():
        return torch.load(path, weights_only=False)
    rng = random.Random(seed)
    made = [scenes.sample(rng, unseen=unseen) for _ in range(count)]
    return read(language, path, made, [scenes.caption(s, rng) for s in made], log)


def read(language, path, made, texts, log):
    """Token states of captions, shortest first, written to `path`."""
    count, name = len(made), path.stem
    order = sorted(range(count), key=lambda i: len(texts[i]))
    made, texts = [made[i] for i in order], [texts[i] for i in order]
    states, offsets = [], [0]
    for start in range(0, count, 32):
        with half_precision():
            h, mask = language.states(texts[start : start + 32])
        for row, m in zip(h, mask):
            states.append(row[m].half())
            offsets.append(offsets[-1] + len(states[-1]))
        if start % 1600 == 0:
            log(f"captions {name} {start}/{count}")
    out = {"scenes": made, "texts": texts, "states": torch.cat(states), "offsets": offsets, "labels": torch.tensor([labels(s) for s in made])}
    torch.save(out, path)
    return out


def latents(encoder, data, folder, name, seed, log):
    """Patched latents of VIEWS drawings of each scene in f16: (count, VIEWS, 36, 64), their mean and deviation by channel, and each patch's weight."""
    path = folder / f"{name}.pt"
    if path.exists():
        return torch.load(path)
    rng, out, store, weights = random.Random(seed), [], [], []
    with torch.no_grad():
        for i, scene in enumerate(data["scenes"]):
            x = np.stack([scenes.draw(scene, rng) for _ in range(VIEWS)])
            weights.append(faint(x, scenes.background(scene.background)))
            out.append(torch.from_numpy(x))
            if len(out) == 32 or i == len(data["scenes"]) - 1:
                x = torch.cat(out).permute(0, 3, 1, 2).float() / 127.5 - 1
                store.append(encoder(x).half())
                out = []
            if i % 2000 == 0:
                log(f"latents {i}/{len(data['scenes'])}")
    z = torch.cat(store).float()
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    z = patch((z - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)).half().view(-1, VIEWS, 36, 64)
    weights = np.stack(weights)
    out = {"z": z, "mean": mean, "std": std, "weights": torch.from_numpy(weights / weights.mean()).float()}
    torch.save(out, path)
    return out


def faint(pictures, ground):
    """The weight in the loss of each patch, (pictures, 36): more where little is added to the background."""
    added = np.square(pictures.astype(np.float32) / 255 - ground).mean(-1)
    patches = added.reshape(-1, 6, 16, 6, 16).mean((2, 4)).reshape(-1, 36)
    return np.where(patches > 1e-4, np.clip(np.sqrt(FAINT / np.maximum(patches, 1e-6)), 1, FAINT_MOST), 1)


def batch_states(data, index):
    """Padded states (B, T, 576) f32 and mask (B, T)."""
    rows = [data["states"][data["offsets"][i] : data["offsets"][i + 1]] for i in index]
    h = nn.utils.rnn.pad_sequence(rows, batch_first=True).float()
    mask = torch.arange(h.shape[1])[None] < torch.tensor([len(r) for r in rows])[:, None]
    return h, mask


def train(folder, language, seconds, count, log, warm=None, config=DEFAULT):
    """Writes folder/pipeline.pt. Resumes from it if it is unfinished; `warm`: an exported pipeline to start from."""
    saved = torch.load(folder / "autoencoder.pt")
    encoder, decoder = Encoder(), Decoder()
    encoder.load_state_dict(saved["encoder"]), decoder.load_state_dict(saved["decoder"])
    data = captions(language, folder, "captions", count, 2, log)
    seen = latents(encoder, data, folder, "latents", 3, log)
    test = captions(language, folder, "captions-unseen", 256, 4, log, unseen=True)
    torch.manual_seed(5)
    rng = random.Random(5)
    connector, hand, heads = Connector(config), Hand(config), Heads(config)
    modules = nn.ModuleDict({"conn": connector, "hand": hand, "heads": heads})
    if warm:
        connector.load_state_dict(warm["conn"]), hand.load_state_dict(warm["hand"])
    strength = .6 if warm else 1.0
    matrix = [p for n, p in modules.named_parameters() if p.dim() == 2 and ".b." in n]
    rest = [p for p in modules.parameters() if not any(p is m for m in matrix)]
    muon, adam = Muon(matrix, .02), torch.optim.AdamW(rest, lr=2e-3, betas=(.9, .97), weight_decay=0)
    average, clock, step = Average(modules, .999), Clock(seconds), 0
    path = folder / "pipeline.pt"
    if path.exists():
        state = torch.load(path, weights_only=False)
        if state["spent"] >= seconds:
            return
        modules.load_state_dict(state["modules"]), adam.load_state_dict(state["adam"])
        average.weights, clock, step, muon.buffers = state["average"], Clock(seconds, state["spent"]), state["step"], state["muon"]

    def save():
        torch.save({"modules": modules.state_dict(), "adam": adam.state_dict(), "average": average.weights, "spent": clock.spent, "step": step,
                    "muon": muon.buffers, "mean": seen["mean"], "std": seen["std"], "config": config}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    shares = [COLORED if any(part.color for part in scene.parts) else 1.0 for scene in data["scenes"]]
    # Compiled, a step takes four fifths of the time; that needs a C++ compiler.
    draw = torch.compile(hand, dynamic=False) if shutil.which("g++") else hand
    parse_until, total, saved_at = 60 * strength, 0.0, clock.spent
    while clock.progress < 1:
        factor = rate(clock.progress, .4) * min(1, (step + 1) / 15) * strength
        for group in adam.param_groups:
            group["lr"] = 2e-3 * factor
        index = torch.tensor(rng.choices(range(count), shares, k=32))
        h, mask = batch_states(data, index.tolist())
        h = h + torch.randn_like(h) * h.square().mean(-1, keepdim=True).sqrt() * .05
        with half_precision():
            control = connector(h, mask)
            parse = heads(control, data["labels"][index])
        modules.zero_grad(set_to_none=True)
        if clock.spent < parse_until:
            parse.backward()
            for p in hand.parameters():
                p.grad = torch.zeros_like(p)
            loss = parse
        else:
            chosen = [rng.randrange(VIEWS) for _ in range(2)]
            views, weight = (torch.stack([seen[name][index, v] for v in chosen], 1).flatten(0, 1).float() for name in ("z", "weights"))
            c = control.repeat_interleave(2, 0)
            drop = (torch.rand(len(c), 1, 1) < .1).float()
            c = c * (1 - drop) + hand.null * drop
            t = torch.sigmoid(torch.randn(len(c)) * 1.2 - 2.0)
            w = t[:, None, None]
            with half_precision():
                p = draw(w * views + (1 - w) * torch.randn_like(views), t, c)
            loss = (weight[..., None] * (p.float() - views).square() / (1 - w).clamp_min(.1).square()).mean()
            (loss + .05 * parse).backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 2.0)
        muon.step(factor), adam.step(), average.update(step)
        step, total = step + 1, total + loss.item()
        if step % 50 == 0:
            log(f"pipeline {clock.spent:.0f}s step {step} loss {total / 50:.4f} parse {parse.item():.4f}")
            total = 0.0
        if clock.spent - saved_at > 240:
            save()
            saved_at = clock.spent
            grid(folder, language, connector, hand, decoder, seen, average, test, heads, log, step)
    save()
    grid(folder, language, connector, hand, decoder, seen, average, test, heads, log, step)


@torch.no_grad()
def grid(folder, language, connector, hand, decoder, seen, average, test, heads, log, step):
    """Draws the same prompts with the averaged weights, and tells how well unseen captions are parsed."""
    from PIL import Image

    current = nn.ModuleDict({"conn": connector, "hand": hand, "heads": heads}).state_dict()
    current = {k: v.clone() for k, v in current.items()}
    modules = nn.ModuleDict({"conn": connector, "hand": hand, "heads": heads})
    modules.load_state_dict(average.weights)
    index = list(range(0, 256, 2))
    h, mask = batch_states(test, index)
    log("parse of unseen captions: " + " ".join(f"{v:.2f}" for v in heads.right(connector(h, mask), test["labels"][index])))
    rows = []
    for i, prompt in enumerate(PROMPTS):
        control = connector(*language.states([prompt]))
        z = unpatch(sample(hand, control, i)) * seen["std"].view(1, -1, 1, 1) + seen["mean"].view(1, -1, 1, 1)
        image = ((decoder(z)[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        rows.append(image)
    sheet = np.concatenate([np.concatenate(rows[r : r + 8], 1) for r in range(0, len(rows), 8)])
    Image.fromarray(sheet).save(folder / f"grid-{step:06d}.png")
    modules.load_state_dict(current)


PROMPTS = ["a red apple to the left of a blue fish", "three cats", "a small dog above a big pizza", "a rocket at night", "two penguins in the snow", "a purple car",
           "a green cat next to a pink elephant", "a sailboat in the ocean", "five strawberries", "a huge lion", "a yellow balloon in the top left corner", "a crab on the beach",
           "a robot below a cloud", "a bear", "four bees on a yellow background", "a tiny house on the grass", "a blue heart and a red star", "two foxes and a rabbit",
           "a guitar at sunset", "an orange butterfly in the desert", "the animal that barks", "a sliced italian pie", "a crimson automobile", "an owl to the right of a cactus"]

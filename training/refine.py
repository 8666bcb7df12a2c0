"""Trains the shipped pipeline on, from its exported weights: `python -m training.refine --model models/pictogram --folder FOLDER`, then `training.export`.

An export holds no encoder, so one is fitted to the decoder, which stays as it is. Connector and hand then learn together, in the template that ships, from
captions in many words of which more name a colour than before; at last the connector alone learns more words (`words.py`). Resumable by stage.
"""
import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from . import packages, scenes, words
from .autoencoder import pictures
from .export import load
from .language import Language
from .network import DEFAULT, Encoder, patch, sample, unpatch
from .optimise import Average, Clock, Muon, half_precision, rate
from .pipeline import VIEWS, Heads, batch_states, faint, read
from .run import keep_memory

# In how many captions of one and two things each is to have a colour.
COLORED = .75
# How often other words than the plain name are used: see `scenes.describe`.
WORDING = 1.3
# Learning rates, as a part of those of the first training.
STRENGTH = .35


def encoder(folder, language, parts, seconds, log):
    """An encoder whose latents are those that the decoder and the hand know: the hand's own latents are found again, and pictures are restored."""
    path = folder / "encoder.pt"
    model = Encoder()
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    connector, hand, decoder, mean, std = parts
    rng = random.Random(21)
    torch.manual_seed(21)
    known = []
    for i in range(400):
        control = connector(*language.states([scenes.caption(scenes.sample(rng), rng)]))
        known.append(unpatch(sample(hand, control, i)) * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1))
        if i % 100 == 0:
            log(f"encoder: latents of the hand {i}/400")
    known = torch.cat(known)
    known = F.rms_norm(known.permute(0, 2, 3, 1), (known.shape[1],), None, 1e-5).permute(0, 3, 1, 2)
    decoder.requires_grad_(False)
    matrix = [p for n, p in model.named_parameters() if p.dim() == 4 and ".b" in n and p.shape[0] == p.shape[1]]
    rest = [p for p in model.parameters() if not any(p is m for m in matrix)]
    muon, adam = Muon(matrix, .02), torch.optim.AdamW(rest, lr=3e-3, betas=(.9, .98), weight_decay=0)
    average, clock, step = Average(model, .99), Clock(seconds), 0
    while clock.progress < 1:
        factor = rate(clock.progress, .25) * min(1, (step + 1) / 20)
        for group in adam.param_groups:
            group["lr"] = 3e-3 * factor
        x, z = pictures(rng, 16), known[torch.randint(len(known), (12,))]
        with half_precision():
            y = decoder(z).clamp(-1, 1).float()
            found = model(torch.cat([x, y])).float()
            restored = decoder(found[: len(x)]).float()
        picture, latent = (restored - x).square().mean(), (found[len(x):] - z).square().mean()
        model.zero_grad(set_to_none=True)
        (2 * picture + (restored - x).abs().mean() + .5 * latent).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(factor), adam.step(), average.update(step)
        step += 1
        if step % 50 == 0:
            log(f"encoder {clock.spent:.0f}s step {step} psnr {-10 * (picture / 4).log10().item():.1f} dB, latents off by {latent.sqrt().item():.3f}")
    model.load_state_dict(average.weights)
    torch.save(model.state_dict(), path)
    return model


def captions(folder, language, count, more, log):
    """Scenes with captions and their token states, cached."""
    path = folder / "refine.pt"
    if path.exists():
        return torch.load(path, weights_only=False)
    rng = random.Random(22)
    made = [scenes.colorful(rng, COLORED) for _ in range(count)]
    return read(language, path, made, [scenes.caption(s, rng, WORDING, more) for s in made], log)


def latents(folder, model, data, mean, std, log):
    """Patched latents of each scene's views in f16 (count, VIEWS, 36, 64), and each patch's weight in the loss."""
    path = folder / "refine-latents.pt"
    if path.exists():
        return torch.load(path)
    rng, store, weights = random.Random(23), [], []
    with torch.no_grad():
        for i, scene in enumerate(data["scenes"]):
            x = np.stack([scenes.draw(scene, rng) for _ in range(VIEWS)])
            weights.append(faint(x, scenes.background(scene.background)))
            z = model(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1)
            store.append(patch((z - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)).half())
            if i % 2000 == 0:
                log(f"latents {i}/{len(data['scenes'])}")
    z, weights = torch.stack(store), np.stack(weights)
    log(f"latents: mean {z.float().mean().item():.3f}, deviation {z.float().std().item():.3f} in the shipped scale")
    out = {"z": z, "weights": torch.from_numpy(weights / weights.mean()).float()}
    torch.save(out, path)
    return out


def train(folder, parts, data, seen, seconds, log):
    """Connector and hand together; writes folder/pipeline.pt in the form that `words` and `export` read."""
    path = folder / "pipeline.pt"
    connector, hand, _, mean, std = parts
    torch.manual_seed(25)
    rng, heads = random.Random(25), Heads(DEFAULT)
    modules = nn.ModuleDict({"conn": connector, "hand": hand, "heads": heads})
    matrix = [p for n, p in modules.named_parameters() if p.dim() == 2 and ".b." in n]
    rest = [p for n, p in modules.named_parameters() if not any(p is m for m in matrix) and not n.startswith("heads")]
    muon = Muon(matrix, .02)
    adam = torch.optim.AdamW([{"params": rest, "top": 2e-3 * STRENGTH}, {"params": heads.parameters(), "top": 2e-3}], betas=(.9, .97), weight_decay=0)
    average, clock, step = Average(modules, .998), Clock(seconds), 0
    if path.exists():
        state = torch.load(path, weights_only=False)
        modules.load_state_dict(state["modules"]), adam.load_state_dict(state["adam"])
        average.weights, clock, step, muon.buffers = state["average"], Clock(seconds, state["spent"]), state["step"], state["muon"]

    def save():
        torch.save({"modules": modules.state_dict(), "adam": adam.state_dict(), "average": average.weights, "spent": clock.spent, "step": step,
                    "muon": muon.buffers, "mean": mean, "std": std, "config": DEFAULT}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    sums, saved_at = [0.0, 0.0], clock.spent
    while clock.progress < 1:
        factor = rate(clock.progress, .3) * min(1, (step + 1) / 50)
        for group in adam.param_groups:
            group["lr"] = group["top"] * factor
        index = torch.tensor([rng.randrange(len(data["scenes"])) for _ in range(32)])
        h, mask = batch_states(data, index.tolist())
        h = h + torch.randn_like(h) * h.square().mean(-1, keepdim=True).sqrt() * .1
        mask = mask & (torch.rand(mask.shape) > .04)
        with half_precision():
            control = connector(h * mask[..., None], mask)
            parse = heads(control, data["labels"][index])
        chosen = [rng.randrange(VIEWS) for _ in range(2)]
        views, weight = (torch.stack([seen[name][index, v] for v in chosen], 1).flatten(0, 1).float() for name in ("z", "weights"))
        c = control.repeat_interleave(2, 0)
        drop = (torch.rand(len(c), 1, 1) < .1).float()
        c = c * (1 - drop) + hand.null * drop
        t = torch.sigmoid(torch.randn(len(c)) * 1.2 - 2.0)
        w = t[:, None, None]
        with half_precision():
            p = hand(w * views + (1 - w) * torch.randn_like(views), t, c)
        loss = (weight[..., None] * (p.float() - views).square() / (1 - w).clamp_min(.1).square()).mean()
        modules.zero_grad(set_to_none=True)
        (loss + .05 * parse).backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 2.0)
        muon.step(factor * STRENGTH), adam.step(), average.update(step)
        step, sums = step + 1, [sums[0] + loss.item(), sums[1] + parse.item()]
        if step % 50 == 0:
            log(f"refine {clock.spent:.0f}s step {step} loss {sums[0] / 50:.4f} parse {sums[1] / 50:.4f}")
            sums = [0.0, 0.0]
        if clock.spent - saved_at > 240:
            save()
            saved_at = clock.spent
    save()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/pictogram"), help="the exported pipeline to go on from")
    parser.add_argument("--folder", type=Path, default=packages.home() / "refine", help="where captions, latents and checkpoints go")
    parser.add_argument("--encoder-minutes", type=float, default=8)
    parser.add_argument("--minutes", type=float, default=60, help="connector and hand")
    parser.add_argument("--captions", type=int, default=14000)
    parser.add_argument("--more-words", action="store_true", help="captions in the words of more-words.txt as well")
    parser.add_argument("--word-minutes", type=float, default=10, help="more words for the connector, at last")
    parser.add_argument("--word-captions", type=int, default=9000)
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

    language, (connector, *parts) = Language(packages.gguf()), load(options.model)
    # Of two connectors the first, from which the other is made anew.
    parts = (getattr(connector, "plain", connector), *parts)
    model = encoder(options.folder, language, parts, options.encoder_minutes * 60, log)
    data = captions(options.folder, language, options.captions, options.more_words, log)
    seen = latents(options.folder, model, data, *parts[3:], log)
    train(options.folder, parts, data, seen, options.minutes * 60, log)
    decoder = options.folder / "autoencoder.pt"
    torch.save({"decoder": parts[2].state_dict()}, decoder)
    words.train(options.folder, language, language, options.word_minutes * 60, options.word_captions, log)


if __name__ == "__main__":
    keep_memory("training.refine")
    main()

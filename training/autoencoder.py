"""Trains encoder and decoder on everything that will be drawn, a little off its place too.

Loss: L1 + 2 MSE + 0.5 L1 of finite differences. Noise of a level that the decoder is not told is added to the latent, so that it learns to clean small errors.
"""
import random

import numpy as np
import torch
import torch.nn.functional as F

from . import scenes
from .network import Decoder, Encoder
from .optimise import Average, Clock, Muon, half_precision, rate


def pictures(rng, count):
    """(count, 3, 96, 96) in [-1, 1]: scenes, some shifted, so that the decoder also sees free positions."""
    out = []
    for _ in range(count):
        image = scenes.draw(scenes.sample(rng), rng)
        if rng.random() < .3:
            image = np.roll(image, (rng.randint(-12, 12), rng.randint(-12, 12)), (0, 1))
        out.append(image)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 127.5 - 1


ENCODER_ALONE = .2


def train(folder, seconds, log, warm=None):
    """Writes folder/autoencoder.pt; one that had less time than `seconds` is trained for the rest. `warm`: an exported pipeline to start from.

    An export holds no encoder: one is fitted to the frozen decoder during the first ENCODER_ALONE of the time, so that latents stay near those the hand knows.
    """
    path = folder / "autoencoder.pt"
    saved = torch.load(path) if path.exists() else {}
    spent, step = saved.get("spent", 0.0), saved.get("step", 0)
    if spent >= seconds:
        return
    torch.manual_seed(1 + step)
    rng = random.Random(1 + step)
    encoder, decoder = Encoder(), Decoder()
    if saved:
        encoder.load_state_dict(saved["encoder"]), decoder.load_state_dict(saved["decoder"])
        warm = None
    if warm:
        decoder.load_state_dict(warm["dec"])
    strength = .5 if warm or saved else 1.0
    both = torch.nn.ModuleList([encoder, decoder])
    matrix = [p for n, p in both.named_parameters() if p.dim() == 4 and ".b" in n and p.shape[0] == p.shape[1]]
    rest = [p for p in both.parameters() if not any(p is m for m in matrix)]
    muon, adam = Muon(matrix, .02), torch.optim.AdamW(rest, lr=3e-3, betas=(.9, .98), weight_decay=0)
    average, clock, first = Average(both, .99), Clock(seconds - spent), step
    both.to(memory_format=torch.channels_last)
    while clock.progress < 1:
        factor = rate(clock.progress, .25) * min(1, (step - first + 1) / 20) * strength
        if warm:
            decoder.requires_grad_(clock.progress > ENCODER_ALONE)
        for group in adam.param_groups:
            group["lr"] = 3e-3 * factor
        x = pictures(rng, 24).contiguous(memory_format=torch.channels_last)
        with half_precision():
            z = encoder(x).float()
            y = decoder(z + torch.randn_like(z) * torch.rand(len(z), 1, 1, 1) * .6).float()
        d = y - x
        edges = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
        loss = d.abs().mean() + 2 * d.square().mean() + .5 * edges
        both.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        muon.step(factor), adam.step(), average.update(step - first)
        step += 1
        if step % 50 == 0:
            log(f"autoencoder {clock.spent:.0f}s step {step} loss {loss.item():.4f} psnr {-10 * d.square().mean().div(4).log10().item():.1f} dB")
    both.load_state_dict(average.weights)
    with torch.no_grad():
        x = pictures(random.Random(99), 64)
        mse = F.mse_loss(decoder(encoder(x)).clamp(-1, 1), x) / 4
    psnr = -10 * mse.log10().item()
    log(f"autoencoder done: {step} steps, psnr {psnr:.1f} dB")
    torch.save({"encoder": encoder.state_dict(), "decoder": decoder.state_dict(), "psnr": psnr, "spent": seconds, "step": step}, path)

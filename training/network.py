"""The networks of the pipeline: autoencoder, connector, hand. The Rust forward is checked against these modules.

Shapes: B batch, C latent channels (16), latent grid 12 x 12, 2 x 2 patches = 36 tokens of 4 C = 64.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

LATENT, GRID, PATCHES = 16, 12, 36
DEFAULT = {"states": 576, "queries": 16, "width": 256, "heads": 4, "connector_layers": 2, "hand_layers": 8, "max_tokens": 48}


class RMS(nn.Module):
    """Root-mean-square norm over the last axis with a gain."""

    def __init__(self, d):
        super().__init__()
        self.w = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.w.to(x.dtype), 1e-6)


class Attn(nn.Module):
    """Self attention with q/k norm. x (B, T, d), bias (B, 1, 1, T) added to the logits or None."""

    def __init__(self, d, h):
        super().__init__()
        self.h = h
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.qn, self.kn = RMS(d // h), RMS(d // h)

    def forward(self, x, bias=None):
        b, t, d = x.shape
        f = lambda y: y.view(b, t, self.h, -1).transpose(1, 2)
        a = F.scaled_dot_product_attention(self.qn(f(self.q(x))), self.kn(f(self.k(x))), f(self.v(x)), attn_mask=bias)
        return self.o(a.transpose(1, 2).reshape(b, t, d))


class MLP(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.a, self.b = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        return self.b(F.gelu(self.a(x), approximate="tanh"))


class Connector(nn.Module):
    """Token states h (B, T, states) and mask (B, T; 1 = present) -> control tokens (B, queries, width)."""

    def __init__(self, c):
        super().__init__()
        d = c["width"]
        self.n0, self.inp = RMS(c["states"]), nn.Linear(c["states"], d)
        self.q, self.pos = nn.Parameter(torch.randn(c["queries"], d) * .5), nn.Parameter(torch.zeros(c["max_tokens"], d))
        self.b = nn.ModuleList([nn.ModuleList([RMS(d), Attn(d, c["heads"]), RMS(d), MLP(d)]) for _ in range(c["connector_layers"])])
        self.on = RMS(d)

    def forward(self, h, mask=None):
        n = len(self.q)
        x = torch.cat([self.q.expand(len(h), -1, -1), self.inp(self.n0(h)) + self.pos[: h.shape[1]]], 1)
        bias = None
        if mask is not None:
            bias = F.pad((1 - mask.float()) * -1e9, (n, 0))[:, None, None]
        for n1, attn, n2, mlp in self.b:
            x = x + attn(n1(x), bias)
            x = x + mlp(n2(x))
        return self.on(x[:, :n])


class Gate(nn.Module):
    """Token states h (B, T, states) and mask (B, T; 1 = present) -> (B): above 0 where the words are none that the plain connector knows. The largest of the tokens' numbers."""

    def __init__(self, c, width=32):
        super().__init__()
        self.n, self.a, self.b = RMS(c["states"]), nn.Linear(c["states"], width), nn.Linear(width, 1)

    def forward(self, h, mask):
        score = self.b(F.gelu(self.a(self.n(h)), approximate="tanh"))[..., 0]
        return score.masked_fill(~mask, -1e9).amax(1)


class Routed(nn.Module):
    """Two connectors: `words` for prompts that the gate finds to be in words that `plain` does not know. Shapes as of Connector."""

    def __init__(self, c):
        super().__init__()
        self.plain, self.words, self.gate = Connector(c), Connector(c), Gate(c)

    def forward(self, h, mask=None):
        mask = torch.ones(h.shape[:2], dtype=torch.bool) if mask is None else mask
        other = self.gate(h, mask) > 0
        return torch.where(other[:, None, None], self.words(h, mask), self.plain(h, mask))


def patch(x):
    """(B, C, 12, 12) -> (B, 36, 4C)"""
    b, c = x.shape[:2]
    return x.reshape(b, c, 6, 2, 6, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, PATCHES, c * 4)


def unpatch(x):
    """(B, 36, 4C) -> (B, C, 12, 12)"""
    b, c = len(x), x.shape[-1] // 4
    return x.reshape(b, 6, 6, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, GRID, GRID)


class Hand(nn.Module):
    """Noisy latent z (B, 36, 64), time t (B) in [0, 1] (1 = clean), control c (B, queries, width) -> predicted clean latent (B, 36, 64)."""

    def __init__(self, c):
        super().__init__()
        d, n, q = c["width"], c["hand_layers"], c["queries"]
        self.queries, self.width = q, d
        self.e2, self.pos = nn.Linear(4 * LATENT, d), nn.Parameter(torch.randn(PATCHES, d) * .1)
        self.cin, self.cpos, self.null = nn.Linear(d, d), nn.Parameter(torch.zeros(q, d)), nn.Parameter(torch.zeros(q, d))
        self.t1, self.t2, self.pc = nn.Linear(128, d), nn.Linear(d, d), nn.Linear(d, d)
        self.ada, self.tab = nn.Linear(d, 6 * d), nn.Parameter(torch.zeros(n, 6 * d))
        self.b = nn.ModuleList([nn.ModuleList([Attn(d, c["heads"]), MLP(d)]) for _ in range(n)])
        self.fada, self.out, self.o2 = nn.Linear(d, 2 * d), nn.Linear(d, 4 * LATENT), nn.Linear(d, 4 * 32)
        self.c1, self.c2 = nn.Conv2d(32 + LATENT, 48, 3, padding=1), nn.Conv2d(48, LATENT, 3, padding=1)
        for layer in (self.ada, self.fada, self.out, self.c2):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def forward(self, z, t, c):
        norm = lambda y: F.rms_norm(y, (self.width,), None, 1e-6)
        freq = torch.exp(torch.arange(64) / 64 * -math.log(1000.0))
        angle = t[:, None] * freq * 20
        e = F.silu(self.t2(F.silu(self.t1(torch.cat([angle.sin(), angle.cos()], -1)))) + self.pc(c.mean(1)))
        m = self.ada(e)
        x = torch.cat([self.cin(c) + self.cpos, self.e2(z) + self.pos], 1)
        for (attn, mlp), table in zip(self.b, self.tab):
            sa, ba, ga, sm, bm, gm = (m + table)[:, None].chunk(6, -1)
            x = x + (1 + ga) * attn(norm(x) * (1 + sa) + ba) * 0.5
            x = x + (1 + gm) * mlp(norm(x) * (1 + sm) + bm) * 0.5
        scale, shift = self.fada(e)[:, None].chunk(2, -1)
        y = norm(x[:, self.queries:]) * (1 + scale) + shift
        tail = self.c2(F.silu(self.c1(torch.cat([unpatch(self.o2(y)), unpatch(z)], 1))))
        return self.out(y) + patch(tail)


class ChannelRMS(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.w = nn.Parameter(torch.ones(c))

    def forward(self, x):
        return F.rms_norm(x.permute(0, 2, 3, 1), (x.shape[1],), self.w, 1e-5).permute(0, 3, 1, 2)


class Res(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n, self.a, self.b = ChannelRMS(c), nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return x + self.b(F.silu(self.a(self.n(x))))


class Encoder(nn.Module):
    """Picture (B, 3, 96, 96) in [-1, 1] -> latent (B, 16, 12, 12), unit RMS per cell. Needed for training only."""

    def __init__(self):
        super().__init__()
        self.i, self.d1 = nn.Conv2d(12, 48, 3, padding=1), nn.Conv2d(192, 96, 1)
        self.d2, self.b = nn.Conv2d(384, 128, 1), nn.Sequential(Res(128), Res(128))
        self.n, self.o = ChannelRMS(128), nn.Conv2d(128, LATENT, 1)

    def forward(self, x):
        x = F.silu(self.i(F.pixel_unshuffle(x, 2)))
        x = F.silu(self.d1(F.pixel_unshuffle(x, 2)))
        x = self.o(self.n(self.b(self.d2(F.pixel_unshuffle(x, 2)))))
        return F.rms_norm(x.permute(0, 2, 3, 1), (LATENT,), None, 1e-5).permute(0, 3, 1, 2)


class Decoder(nn.Module):
    """Latent (B, 16, 12, 12) -> picture (B, 3, 96, 96) in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.i, self.b1 = nn.Conv2d(LATENT, 128, 3, padding=1), nn.Sequential(Res(128), Res(128), Res(128))
        self.u1, self.b2, self.n = nn.Conv2d(128, 256, 1), nn.Sequential(Res(64), Res(64)), ChannelRMS(64)
        self.u2, self.b3 = nn.Conv2d(64, 128, 1), nn.Sequential(Res(32))
        self.u3, self.o = nn.Conv2d(32, 48, 1), nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, z):
        x = self.b2(F.pixel_shuffle(self.u1(self.b1(self.i(z))), 2))
        x = self.b3(F.pixel_shuffle(self.u2(self.n(x)), 2))
        return self.o(F.silu(F.pixel_shuffle(self.u3(x), 2)))


@torch.no_grad()
def sample(hand, control, seed, steps=12, guidance=2.5, shift=6.0, sampler="euler"):
    """Control (1, queries, width) -> latent (1, 36, 64): from noise (t = 0) to the picture (t = 1); the last step takes the prediction."""
    z = torch.randn(1, PATCHES, 4 * LATENT, generator=torch.Generator().manual_seed(seed))
    t = torch.linspace(0, 1, steps + 1)
    t = t / (t + shift * (1 - t))
    both = torch.cat([control, hand.null[None]])

    def velocity(z, t):
        cond, uncond = hand(torch.cat([z, z]), t.expand(2), both).chunk(2)
        x = uncond + guidance * (cond - uncond)
        return x, (x - z) / max(1 - float(t), 0.02)

    for i in range(steps):
        x, v = velocity(z, t[i])
        if i == steps - 1:
            z = x
        elif sampler == "heun":
            h = t[i + 1] - t[i]
            _, w = velocity(z + h * v, t[i + 1])
            z = z + h * (v + w) / 2
        else:
            z = z + (t[i + 1] - t[i]) * v
    return z

"""Muon for matrices, AdamW for the rest, a learning rate planned by the clock, and an average of weights."""
import time

import torch


class Muon:
    """Momentum, orthogonalised by Newton-Schulz iterations. For 2-d weights inside blocks, and convolutions as (out, rest).

    Matrices of equal shape are orthogonalised together and in bfloat16: one by one in f32 that took a third of a step.
    """

    def __init__(self, parameters, lr, momentum=.95):
        self.parameters, self.lr, self.momentum = list(parameters), lr, momentum
        self.buffers = [torch.zeros(len(p), p[0].numel()) for p in self.parameters]

    @torch.no_grad()
    def step(self, factor):
        groups = {}
        for p, m in zip(self.parameters, self.buffers):
            if p.grad is None:
                continue
            g = p.grad.reshape(len(p), -1)
            m.lerp_(g, 1 - self.momentum)
            u = g.lerp(m, self.momentum)
            groups.setdefault(tuple(sorted(u.shape)), []).append((p, u))
        for members in groups.values():
            tall = [u.shape[0] > u.shape[1] for _, u in members]
            u = torch.stack([u.T if t else u for (_, u), t in zip(members, tall)])
            u = (u / (u.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
            for _ in range(5):
                a = u @ u.mT
                u = 3.4445 * u + (-4.7750 * a + 2.0315 * a @ a) @ u
            for (p, _), t, u in zip(members, tall, u.float()):
                u = u.T if t else u
                p.add_(u.reshape(p.shape), alpha=-self.lr * factor * max(1, u.shape[0] / u.shape[1]) ** .5)


class Average:
    """An exponential moving average of a module's weights."""

    def __init__(self, module, decay):
        self.module, self.decay = module, decay
        self.weights = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (step + 1) / (step + 10))
        for k, v in self.module.state_dict().items():
            self.weights[k].lerp_(v, 1 - decay)


class Clock:
    """Progress through a budget of seconds, time before a restart included."""

    def __init__(self, seconds, spent=0.0):
        self.seconds, self.start = seconds, time.monotonic() - spent

    @property
    def spent(self):
        return time.monotonic() - self.start

    @property
    def progress(self):
        return min(self.spent / self.seconds, 1.0)


def rate(progress, constant):
    """1 up to `constant`, then linearly to 0."""
    return 1.0 if progress < constant else max(0.0, (1 - progress) / (1 - constant))


def half_precision():
    """Matrix products in bfloat16 where the processor has them: 1.6 to 3.5 times as fast, and the weights stay in f32. Elsewhere they would take 7 times as long."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported())

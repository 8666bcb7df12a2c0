"""Makes the golden files beside it from the training code's modules, with random weights.

python worker-hand/tests/pictogram/reference.py
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))
from training.network import Decoder, Hand, sample  # noqa: E402

CONFIG = {"queries": 3, "width": 16, "heads": 2, "hand_layers": 2}


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def main():
    hand = Hand(CONFIG).eval()
    for i, p in enumerate(hand.parameters()):
        p.copy_(randn(100 + i, *p.shape) * (.15 if p.dim() > 1 else .5))
    z, t, control = randn(1, 3, 36, 64), torch.tensor([0.0, .37, .99]), randn(2, 3, 3, 16)
    golden = {f"hand.{k}": v.clone() for k, v in hand.state_dict().items()}
    golden |= {"golden.z": z, "golden.t": t, "golden.control": control, "golden.forward": hand(z, t, control)}
    for sampler in ("euler", "heun"):
        for steps, guidance in ((1, 2.5), (5, 2.5), (4, 1.0)):
            golden[f"golden.{sampler}.{steps}.{guidance}"] = sample(hand, control[:1], 7, steps, guidance, 6.0, sampler)
    save_file({k: v.contiguous() for k, v in golden.items()}, HERE / "hand.safetensors")

    # The decoder's sizes are fixed and its weights would be 4 MB: the test draws them from the same seeds.
    decoder = Decoder().eval()
    for i, (name, p) in enumerate(sorted(decoder.named_parameters())):
        p.copy_(weight(i, p.shape))
    latent = randn(3, 2, 16, 12, 12)
    mean, std = randn(4, 16), randn(5, 16).abs() + .5
    picture = decoder(latent * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1))
    golden = {"latent": latent, "mean": mean, "std": std, "picture": picture[:, :, ::4, ::3].contiguous()}
    names = sorted(decoder.state_dict())
    save_file(golden, HERE / "decoder.safetensors")
    shapes = "".join(f"{n} {' '.join(map(str, decoder.state_dict()[n].shape))}\n" for n in names)
    (HERE / "decoder.txt").write_text(shapes)


def weight(index, shape):
    scale = (1.5 / shape[1:].numel()) ** .5 if len(shape) > 1 else .3
    return randn(1000 + index, shape.numel()).view(shape) * scale


if __name__ == "__main__":
    main()

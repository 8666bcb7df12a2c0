"""Makes the folders beside it: what Z-Image's denoisers of tests/checkpoints, tiny and random, give in diffusers 0.42.1. Their weights stay there: the time's embedder
alone is a megabyte, however tiny the rest. To be run after `tests/checkpoints/z_image.py`.

python worker-hand/tests/z_image/reference.py
"""
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file

HERE = Path(__file__).parent
CHECKPOINTS = HERE.parents[2] / "tests/checkpoints"
MULTIPLE = 32
# name -> (height, width, text tokens of each sample): texts that are filled up to as many tokens, for those that are not are never in one batch here.
MODELS = {
    "z-image": (10, 6, (5, 32, 17)),
    # As many patches as need no filling.
    "z-image-turbo": (8, 16, (1, 31, 2)),
    "z-image-odd": (14, 10, (33, 64, 40)),
}


@torch.no_grad()
def main():
    for number, (name, (height, width, lengths)) in enumerate(MODELS.items()):
        torch.manual_seed(80 + number)
        load = lambda dtype: ZImageTransformer2DModel.from_pretrained(CHECKPOINTS / name / "transformer", torch_dtype=dtype).eval()
        model, exact, off = load(torch.float), load(torch.double), 0.
        tokens = -(-max(lengths) // MULTIPLE) * MULTIPLE
        # States beyond a text's are of no account.
        golden = {"x": torch.randn(3, model.config.in_channels, height, width), "context": torch.randn(3, tokens, model.config.cap_feat_dim),
                  "present": (torch.arange(tokens) < torch.tensor(lengths)[:, None]).float()}
        for label, time in (("start", [0.] * 3), ("middle", [.5] * 3), ("end", [.999] * 3), ("mixed", [.019, .667, .98])):
            golden[f"{label}.time"] = time = torch.tensor(time)

            def run(model, dtype):
                texts = [states[:length].to(dtype) for states, length in zip(golden["context"], lengths)]
                return torch.stack(model([x.to(dtype).unsqueeze(1) for x in golden["x"]], time, texts).sample).squeeze(2)

            golden[f"{label}.out"] = run(model, torch.float)
            # How far f32 is off: what a tolerance has to allow for.
            off = max(off, (run(exact, torch.double) - golden[f"{label}.out"]).abs().max().item())
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors")
        (folder / "golden.safetensors").chmod(0o644)
        print(name, {k: round(v.abs().max().item(), 2) for k, v in golden.items() if k.endswith("out")}, f"f32 off by {off:.1e}")


if __name__ == "__main__":
    main()

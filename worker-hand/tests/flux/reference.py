"""Makes the folders beside it: tiny random FLUX denoisers of diffusers 0.42.1 as it saves them, and what they give.

python worker-hand/tests/flux/reference.py
"""
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

# name -> (configuration, rows, columns, text tokens)
MODELS = {
    "dev": ({"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10,
             "guidance_embeds": True, "axes_dims_rope": (2, 2, 4)}, 3, 5, 4),
    "schnell": ({"in_channels": 8, "num_layers": 1, "num_single_layers": 3, "attention_head_dim": 12, "num_attention_heads": 1, "joint_attention_dim": 6, "pooled_projection_dim": 4,
                 "guidance_embeds": False, "axes_dims_rope": (4, 4, 4)}, 4, 2, 7),
    "odd": ({"in_channels": 4, "num_layers": 1, "num_single_layers": 0, "attention_head_dim": 6, "num_attention_heads": 3, "joint_attention_dim": 5, "pooled_projection_dim": 3,
             "guidance_embeds": True, "axes_dims_rope": (2, 2, 2)}, 1, 3, 1),
}


@torch.no_grad()
def main():
    for number, (name, (config, rows, columns, tokens)) in enumerate(MODELS.items()):
        torch.manual_seed(40 + number)
        model = FluxTransformer2DModel(**config).eval()
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * .1 + 1 if p.dim() == 1 and p.mean() > .5 else torch.randn_like(p) / max(p[0].numel(), 4) ** .5)
        golden = {"x": torch.randn(3, rows * columns, config["in_channels"]), "context": torch.randn(3, tokens, config["joint_attention_dim"]),
                  "pooled": torch.randn(3, config["pooled_projection_dim"]), "places": torch.tensor([rows, columns, 0.])}
        places = torch.stack([torch.zeros(rows * columns), torch.arange(rows).repeat_interleave(columns).float(), torch.arange(columns).repeat(rows).float()], 1)
        if config["guidance_embeds"]:
            golden["guidance"] = torch.tensor([3.5, 1.0, 7.25])
        for label, times in (("start", [1000.] * 3), ("middle", [500.5] * 3), ("end", [1.] * 3), ("mixed", [981., 333., 20.])):
            golden[f"{label}.time"] = torch.tensor(times)
            golden[f"{label}.out"] = model(golden["x"], golden["context"], golden["pooled"], torch.tensor(times) / 1000, places, torch.zeros(tokens, 3), golden.get("guidance")).sample
        folder = Path(__file__).parent / name
        model.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors")
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        print(name, sum(p.numel() for p in model.parameters()), {k: round(v.abs().max().item(), 2) for k, v in golden.items() if k.endswith("out")})


if __name__ == "__main__":
    main()

"""Makes the folders beside it: tiny random denoisers of Stable Diffusion 3, diffusers 0.42.1, as it saves them, and what they give.

python worker-hand/tests/sd3/reference.py
"""
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file

# name -> (configuration, height, width, text tokens)
MODELS = {
    "medium": ({"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12,
                "caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 6}, 6, 10, 5),
    "dual": ({"sample_size": 6, "patch_size": 2, "in_channels": 3, "out_channels": 3, "num_layers": 3, "attention_head_dim": 4, "num_attention_heads": 3, "joint_attention_dim": 7,
              "caption_projection_dim": 12, "pooled_projection_dim": 4, "pos_embed_max_size": 7, "dual_attention_layers": (0, 2), "qk_norm": "rms_norm"}, 8, 2, 3),
    "odd": ({"sample_size": 3, "patch_size": 1, "in_channels": 2, "out_channels": 2, "num_layers": 1, "attention_head_dim": 20, "num_attention_heads": 1, "joint_attention_dim": 5,
             "caption_projection_dim": 20, "pooled_projection_dim": 3, "pos_embed_max_size": 5, "qk_norm": "rms_norm"}, 3, 5, 1),
}


@torch.no_grad()
def main():
    for number, (name, (config, height, width, tokens)) in enumerate(MODELS.items()):
        torch.manual_seed(70 + number)
        model = SD3Transformer2DModel(**config).eval()
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * .1 + 1 if p.dim() == 1 and p.mean() > .5 else torch.randn_like(p) / max(p[0].numel(), 4) ** .5)
        golden = {"x": torch.randn(3, config["in_channels"], height, width), "context": torch.randn(3, tokens, config["joint_attention_dim"]),
                  "pooled": torch.randn(3, config["pooled_projection_dim"])}
        for label, times in (("start", [1000.] * 3), ("middle", [500.5] * 3), ("end", [1.] * 3), ("mixed", [981., 333., 20.])):
            golden[f"{label}.time"] = torch.tensor(times)
            golden[f"{label}.out"] = model(golden["x"], golden["context"], golden["pooled"], torch.tensor(times)).sample
        folder = Path(__file__).parent / name
        model.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors")
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        print(name, sum(p.numel() for p in model.parameters()), {k: round(v.abs().max().item(), 2) for k, v in golden.items() if k.endswith("out")})


if __name__ == "__main__":
    main()

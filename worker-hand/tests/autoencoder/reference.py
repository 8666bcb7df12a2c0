"""Makes the folders beside it: tiny random autoencoders of diffusers 0.42.1 as it saves them, and what they give.

python worker-hand/tests/autoencoder/reference.py
"""
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

COMMON = {"norm_num_groups": 4, "layers_per_block": 1}
MODELS = {
    # (configuration, height and width of the picture)
    "sd": ({**COMMON, "block_out_channels": (8, 16), "latent_channels": 4, "layers_per_block": 2, "scaling_factor": .18215,
            "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}, 12, 8),
    # 16 channels, shifted, no convolutions around the latent, an odd map in the middle: FLUX.1 and Stable Diffusion 3.
    "flux": ({**COMMON, "block_out_channels": (4, 8, 8), "latent_channels": 16, "scaling_factor": .3611, "shift_factor": .1159, "use_quant_conv": False,
              "use_post_quant_conv": False, "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}, 12, 20),
    # One level, no attention in the middle.
    "plain": ({**COMMON, "norm_num_groups": 2, "block_out_channels": (6,), "latent_channels": 2, "mid_block_add_attention": False, "act_fn": "gelu",
               "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}, 5, 3),
}


@torch.no_grad()
def main():
    for number, (name, (config, height, width)) in enumerate(MODELS.items()):
        torch.manual_seed(40 + number)
        model = AutoencoderKL(sample_size=16, **config).eval()
        for p in model.parameters():
            # Norms off 1, and biases that show.
            p.copy_(torch.randn_like(p) * .1 + 1 if p.dim() == 1 and p.mean() > .5 else torch.randn_like(p) / max(p[0].numel(), 4) ** .5)
        x = torch.rand(3, 3, height, width) * 2 - 1
        likely = model.encode(x).latent_dist
        latent = torch.randn_like(likely.mean)
        golden = {"x": x, "mean": likely.mean, "logvar": likely.logvar, "latent": latent, "picture": model.decode(latent).sample}
        # Latents of more than a tile along one side, and along both.
        model.enable_tiling()
        side = 16 // 2 ** (len(config["block_out_channels"]) - 1)
        for key, (rows, columns) in {"wide": (side, 2 * side + 1), "large": (2 * side - 1, side + 3)}.items():
            golden[f"{key}.latent"] = torch.randn(1, config["latent_channels"], rows, columns)
            picture = golden[f"{key}.picture"] = model.decode(golden[f"{key}.latent"]).sample
            # And back from that picture.
            likely = model.encode(picture).latent_dist
            golden |= {f"{key}.mean": likely.mean, f"{key}.logvar": likely.logvar}
        model.disable_tiling()
        folder = Path(__file__).parent / name
        model.save_pretrained(folder)
        if name == "sd":
            # As it was published: attention under its old names.
            path = folder / "diffusion_pytorch_model.safetensors"
            old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
            renamed = {}
            for key, value in load_file(path).items():
                for new, before in old.items():
                    key = key.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
                renamed[key] = value
            save_file(renamed, path)
        save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors")
        print(name, sum(p.numel() for p in model.parameters()), {k: round(v.abs().max().item(), 2) for k, v in golden.items()})


if __name__ == "__main__":
    main()

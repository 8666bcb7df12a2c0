"""Makes the folders beside it: tiny random autoencoders of diffusers 0.42.1 (`AutoencoderDC`) as it saves them, and what they give.

python worker-hand/tests/dc_autoencoder/reference.py
"""
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from safetensors.torch import save_file

PLAIN, ATTENTION = "ResBlock", "EfficientViTBlock"
MODELS = {
    # (what both halves have, the rest, height and width of the picture)
    # As Sana's: attention with one wider kernel in the small maps.
    "sana": ({"block_types": (PLAIN, ATTENTION, ATTENTION), "block_out_channels": (8, 8, 16), "layers_per_block": (1, 1, 2), "qkv_multiscales": ((), (5,), (5,))},
             {"downsample_block_type": "conv", "upsample_block_type": "interpolate", "scaling_factor": .41407}, 12, 20),
    # Maps cut up and put together, two wider kernels, channels that are not of whole heads.
    "shuffled": ({"block_types": (PLAIN, ATTENTION), "block_out_channels": (8, 16), "layers_per_block": (2, 1), "qkv_multiscales": ((), (3, 5))},
                 {"attention_head_dim": 3, "downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle", "decoder_act_fns": ("silu", "gelu"), "decoder_norm_types": ("rms_norm", "rms_norm")}, 10, 6),
    # A first level without blocks, no way around the ends, one kind for all levels.
    "passed": ({"block_types": PLAIN, "block_out_channels": (4, 8, 8), "layers_per_block": (0, 1, 1), "qkv_multiscales": ((), (), ())},
               {"downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle", "encoder_out_shortcut": False, "decoder_in_shortcut": False, "decoder_conv_act_fn": "silu"}, 8, 12),
}


@torch.no_grad()
def main():
    for number, (name, (both, rest, height, width)) in enumerate(MODELS.items()):
        torch.manual_seed(50 + number)
        model = AutoencoderDC(**{"latent_channels": 4, "attention_head_dim": 4, **{f"{half}_{k}": v for half in ("encoder", "decoder") for k, v in both.items()}, **rest}).eval()
        for p in model.parameters():
            # Norms off 1, and biases that show.
            p.copy_(torch.randn_like(p) * .1 + 1 if p.dim() == 1 and p.mean() > .5 else torch.randn_like(p) / max(p[0].numel(), 4) ** .5)
        x = torch.rand(3, 3, height, width) * 2 - 1
        encoded = model.encode(x).latent
        latent = torch.randn_like(encoded)
        golden = {"x": x, "encoded": encoded, "latent": latent, "picture": model.decode(latent).sample}
        # A latent of more than a tile along both sides.
        model.enable_tiling(16, 16, 12, 12)
        side = 16 // model.spatial_compression_ratio
        golden["large.latent"] = torch.randn(1, 4, 2 * side - 1, side + 1)
        golden["large.picture"] = model.decode(golden["large.latent"]).sample
        # And back from that picture.
        golden["large.encoded"] = model.encode(golden["large.picture"]).latent
        folder = Path(__file__).parent / name
        model.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors")
        print(name, sum(p.numel() for p in model.parameters()), {k: round(v.abs().max().item(), 2) for k, v in golden.items()})


if __name__ == "__main__":
    main()

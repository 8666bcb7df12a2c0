"""Makes the folders beside it: tiny random denoisers of diffusers 0.42.1 as it saves them, and what they give.

python worker-hand/tests/unet/reference.py [NAME ...]
"""
import sys
from pathlib import Path

import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from safetensors.torch import save_file

COMMON = {"in_channels": 4, "out_channels": 4, "norm_num_groups": 4, "cross_attention_dim": 12, "layers_per_block": 1}
MODELS = {
    # Stable Diffusion 1.5 in small: heads in number, convolutions around attentions; an odd map. (configuration, height, width, tokens)
    "sd15": ({**COMMON, "block_out_channels": (8, 16, 16), "attention_head_dim": 2, "layers_per_block": 2,
              "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
              "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}, 7, 10, 5),
    # Stable Diffusion 2.1: heads told level by level, linear maps around attentions.
    "sd21": ({**COMMON, "block_out_channels": (8, 24), "attention_head_dim": (2, 3), "use_linear_projection": True,
              "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}, 8, 4, 7),
    # XL: no attention at first, several blocks in one, a pooled text and sizes beside the time.
    "sdxl": ({**COMMON, "block_out_channels": (8, 16, 16), "attention_head_dim": (1, 2, 4), "transformer_layers_per_block": (1, 2, 3), "use_linear_projection": True,
              "addition_embed_type": "text_time", "addition_time_embed_dim": 6, "projection_class_embeddings_input_dim": 10 + 6 * 6,
              "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}, 8, 8, 3),
    # Other numbers in every place that has any.
    "odd": ({**COMMON, "in_channels": 9, "out_channels": 3, "block_out_channels": (12, 6), "norm_num_groups": 3, "norm_eps": 1e-6, "attention_head_dim": 3,
             "flip_sin_to_cos": False, "freq_shift": 1, "act_fn": "gelu",
             "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}, 5, 3, 4),
    # LCM: told the strength of guidance.
    "lcm": ({**COMMON, "block_out_channels": (8, 16), "attention_head_dim": 2, "time_cond_proj_dim": 12,
             "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}, 8, 6, 5),
}


@torch.no_grad()
def main():
    for number, (name, (config, height, width, tokens)) in enumerate(MODELS.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        torch.manual_seed(20 + number)
        model = UNet2DConditionModel(sample_size=8, **config).eval()
        for p in model.parameters():
            # Norms off 1, and biases that show.
            p.copy_(torch.randn_like(p) * .1 + 1 if p.dim() == 1 and p.mean() > .5 else torch.randn_like(p) / max(p[0].numel(), 4) ** .5)
        x = torch.randn(3, config["in_channels"], height, width)
        context = torch.randn(3, tokens, 12)
        golden = {"x": x, "context": context}
        added = {}
        if "addition_embed_type" in config:
            golden["pooled"], golden["sizes"] = torch.randn(3, 10), torch.tensor([[64., 48, 0, 8, 64, 64]] * 3) * torch.tensor([[1.], [2], [.5]])
            added = {"added_cond_kwargs": {"text_embeds": golden["pooled"], "time_ids": golden["sizes"]}}
        if "time_cond_proj_dim" in config:
            golden["guidance"] = torch.tensor([8.5, 1., 4.25])
            embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
            added = {"timestep_cond": embed(None, golden["guidance"] - 1, embedding_dim=config["time_cond_proj_dim"])}
        for label, times in (("start", [999.] * 3), ("middle", [500.5] * 3), ("end", [1.] * 3), ("mixed", [981., 333., 20.])):
            golden[f"{label}.time"] = torch.tensor(times)
            golden[f"{label}.out"] = model(x, torch.tensor(times), context, **added).sample
        folder = Path(__file__).parent / name
        model.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors")
        print(name, sum(p.numel() for p in model.parameters()), {k: round(v.abs().max().item(), 2) for k, v in golden.items()})


if __name__ == "__main__":
    main()

"""Makes the folders beside it: tiny random Sana denoisers of diffusers 0.42.1 as it saves them, and what they give.

python worker-hand/tests/sana/reference.py
"""
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import save_file

NORM = {"qk_norm": "rms_norm_across_heads"}
# name -> (configuration, height, width, text tokens of each sample)
MODELS = {
    # Sana in small.
    "plain": ({"in_channels": 4, "out_channels": 4, "num_attention_heads": 3, "attention_head_dim": 4, "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 6, "caption_channels": 10,
               "sample_size": 8}, 5, 7, (4, 6, 1)),
    # Other numbers in every place that has any; told places, biases, larger patches.
    "odd": ({**NORM, "in_channels": 5, "out_channels": 3, "num_attention_heads": 2, "attention_head_dim": 6, "num_layers": 1, "num_cross_attention_heads": 1, "cross_attention_head_dim": 8, "caption_channels": 7,
             "mlp_ratio": 1.6, "attention_bias": True, "sample_size": 12, "patch_size": 2, "norm_eps": 1e-5, "interpolation_scale": 1.5, "timestep_scale": .5}, 6, 10, (2, 3, 3)),
    # Sprint: told the strength of guidance.
    "sprint": ({**NORM, "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 5, "caption_channels": 12,
                "sample_size": 8, "guidance_embeds": True, "guidance_embeds_scale": .2}, 4, 3, (5, 1, 4)),
}


@torch.no_grad()
def main():
    for number, (name, (config, height, width, lengths)) in enumerate(MODELS.items()):
        torch.manual_seed(90 + number)
        model = SanaTransformer2DModel(cross_attention_dim=config["num_attention_heads"] * config["attention_head_dim"], **config).eval()
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * .1 + 1 if p.dim() == 1 and p.mean() > .5 else torch.randn_like(p) / max(p[0].numel(), 4) ** .5)
        golden = {"x": torch.randn(3, config["in_channels"], height, width), "context": torch.randn(3, max(lengths), config["caption_channels"]),
                  "present": (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float()}
        # Pipelines multiply these before they ask the model.
        scale, guided = model.config.timestep_scale, {}
        times = (("start", [1000.] * 3), ("middle", [500.5] * 3), ("end", [1.] * 3), ("mixed", [981., 333., 20.]))
        if model.config.guidance_embeds:
            golden["guidance"] = torch.tensor([4.5, 1.0, 7.25])
            guided = {"guidance": golden["guidance"] * model.config.guidance_embeds_scale}
            times = (("start", [1.] * 3), ("middle", [.5625] * 3), ("end", [.0625] * 3), ("mixed", [.9375, .3333, .02]))
        # How far f32 is off: what a tolerance has to allow for.
        exact, off = SanaTransformer2DModel(**model.config).double().eval(), 0.
        exact.load_state_dict(model.state_dict())
        for label, time in times:
            golden[f"{label}.time"] = time = torch.tensor(time)
            run = lambda model, cast: model(cast(golden["x"]), cast(golden["context"]), time * scale, encoder_attention_mask=golden["present"], **guided).sample
            golden[f"{label}.out"] = run(model, torch.Tensor.float)
            off = max(off, (run(exact, torch.Tensor.double) - golden[f"{label}.out"]).abs().max().item())
        folder = Path(__file__).parent / name
        model.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors")
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        print(name, sum(p.numel() for p in model.parameters()), {k: round(v.abs().max().item(), 2) for k, v in golden.items() if k.endswith("out")}, f"f32 off by {off:.1e}")


if __name__ == "__main__":
    main()

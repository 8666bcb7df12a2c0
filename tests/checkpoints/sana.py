"""Makes sana, sana-odd and sana-sprint beside it: Sana's pipelines in small, with random weights, as diffusers saves them, and what they compute with them.

python tests/checkpoints/sana.py
"""
import inspect

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from transformers import Gemma2Config, Gemma2Model

from common import LONG, NEGATIVE, PROMPTS, WORDS, gemma_tokenizer, randomise, record, record_batch, save

INSTRUCTION = "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
SPACE = 4
# One that the autoencoder's factors go into; pictures are multiples of 32 pixels, whatever it is.
SIDE = 32


@torch.no_grad()
def joints(pipe, golden):
    sprint = isinstance(pipe, SanaSprintPipeline)
    for i, prompt in enumerate((*PROMPTS, NEGATIVE, LONG)):
        golden[f"{i}.ids.0"] = torch.tensor(pipe.tokenizer(INSTRUCTION + prompt.lower().strip()).input_ids).float()
        encoded = pipe.encode_prompt(prompt, device=torch.device("cpu"), complex_human_instruction=INSTRUCTION.split("\n"))
        states, mask = encoded[:2]
        golden[f"{i}.states"] = states[0][mask[0].bool()]
        if not sprint:
            golden[f"{i}.negative"] = encoded[2][0][encoded[3][0].bool()]


def runs(pipe, golden):
    usual, sprint = {"width": SIDE, "height": SIDE, "use_resolution_binning": False}, isinstance(pipe, SanaSprintPipeline)
    steps = lambda count: {"num_inference_steps": count, **({"intermediate_timesteps": 1.3 if count == 2 else None} if sprint else {})}
    # Sprint's latents are half as large as what is computed here, from the noise on to the end.
    unpack = {"unpack": (lambda latents: latents / pipe.scheduler.config.sigma_data)} if sprint else {}
    for i, prompt in enumerate(PROMPTS):
        record(pipe, golden, f"{i}.guided", prompt, 20 + i, **unpack, **steps(4), **usual)
    record_batch(pipe, golden, "batch", 20, **steps(4), **usual)
    if sprint:
        record(pipe, golden, "two", PROMPTS[0], 34, **unpack, **steps(2), **usual)
    else:
        record(pipe, golden, "negative", PROMPTS[0], 30, negative_prompt=NEGATIVE, guidance_scale=3.5, **steps(4), **usual)
    record(pipe, golden, "unguided", PROMPTS[1], 31, guidance_scale=1.0, **unpack, **steps(4), **usual)
    record(pipe, golden, "sized", PROMPTS[1], 32, **unpack, **steps(4), width=2 * SIDE, height=SIDE, use_resolution_binning=False)
    record(pipe, golden, "one", PROMPTS[0], 33, **unpack, **steps(1), **usual)


def main():
    plain, attention = "ResBlock", "EfficientViTBlock"
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    for number, (name, language, transformer, vae, scheduler) in enumerate((
        ("sana", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "sliding_window": 64},
         {"num_attention_heads": 4, "attention_head_dim": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "sample_size": 8},
         {"block_types": (plain, plain, attention), "block_out_channels": (8, 8, 16), "layers_per_block": (1, 2, 1), "qkv_multiscales": ((), (), (5,)), "downsample_block_type": "conv", "upsample_block_type": "interpolate"},
         DPMSolverMultistepScheduler(**flow)),
        ("sana-odd", {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 4, "sliding_window": 4096},
         {"num_attention_heads": 3, "attention_head_dim": 8, "num_cross_attention_heads": 3, "cross_attention_head_dim": 8, "sample_size": 16, "patch_size": 2, "qk_norm": "rms_norm_across_heads", "interpolation_scale": 1.5,
          "attention_bias": True, "mlp_ratio": 1.6},
         {"block_types": (plain, attention), "block_out_channels": (8, 16), "layers_per_block": (1, 1), "qkv_multiscales": ((), (3, 5)), "downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle", "decoder_conv_act_fn": "silu"},
         FlowMatchEulerDiscreteScheduler(shift=3.0)),
        ("sana-sprint", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 128},
         {"num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 10, "sample_size": 8, "qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
         {"block_types": (plain, plain, attention), "block_out_channels": (4, 8, 8), "layers_per_block": (0, 1, 2), "qkv_multiscales": ((), (), ()), "downsample_block_type": "conv", "upsample_block_type": "interpolate"},
         SCMScheduler()),
    )):
        torch.manual_seed(90 + number)
        tokenizer, vocabulary = gemma_tokenizer(INSTRUCTION + " ".join(WORDS))
        encoder = Gemma2Model(Gemma2Config(vocab_size=vocabulary + 3, hidden_size=12, intermediate_size=20, num_hidden_layers=3, query_pre_attn_scalar=7, attn_logit_softcapping=3.0, **language))
        width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
        denoiser = SanaTransformer2DModel(in_channels=SPACE, out_channels=SPACE, num_layers=2, cross_attention_dim=width, caption_channels=12, **transformer)
        both = ("block_types", "block_out_channels", "layers_per_block", "qkv_multiscales")
        levels = {f"{half}_{key}": vae[key] for half in ("encoder", "decoder") for key in both}
        autoencoder = AutoencoderDC(latent_channels=SPACE, attention_head_dim=4, scaling_factor=.41407, **levels, **{k: v for k, v in vae.items() if k not in both})
        randomise(encoder, denoiser, autoencoder)
        pipe = (SanaSprintPipeline if name == "sana-sprint" else SanaPipeline)(tokenizer, encoder, autoencoder, denoiser, scheduler)
        pipe.set_progress_bar_config(disable=True)
        golden = {}
        joints(pipe, golden), runs(pipe, golden)
        save(pipe, name, golden)


if __name__ == "__main__":
    main()

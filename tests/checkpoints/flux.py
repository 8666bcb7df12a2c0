"""Makes flux-dev, flux-schnell and flux-odd beside it: FLUX.1's pipelines in small, with random weights, as diffusers saves them, and what it computes with them.

python tests/checkpoints/flux.py
"""
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from common import LONG, NEGATIVE, PROMPTS, clip_tokenizer, randomise, record, record_batch, save, t5_tokenizer


@torch.no_grad()
def joints(pipe, golden):
    for i, prompt in enumerate((*PROMPTS, NEGATIVE, LONG)):
        for number, (tokenizer, length) in enumerate(((pipe.tokenizer, 77), (pipe.tokenizer_2, 512))):
            golden[f"{i}.ids.{number}"] = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids.float()
        states, pooled, _ = pipe.encode_prompt(prompt, None, device="cpu")
        golden[f"{i}.states"], golden[f"{i}.pooled"] = states[0], pooled[0]


def runs(pipe, golden, usual, sized):
    def drawn(key, prompt, seed, width, height, **more):
        unpack = lambda latents: pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        record(pipe, golden, key, prompt, seed, unpack, **{"num_inference_steps": 4, "width": width, "height": height, **more})

    for i, prompt in enumerate(PROMPTS):
        drawn(f"{i}.guided", prompt, 20 + i, *usual)
    record_batch(pipe, golden, "batch", 20, num_inference_steps=4, width=usual[0], height=usual[1])
    drawn("unguided", PROMPTS[1], 31, *usual, guidance_scale=1.0)
    drawn("sized", PROMPTS[1], 32, *sized)
    drawn("one", PROMPTS[0], 33, *usual, num_inference_steps=1)


def main():
    for seed, (name, guided, head, axes, heads, levels, scheduler) in enumerate((
        ("flux-dev", True, 8, (2, 4, 2), 2, (4, 8), {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": .5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}),
        ("flux-schnell", False, 12, (4, 4, 4), 1, (8, 4, 8), {"shift": 1.0, "use_dynamic_shifting": False, "base_shift": .5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}),
        # Three heads, axes of their own widths, a fixed shift beside told guidance, pictures that are no square of two.
        ("flux-odd", True, 14, (2, 8, 4), 3, (4, 4, 8), {"shift": 2.2, "use_dynamic_shifting": False, "base_shift": .5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}),
    )):
        torch.manual_seed(50 + seed)
        tokenizer, vocabulary = clip_tokenizer()
        tokenizer_2, vocabulary_2 = t5_tokenizer()
        encoder = CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, hidden_act="quick_gelu"))
        encoder_2 = T5EncoderModel(T5Config(vocab_size=vocabulary_2 + 3, d_model=8 + 4 * seed, d_kv=4, d_ff=16, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu", relative_attention_num_buckets=8,
                                            relative_attention_max_distance=20))
        transformer = FluxTransformer2DModel(in_channels=16, num_layers=1 + seed % 2, num_single_layers=2 - seed % 2, attention_head_dim=head, num_attention_heads=heads, joint_attention_dim=8 + 4 * seed,
                                             pooled_projection_dim=16, guidance_embeds=guided, axes_dims_rope=axes)
        count = len(levels)
        vae = AutoencoderKL(latent_channels=4, norm_num_groups=4, layers_per_block=1, block_out_channels=levels, down_block_types=("DownEncoderBlock2D",) * count, up_block_types=("UpDecoderBlock2D",) * count,
                            scaling_factor=.3611, shift_factor=.1159, use_quant_conv=False, use_post_quant_conv=False)
        randomise(encoder, encoder_2, transformer, vae)
        pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(**scheduler), vae, encoder, tokenizer, encoder_2, tokenizer_2, transformer)
        pipe.set_progress_bar_config(disable=True)
        cell = 2 ** (count - 1) * 2
        golden = {}
        usual = (5 * cell, 3 * cell) if name == "flux-odd" else (4 * cell, 4 * cell)
        joints(pipe, golden), runs(pipe, golden, usual, (7 * cell, cell) if name == "flux-odd" else (5 * cell, 3 * cell))
        save(pipe, name, golden, **({"max_shard_size": "30KB"} if guided else {}))


if __name__ == "__main__":
    main()

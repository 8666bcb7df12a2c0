"""Makes sd3, sd35 and sd3-without-t5 beside it: Stable Diffusion 3's pipelines in small, with random weights, as diffusers saves them, and what it computes with them.

python tests/checkpoints/stable_diffusion_3.py
"""
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from common import LONG, NEGATIVE, PROMPTS, clip_tokenizer, randomise, record, record_batch, save, t5_tokenizer

VAE = {"latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1, "scaling_factor": 1.5305, "shift_factor": .0609, "use_quant_conv": False, "use_post_quant_conv": False}


@torch.no_grad()
def joints(pipe, golden, t5):
    tokenizers = [(pipe.tokenizer, 77), (pipe.tokenizer_2, 77)] + ([(pipe.tokenizer_3, 256)] if t5 else [])
    for i, prompt in enumerate((*PROMPTS, NEGATIVE, *([LONG] if t5 else []))):
        for number, (tokenizer, length) in enumerate(tokenizers):
            golden[f"{i}.ids.{number}"] = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids.float()
        states, negative, pooled, _ = pipe.encode_prompt(prompt, None, None, device="cpu")
        golden[f"{i}.states"], golden[f"{i}.negative"], golden[f"{i}.pooled"] = states[0], negative[0], pooled[0]


def runs(pipe, golden, width, height):
    for i, prompt in enumerate(PROMPTS):
        record(pipe, golden, f"{i}.guided", prompt, 20 + i, num_inference_steps=4)
    record_batch(pipe, golden, "batch", 20, num_inference_steps=4)
    record(pipe, golden, "negative", PROMPTS[0], 30, num_inference_steps=4, negative_prompt=NEGATIVE, guidance_scale=3.5)
    record(pipe, golden, "unguided", PROMPTS[1], 31, num_inference_steps=4, guidance_scale=1.0)
    record(pipe, golden, "sized", PROMPTS[1], 32, num_inference_steps=4, width=width, height=height)
    record(pipe, golden, "one", PROMPTS[0], 33, num_inference_steps=1)


def main():
    for number, (name, t5, transformer, levels, scheduler) in enumerate((
        # 3 medium: no norms of queries and keys.
        ("sd3", True, {"sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 28, "pos_embed_max_size": 6}, (4, 8), {"shift": 3.0}),
        # 3.5 medium: the image alone in the first blocks; a shift that grows with the picture.
        ("sd35", True, {"sample_size": 6, "num_layers": 3, "attention_head_dim": 4, "num_attention_heads": 3, "joint_attention_dim": 32, "pos_embed_max_size": 5, "dual_attention_layers": (0, 1),
                        "qk_norm": "rms_norm"}, (8, 4, 8), {"shift": 3.0, "use_dynamic_shifting": True}),
        ("sd3-without-t5", False, {"sample_size": 10, "num_layers": 1, "attention_head_dim": 12, "num_attention_heads": 1, "joint_attention_dim": 30, "pos_embed_max_size": 8, "qk_norm": "rms_norm"}, (8, 12), {"shift": 1.5}),
    )):
        torch.manual_seed(60 + number)
        tokenizer, vocabulary = clip_tokenizer()
        tokenizer_2, _ = clip_tokenizer(pad_token="!")
        ends = {"eos_token_id": vocabulary - 1, "bos_token_id": vocabulary - 2}
        clip = lambda width, act, projection, **more: CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, hidden_act=act, projection_dim=projection, **more))
        encoder, encoder_2 = clip(8, "quick_gelu", 6, **ends), clip(16, "gelu", 10, **ends)
        encoder_3 = tokenizer_3 = None
        if t5:
            tokenizer_3, size = t5_tokenizer()
            encoder_3 = T5EncoderModel(T5Config(vocab_size=size, d_model=transformer["joint_attention_dim"], d_kv=4, d_ff=12, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"))
        width = transformer["attention_head_dim"] * transformer["num_attention_heads"]
        denoiser = SD3Transformer2DModel(**transformer, patch_size=2, in_channels=4, out_channels=4, caption_projection_dim=width, pooled_projection_dim=16)
        count = len(levels)
        vae = AutoencoderKL(**VAE, block_out_channels=levels, down_block_types=("DownEncoderBlock2D",) * count, up_block_types=("UpDecoderBlock2D",) * count)
        randomise(*filter(None, (encoder, encoder_2, encoder_3, denoiser, vae)))
        pipe = StableDiffusion3Pipeline(denoiser, FlowMatchEulerDiscreteScheduler(**scheduler), vae, encoder, tokenizer, encoder_2, tokenizer_2, encoder_3, tokenizer_3)
        pipe.set_progress_bar_config(disable=True)
        multiple = 2 ** (count - 1) * 2
        golden = {}
        joints(pipe, golden, t5), runs(pipe, golden, 5 * multiple, 3 * multiple)
        save(pipe, name, golden)


if __name__ == "__main__":
    main()

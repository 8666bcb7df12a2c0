"""Makes z-image, z-image-turbo and z-image-odd beside it: Z-Image's pipeline in small, with random weights, as diffusers saves it, and what it computes with them.

python tests/checkpoints/z_image.py
"""
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from common import LONG, NEGATIVE, PROMPTS, qwen_tokenizer, randomise, record, record_batch, save


@torch.no_grad()
def joints(pipe, golden):
    for i, prompt in enumerate((*PROMPTS, NEGATIVE, LONG)):
        text = pipe.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True)
        golden[f"{i}.ids.0"] = torch.tensor(pipe.tokenizer(text).input_ids).float()
        states, negative = pipe.encode_prompt(prompt, device="cpu")
        golden[f"{i}.states"], golden[f"{i}.negative"] = states[0], negative[0]


def runs(pipe, golden, usual, sized):
    usual = {"width": usual, "height": usual}
    for i, prompt in enumerate(PROMPTS):
        record(pipe, golden, f"{i}.guided", prompt, 20 + i, num_inference_steps=4, **usual)
    record_batch(pipe, golden, "batch", 20, num_inference_steps=4, **usual)
    record(pipe, golden, "negative", PROMPTS[0], 30, num_inference_steps=4, negative_prompt=NEGATIVE, guidance_scale=3.5, **usual)
    # Here guidance of 0 is none.
    record(pipe, golden, "unguided", PROMPTS[1], 31, num_inference_steps=4, guidance_scale=0.0, **usual)
    record(pipe, golden, "sized", PROMPTS[1], 32, num_inference_steps=4, width=sized[0], height=sized[1])
    record(pipe, golden, "one", PROMPTS[0], 33, num_inference_steps=1, **usual)


def main():
    for number, (name, model, language, transformer, levels, scheduler) in enumerate((
        ("z-image", Qwen3Model, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}, {"dim": 24, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "axes_dims": [4, 4, 4]}, (4, 8), {"shift": 6.0}),
        ("z-image-turbo", Qwen3ForCausalLM, {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}, {"dim": 16, "n_layers": 1, "n_refiner_layers": 2, "n_heads": 1, "axes_dims": [4, 6, 6]}, (8, 4, 8),
         {"shift": 3.0}),
        ("z-image-odd", Qwen3Model, {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6}, {"dim": 30, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3, "axes_dims": [2, 4, 4], "qk_norm": False}, (4, 8),
         {"shift": 3.0, "use_dynamic_shifting": True}),
    )):
        torch.manual_seed(80 + number)
        tokenizer, vocabulary = qwen_tokenizer()
        encoder = model(Qwen3Config(vocab_size=vocabulary + 3, hidden_size=12, intermediate_size=20, num_hidden_layers=3, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **language))
        denoiser = ZImageTransformer2DModel(in_channels=4, n_kv_heads=transformer["n_heads"], cap_feat_dim=12, axes_lens=[640, 24, 24], **transformer)
        count = len(levels)
        vae = AutoencoderKL(latent_channels=4, norm_num_groups=4, layers_per_block=1, block_out_channels=levels, down_block_types=("DownEncoderBlock2D",) * count, up_block_types=("UpDecoderBlock2D",) * count,
                            scaling_factor=.3611, shift_factor=.1159, use_quant_conv=False, use_post_quant_conv=False)
        randomise(encoder, denoiser, vae)
        pipe = ZImagePipeline(FlowMatchEulerDiscreteScheduler(**scheduler), vae, encoder, tokenizer, denoiser)
        pipe.set_progress_bar_config(disable=True)
        cell = 2 ** (count - 1) * 2
        golden = {}
        joints(pipe, golden), runs(pipe, golden, 4 * cell, (7 * cell, 5 * cell))
        save(pipe, name, golden)


if __name__ == "__main__":
    main()

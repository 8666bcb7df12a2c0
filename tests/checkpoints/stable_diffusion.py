"""Makes sd15, sd21, sdxl and sdxl-zeros beside it, and sd15-inpainting and sdxl-inpainting: Stable Diffusion's pipelines in small, with random weights, as diffusers saves them, and what it
computes with them; of the last two, that is for `pictures.py`.

python tests/checkpoints/stable_diffusion.py
"""
import torch
from diffusers import (AutoencoderKL, DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline,
                       StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline,                       UNet2DConditionModel)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from common import NEGATIVE, PROMPTS, clip_tokenizer, published_clip_files, randomise, record, record_batch, save, write_golden

UNET = {"in_channels": 4, "out_channels": 4, "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
VAE = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1}
BETAS = {"beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1}


def text(vocabulary, width, layers, heads, act, **more):
    return CLIPTextConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=heads, hidden_act=act, **more)


def vae(*channels, **more):
    levels = len(channels)
    return AutoencoderKL(**VAE, block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **more)


def crossed(channels, **more):
    """A UNet with attention at every level but the last."""
    levels = len(channels)
    return UNet2DConditionModel(**{**UNET, **more}, block_out_channels=channels, down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
                                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1))


@torch.no_grad()
def joints(pipe, golden, xl=False):
    """Token ids, states and pooled vectors of each prompt."""
    for i, prompt in enumerate((*PROMPTS, NEGATIVE)):
        for number, tokenizer in enumerate([pipe.tokenizer] + ([pipe.tokenizer_2] if xl else [])):
            golden[f"{i}.ids.{number}"] = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids.float()
        out = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
        golden[f"{i}.states"], golden[f"{i}.negative"] = out[0][0], out[1][0]
        if xl:
            golden[f"{i}.pooled"] = out[2][0]


def runs(pipe, golden, sizes):
    """Four steps: alone with guidance, with a negative prompt, without guidance, of another size; and all prompts in a batch."""
    for i, prompt in enumerate(PROMPTS):
        record(pipe, golden, f"{i}.guided", prompt, 20 + i, num_inference_steps=4)
    record_batch(pipe, golden, "batch", 20, num_inference_steps=4)
    record(pipe, golden, "negative", PROMPTS[0], 30, num_inference_steps=4, negative_prompt=NEGATIVE, guidance_scale=3.5)
    record(pipe, golden, "unguided", PROMPTS[1], 31, num_inference_steps=4, guidance_scale=1.0)
    width, height = sizes
    record(pipe, golden, "sized", PROMPTS[1], 32, num_inference_steps=4, width=width, height=height)
    record(pipe, golden, "one", PROMPTS[0], 33, num_inference_steps=1)


def main():
    # As Stable Diffusion 1.5 is published: PNDM, quick GELU, files of the older tokenizer.
    torch.manual_seed(1)
    tokenizer, vocabulary = clip_tokenizer()
    encoder = CLIPTextModel(text(vocabulary, 16, 2, 2, "quick_gelu"))
    unet, decoder = crossed((8, 16, 16), cross_attention_dim=16, attention_head_dim=2), vae(8, 12)
    randomise(encoder, unet, decoder)
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False)
    pipe = StableDiffusionPipeline(decoder, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    golden = {}
    joints(pipe, golden), runs(pipe, golden, (24, 16))
    published_clip_files(save(pipe, "sd15", golden) / "tokenizer", tokenizer)

    # 2.1: velocity, heads told level by level, padding that is not the end; shards with an index.
    torch.manual_seed(2)
    tokenizer, vocabulary = clip_tokenizer(pad_token="!")
    encoder = CLIPTextModel(text(vocabulary, 24, 3, 3, "gelu", projection_dim=8))
    unet, decoder = crossed((8, 24), cross_attention_dim=24, attention_head_dim=(2, 3), use_linear_projection=True, sample_size=(6, 10)), vae(4, 8, 8, 12)
    randomise(encoder, unet, decoder)
    scheduler = DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    pipe = StableDiffusionPipeline(decoder, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    golden = {}
    joints(pipe, golden), runs(pipe, golden, (24, 40))
    save(pipe, "sd21", golden, max_shard_size="100KB")

    # XL, whose empty negative prompt is zeros, and one whose is a text, kept as the fp16 variant.
    for name, zeros, channels, scheduler in (("sdxl-zeros", True, (8, 16, 16), EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")),
                                             ("sdxl", False, (12, 12), EulerAncestralDiscreteScheduler(**BETAS))):
        torch.manual_seed(3 + zeros)
        tokenizer, vocabulary = clip_tokenizer()
        second, _ = clip_tokenizer(pad_token="!")
        ends = {"eos_token_id": vocabulary - 1, "bos_token_id": vocabulary - 2}
        encoder = CLIPTextModel(text(vocabulary, 8, 2, 2, "quick_gelu"))
        encoder_2 = CLIPTextModelWithProjection(text(vocabulary, 16, 3, 2, "gelu", projection_dim=10, **(ends if zeros else {})))
        levels = len(channels)
        unet = UNet2DConditionModel(**UNET, block_out_channels=channels, attention_head_dim=(1, 2, 4)[:levels], transformer_layers_per_block=(1, 2, 1)[:levels], use_linear_projection=True,
                                    cross_attention_dim=24, addition_embed_type="text_time", addition_time_embed_dim=6, projection_class_embeddings_input_dim=10 + 6 * 6,
                                    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1), up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",))
        decoder = vae(8, 12, scaling_factor=.13025)
        randomise(encoder, encoder_2, unet, decoder)
        half = {} if zeros else {"variant": "fp16"}
        if half:
            # Rounded before they are used: the file holds just these values.
            for model in (encoder, encoder_2, unet, decoder):
                model.half().float()
        pipe = StableDiffusionXLPipeline(decoder, encoder, encoder_2, tokenizer, second, unet, scheduler, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        golden = {}
        joints(pipe, golden, xl=True), runs(pipe, golden, (24, 40))
        if half:
            pipe.to(torch.float16)
        save(pipe, name, golden, **half)

    # Made for inpainting: shown the mask, and the latent of what stays.
    for name, xl in (("sd15-inpainting", False), ("sdxl-inpainting", True)):
        torch.manual_seed(9 + xl)
        tokenizer, vocabulary = clip_tokenizer()
        encoder = CLIPTextModel(text(vocabulary, 16, 2, 2, "quick_gelu"))
        decoder = vae(8, 12, **({"scaling_factor": .13025} if xl else {}))
        if xl:
            encoder_2 = CLIPTextModelWithProjection(text(vocabulary, 8, 2, 2, "gelu", projection_dim=10))
            unet = crossed((8, 16), in_channels=9, cross_attention_dim=24, attention_head_dim=(1, 2), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=6,
                           projection_class_embeddings_input_dim=10 + 6 * 6)
            randomise(encoder, encoder_2, unet, decoder)
            pipe = StableDiffusionXLInpaintPipeline(decoder, encoder, encoder_2, tokenizer, tokenizer, unet, EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"), add_watermarker=False)
        else:
            unet = crossed((8, 16), in_channels=9, cross_attention_dim=16, attention_head_dim=2)
            randomise(encoder, unet, decoder)
            pipe = StableDiffusionInpaintPipeline(decoder, encoder, tokenizer, unet, DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False), None, None, requires_safety_checker=False)
        save(pipe, name, {})


if __name__ == "__main__":
    main()

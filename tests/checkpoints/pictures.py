"""Writes pictures.safetensors into the checkpoints beside it: what diffusers computes with them when it begins with a picture (image to image) or changes a part of one (inpainting), with guidance rescaled, and with guidance in the first steps only.

python tests/checkpoints/pictures.py [NAME ...], after the scripts that make the checkpoints
"""
import sys

import diffusers
import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from common import HERE, PROMPTS, record

# Checkpoint: its pipeline, with a picture, with a part of one, and samplers beside its own.
PIPELINES = {
    "sd15": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
             {"heun": "HeunDiscreteScheduler", "dpmpp-2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler", "lcm": "LCMScheduler", "euler": "EulerDiscreteScheduler"}),
    "sd21": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", {}),
    "sdxl": ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline", {}),
    "sdxl-zeros": ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline", {}),
    "sd15-inpainting": ("StableDiffusionInpaintPipeline", None, "StableDiffusionInpaintPipeline", {"euler": "EulerDiscreteScheduler", "heun": "HeunDiscreteScheduler"}),
    "sdxl-inpainting": ("StableDiffusionXLInpaintPipeline", None, "StableDiffusionXLInpaintPipeline", {"unipc": "UniPCMultistepScheduler"}),
    "sd3": ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline", {}),
    "sd35": ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline", {}),
    "flux-dev": ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", {}),
    "flux-schnell": ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", {}),
    "z-image": ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline", {}),
    "z-image-odd": ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline", {}),
    "sana-sprint": ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline", None, {}),
}
STEPS = 5


def pictures(height, width):
    """A picture of gradients and a mask of a soft-edged disc, the same whenever they are made."""
    y, x = numpy.mgrid[0:height, 0:width].astype(float)
    channels = [255 * x / width, 255 * y / height, 127 + 120 * numpy.sin(x * .7) * numpy.cos(y * .4)]
    away = numpy.hypot(x - width * .4, y - height * .6) / min(height, width)
    mask = numpy.clip((.45 - away) * 900, 0, 255)
    return Image.fromarray(numpy.stack(channels, -1).astype("uint8")), Image.fromarray(numpy.stack([mask, mask, mask], -1).astype("uint8"))


def main(names):
    for name, (plain, begun, partly, samplers) in PIPELINES.items():
        if names and name not in names:
            continue
        folder = HERE / name
        half = {"variant": "fp16"} if name == "sdxl" else {}
        whole = getattr(diffusers, plain).from_pretrained(folder, torch_dtype=torch.float32, **half)
        parts = whole.components
        settings = {"requires_safety_checker": False} if name in ("sd15", "sd21", "sd15-inpainting") else {}
        if "sdxl" in name:
            settings = {"force_zeros_for_empty_prompt": whole.config.force_zeros_for_empty_prompt}
        if "unet" in parts:
            # These pipelines compare it with a number; nothing here is computed by it.
            parts["unet"].register_to_config(sample_size=64)
        if name.startswith("sd3"):
            # Its inpainting looks only at whether this is the number of published checkpoints.
            parts["transformer"].register_to_config(in_channels=16)
        height, width = (16, 24) if "inpainting" in name else load_file(folder / "golden.safetensors")["0.guided.image"].shape[:2]
        image, mask = pictures(height, width)
        golden = {"init": torch.from_numpy(numpy.array(image)).float(), "mask": torch.from_numpy(numpy.array(mask)).float()}
        own = parts["scheduler"]

        def drawn(key, kind, strength, scheduler, **more):
            pipe = kind(**{**parts, "scheduler": scheduler}, **settings)
            pipe.set_progress_bar_config(disable=True)
            unpack = lambda latents: latents
            if "flux" in name:
                unpack = lambda latents: pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
            if name == "sana-sprint":
                unpack = lambda latents: latents / own.config.sigma_data
                more.update(use_resolution_binning=False, intermediate_timesteps=None)
            if "Img2Img" not in kind.__name__ or name not in ("sd15", "sd21", "sdxl", "sdxl-zeros"):
                more.update(height=height, width=width)
            if "flux" not in name:
                more.update(guidance_scale=4.0)
            else:
                more.update(guidance_scale=3.5)
            record(pipe, golden, key, PROMPTS[0], 60, unpack, image=image, strength=strength, num_inference_steps=STEPS, **more)
            if kind is diffusers.StableDiffusion3InpaintPipeline:
                # It leaves out the shift that it encoded with (0.42.1), unlike image to image and the plain pipeline: decoded as those do.
                with torch.no_grad():
                    decoded = pipe.vae.decode(golden[f"{key}.latents"][-1:] / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
                golden[f"{key}.image"] = torch.from_numpy((pipe.image_processor.postprocess(decoded, output_type="np")[0] * 255).round()).float()

        for strength in (.5, 1.0):
            if begun:
                drawn(f"begun.{strength}", getattr(diffusers, begun), strength, own)
            if partly:
                drawn(f"partly.{strength}", getattr(diffusers, partly), strength, own, mask_image=mask)
        if begun and (name.startswith("sd1") or name.startswith("sd2") or "sdxl" in name):
            record(whole, golden, "rescaled.0.7", PROMPTS[0], 60, num_inference_steps=STEPS, guidance_scale=4.0, guidance_rescale=.7, height=height, width=width)
        if name in ("sd15", "sdxl"):
            # Of 5 steps 3, 0.7 of them rounded down; the first of PNDM's is counted twice here.
            record(whole, golden, "ranged.0.7", PROMPTS[0], 60, guided_steps=4 if name == "sd15" else 3, num_inference_steps=STEPS, guidance_scale=4.0, height=height, width=width)
        for sampler, scheduler in samplers.items():
            kind = getattr(diffusers, scheduler)
            if begun:
                drawn(f"begun.{sampler}", getattr(diffusers, begun), .6, kind.from_config(own.config))
            drawn(f"partly.{sampler}", getattr(diffusers, partly), .6, kind.from_config(own.config), mask_image=mask)
        save_file({k: v.contiguous() for k, v in golden.items()}, folder / "pictures.safetensors")
        (folder / "pictures.safetensors").chmod(0o644)
        print(name, (folder / "pictures.safetensors").stat().st_size // 1000, "kB", {k: tuple(v.shape) for k, v in golden.items() if "latents" in k})


if __name__ == "__main__":
    main(sys.argv[1:])

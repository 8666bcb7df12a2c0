"""Makes the checkpoints of KINDS beside it: a language model with learnable queries, a connector and a denoiser, all in small with random weights, and
what they compute; of those that also see, with pictures before the prompt. The connectors, and guidance by pictures, are written down here once more, in PyTorch.

python tests/checkpoints/metaquery.py [NAME...]
"""
import json
import shutil
import sys

import torch
import torch.nn.functional as F
import numpy as np
from diffusers import AutoencoderDC, AutoencoderKL, DPMSolverMultistepScheduler, PNDMScheduler, SanaPipeline, SanaTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from PIL import Image

from common import HERE, LONG, NEGATIVE, PROMPTS, qwen_tokenizer, randomise, record, write_golden

QUERIES, STATES, WIDTH, SIDE = 5, 16, 12, 32


class Rotary(nn.Module):
    """MetaQuery's encoder layer: rotated, then brought to one length per head; Qwen2's MLP; nothing masked."""

    def __init__(self, heads):
        super().__init__()
        linear = lambda i, o, bias=False: nn.Linear(i, o, bias=bias)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(STATES, 1e-6), nn.RMSNorm(STATES, 1e-6)
        self.self_attn = nn.ModuleDict({**{f"{n}_proj": linear(STATES, STATES, True) for n in "qkv"}, "o_proj": linear(STATES, STATES)})
        for name in ("q_norm", "k_norm"):
            self.self_attn[name] = nn.ParameterDict({"gamma": nn.Parameter(torch.ones(heads, 1, STATES // heads))})
        self.mlp = nn.ModuleDict({"gate_proj": linear(STATES, 4 * STATES), "up_proj": linear(STATES, 4 * STATES), "down_proj": linear(4 * STATES, STATES)})
        self.heads = heads

    def forward(self, x):
        a, h = self.self_attn, self.input_layernorm(x)
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = (split(a[f"{n}_proj"](h)) for n in "qkv")
        width = q.shape[-1]
        angles = torch.arange(x.shape[1])[:, None] * (1 / 10000 ** (torch.arange(0, width, 2).float() / width))
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        turn = lambda y: y * cos + torch.cat([-y[..., width // 2 :], y[..., : width // 2]], -1) * sin
        norm = lambda y, name: F.normalize(turn(y), dim=-1) * a[name]["gamma"] * width**.5
        o = F.scaled_dot_product_attention(norm(q, "q_norm"), norm(k, "k_norm"), v)
        x = x + a["o_proj"](o.transpose(1, 2).flatten(2))
        h = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))


class Encoder(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Plain(nn.Module):
    """OpenUni's layer: that of a vision transformer."""

    def __init__(self, width, inner, heads):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.self_attn = nn.ModuleDict({f"{n}_proj": nn.Linear(width, width) for n in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.heads = heads

    def forward(self, x):
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{n}_proj"](h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in "qkv")
        x = x + self.self_attn["out_proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))


class MetaQuery(nn.Module):
    def __init__(self):
        super().__init__()
        self.connector = nn.Sequential(Encoder([Rotary(2) for _ in range(3)]), nn.Linear(STATES, WIDTH), nn.GELU(approximate="tanh"), nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH, 1e-5))

    def forward(self, x):
        return self.connector(x)


class OpenUni(nn.Module):
    def __init__(self, kind, inner=None):
        super().__init__()
        width = {"enc_proj": STATES, "proj_enc_proj": inner}[kind]
        self.kind, self.connector = kind, Encoder([Plain(width, 20, 4) for _ in range(2)])
        self.projector = nn.Linear(STATES, WIDTH) if kind == "enc_proj" else nn.ModuleList([nn.Linear(STATES, width), nn.Linear(width, WIDTH)])
        self.meta_queries = nn.Parameter(torch.zeros(QUERIES, STATES))

    def forward(self, x):
        return self.projector(self.connector(x)) if self.kind == "enc_proj" else self.projector[1](self.connector(self.projector[0](x)))


SYSTEM = "You will be given an image or its caption. Please describe the content of the image in detail in your own words."
CHAT = ["<|im_start|>user\nGenerate an image: ", "<|im_end|>\n<|im_start|>assistant\n"]
# What of MetaQuery's template stands before a text that is written before the queries.
ASKED = "<|im_end|>\n<|im_start|>assistant\n"
METAQUERY = {"template": [f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n\n<begin_of_img>"], "queries": {"rows": "<img{}>"}}
AROUND, PIXELS = ["<|vision_start|>", "<|vision_end|>"], {"min_pixels": 64, "max_pixels": 2048}
SEES = {**METAQUERY, "pictures": {"around": AROUND, **PIXELS}}
KINDS = {
    "metaquery": METAQUERY,
    "openuni": {"template": CHAT, "unconditional": "<|im_start|>user\nGenerate an image.<|im_end|>\n<|im_start|>assistant\n", "queries": "embeddings"},
    "openuni-sd": {"template": [CHAT[0], CHAT[1] + "<img>"], "unconditional": "<|im_start|>user\nGenerate an image.<|im_end|>\n<|im_start|>assistant\n<img>", "queries": "embeddings"},
    "metaquery-qwen2-5-vl": SEES,
    "metaquery-qwen3-vl": SEES,
}


class Brain:
    def __init__(self, name, tokenizer, model, connector):
        self.kind, self.tokenizer, self.model, self.connector = KINDS[name], tokenizer, model, connector

    @torch.no_grad()
    def text(self, text):
        """What the connector makes of a whole text."""
        ids = torch.tensor([self.tokenizer(text, add_special_tokens=False).input_ids])
        rows = self.kind["queries"] != "embeddings"
        if rows:
            ids = torch.cat([ids, torch.tensor([[self.tokenizer.convert_tokens_to_ids(f"<img{i}>") for i in range(QUERIES)]])], 1)
        embeddings = self.model.get_input_embeddings()(ids)
        if not rows:
            embeddings = torch.cat([embeddings, self.connector.meta_queries[None]], 1)
        states = self.model(inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2]).long(), output_hidden_states=True).hidden_states[-1]
        return self.connector(states[:, -QUERIES:])

    @torch.no_grad()
    def pictured(self, prompt, pictures):
        """The same of a prompt with pictures before it."""
        vision = self.model.config.vision_config
        usual = {} if vision.model_type == "qwen2_5_vl_vision" else {"image_mean": [.5] * 3, "image_std": [.5] * 3}
        size = {"shortest_edge": PIXELS["min_pixels"], "longest_edge": PIXELS["max_pixels"]}
        processor = Qwen2VLImageProcessorPil(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size, temporal_patch_size=vision.temporal_patch_size, size=size, **usual)
        out = processor(images=[Image.fromarray(p) for p in pictures], return_tensors="pt")
        counts = [int(grid.prod()) // vision.spatial_merge_size**2 for grid in out["image_grid_thw"]]
        before, after = self.kind["template"]
        seen = "".join(AROUND[0] + "<|image_pad|>" * count + AROUND[1] for count in counts)
        ids = self.tokenizer(before + seen + prompt + after, add_special_tokens=False).input_ids + [self.tokenizer.convert_tokens_to_ids(f"<img{i}>") for i in range(QUERIES)]
        ids = torch.tensor([ids])
        kinds = (ids == self.model.config.image_token_id).long()
        states = self.model.model(input_ids=ids, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids), **out).last_hidden_state
        return self.connector(states[:, -QUERIES:])

    @torch.no_grad()
    def thought(self, prompt, most=6):
        """The same of a prompt about which the language model has written something first."""
        before, after = self.kind["template"]
        rest = after.removeprefix(ASKED)
        ids = self.tokenizer(before + prompt + ASKED, add_special_tokens=False, return_tensors="pt").input_ids
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most, eos_token_id=self.tokenizer.convert_tokens_to_ids("<|im_end|>"), pad_token_id=0)
        text = self.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        print("written:", repr(text))
        return self.text(before + prompt + ASKED + text + rest)

    def prompt(self, prompt):
        return self.text(prompt.join(self.kind["template"]))

    def negative(self, prompt=""):
        return self.text(self.kind["unconditional"]) if "unconditional" in self.kind and not prompt else self.prompt(prompt)


def sana(**more):
    denoiser = SanaTransformer2DModel(in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
                                      caption_channels=WIDTH, sample_size=8)
    both = {"block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8), "layers_per_block": (1, 1), "qkv_multiscales": ((), (5,))}
    vae = AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=.41407, downsample_block_type="conv", upsample_block_type="interpolate",
                        **{f"{half}_{k}": v for half in ("encoder", "decoder") for k, v in both.items()})
    randomise(denoiser, vae)
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return SanaPipeline(None, None, vae, denoiser, scheduler), {"transformer": denoiser, "vae": vae, "scheduler": scheduler}


def stable_diffusion():
    unet = UNet2DConditionModel(sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=WIDTH, attention_head_dim=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    vae = AutoencoderKL(latent_channels=4, norm_num_groups=4, layers_per_block=1, block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=.18215)
    randomise(unet, vae)
    scheduler = PNDMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    pipe = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    return pipe, {"unet": unet, "vae": vae, "scheduler": scheduler}


@torch.no_grad()
def runs(brain, pipe, golden):
    sane = isinstance(pipe, SanaPipeline)
    usual = {"width": SIDE, "height": SIDE}

    def conditions(prompt, negative=""):
        found = {"prompt_embeds": brain.prompt(prompt), "negative_prompt_embeds": brain.negative(negative)}
        masks = {k.replace("embeds", "attention_mask"): torch.ones(v.shape[:2]) for k, v in found.items()} if sane else {}
        return {**found, **masks, **({"complex_human_instruction": None, "use_resolution_binning": False, "negative_prompt": None} if sane else {}), "num_inference_steps": 4, **usual}

    for i, prompt in enumerate(PROMPTS):
        record(pipe, golden, f"{i}.guided", None, 20 + i, **conditions(prompt))
        golden[f"batch.{i}.image"] = golden[f"{i}.guided.image"].clone()
    record(pipe, golden, "negative", None, 30, **conditions(PROMPTS[0], NEGATIVE), guidance_scale=3.5)
    record(pipe, golden, "unguided", None, 31, **conditions(PROMPTS[1]), guidance_scale=1.0)
    record(pipe, golden, "sized", None, 32, **{**conditions(PROMPTS[1]), "width": 2 * SIDE})
    record(pipe, golden, "one", None, 33, **{**conditions(PROMPTS[0]), "num_inference_steps": 1})
    for i, prompt in enumerate((*PROMPTS, NEGATIVE, LONG)):
        golden[f"{i}.states"], golden[f"{i}.negative"] = brain.prompt(prompt)[0], brain.negative()[0]


@torch.no_grad()
def guided_by_pictures(pipe, golden, key, seed, controls, scale, picture_scale, steps=4):
    """Denoises as MetaQuery's `sample_images` does, with three answers (nothing, pictures, pictures and prompt), or with the last two."""
    sane, shape = isinstance(pipe, SanaPipeline), (1, 4, SIDE // pipe.vae_scale_factor, SIDE // pipe.vae_scale_factor)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * pipe.scheduler.init_noise_sigma
    pipe.scheduler.set_timesteps(steps)
    kept = []
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.scale_model_input(latents, t)
        if sane:
            told = (t * pipe.transformer.config.timestep_scale).expand(1)
            answers = [pipe.transformer(x, encoder_hidden_states=c, encoder_attention_mask=torch.ones(c.shape[:2]), timestep=told, return_dict=False)[0] for c in controls]
        else:
            answers = [pipe.unet(x, t, encoder_hidden_states=c, return_dict=False)[0] for c in controls]
        if len(answers) == 3:
            nothing, pictures, full = answers
            answer = nothing + picture_scale * (pictures - nothing) + scale * (full - pictures)
        else:
            pictures, full = answers
            answer = pictures + scale * (full - pictures)
        latents = pipe.scheduler.step(answer, t, latents, return_dict=False)[0]
        kept.append(latents)
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    golden[f"{key}.latents"] = torch.cat(kept)
    golden[f"{key}.image"] = ((image[0].permute(1, 2, 0) / 2 + .5).clamp(0, 1) * 255).round()


@torch.no_grad()
def sights(brain, pipe):
    """What is made of prompts with pictures: one, guided by it too; and two, with a negative prompt."""
    rng, golden = np.random.default_rng(6), {}
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((24, 40), (16, 16))]
    black = [np.zeros_like(p) for p in pictures]
    for i, p in enumerate(pictures):
        golden[f"picture.{i}"] = torch.from_numpy(p).float()
    for key, count, prompt, negative, picture_scale in (("one", 1, PROMPTS[0], "", 1.5), ("two", 2, PROMPTS[2], NEGATIVE, 2.5), ("plain", 2, PROMPTS[1], "", 1.0)):
        full, seen, nothing = brain.pictured(prompt, pictures[:count]), brain.pictured(negative, pictures[:count]), brain.pictured(negative, black[:count])
        golden[f"{key}.full"], golden[f"{key}.seen"], golden[f"{key}.nothing"] = full[0], seen[0], nothing[0]
        guided_by_pictures(pipe, golden, key, 50, [nothing, seen, full] if picture_scale > 1 else [seen, full], 4.5, picture_scale)
    return golden


def manifest(name, brain, connector, file, hand, steps, guidance, samplers):
    parts = ["unet" if hand == "stable_diffusion" else "transformer", "vae", "scheduler"]
    return {
        "format": 2, "name": name, "description": {"metaquery": "MetaQuery", "openuni": "OpenUni", "openuni-sd": "OpenUni before Stable Diffusion", "metaquery-qwen2-5-vl": "MetaQuery that reads pictures (Qwen2.5-VL)",
                                                       "metaquery-qwen3-vl": "MetaQuery that reads pictures (Qwen3-VL), before Stable Diffusion"}[name],
        "brain": {"family": "metaquery", "name": name, "folders": ["language_model", "tokenizer"], "config": {"language_model": "language_model", "tokenizer": "tokenizer", "max_tokens": 256, **brain}},
        "connector": {"family": name.split("-")[0], "name": name, "weights": file, "config": {"queries": QUERIES, "states": STATES, "width": WIDTH, **connector}},
        "hand": {"family": hand, "name": name, "folders": parts, "config": {"layers": f"queries{QUERIES}@last", "width": WIDTH}},
        "offers": {"sizes": [[SIDE, SIDE]], "size_range": {"multiple": 2, "min_side": 2, "max_side": 128, "max_pixels": 4 * SIDE * SIDE}, "samplers": samplers, "default_steps": steps, "max_steps": 150,
                   "default_guidance_scale": guidance, "max_guidance_scale": 30, "max_image_count": 16, "max_prompt_tokens": 256, "negative_prompt": True, **({"max_reference_images": 2, "default_image_guidance_scale": 1.5} if "pictures" in brain else {})},
    }


def main():
    small = {"hidden_size": STATES, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": STATES, "fullatt_block_indexes": [0]}
    wanted = sys.argv[1:] or list(KINDS)
    for number, name in enumerate(KINDS):
        if name not in wanted:
            continue
        pictured, query = "pictures" in KINDS[name], name.split("-")[0] == "metaquery"
        torch.manual_seed(110 + number)
        tokenizer, _ = qwen_tokenizer()
        extra = ["<begin_of_img>", "<end_of_img>", *(f"<img{i}>" for i in range(QUERIES))] if query else ["<img>"]
        extra += [*AROUND, "<|image_pad|>"] if pictured else []
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *extra]})
        vocabulary = len(tokenizer) + 2
        if name == "metaquery":
            model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **small))
        elif pictured:
            places = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id"), tokenizer.convert_tokens_to_ids([*AROUND, "<|image_pad|>"])), video_token_id=vocabulary - 1)
            if name == "metaquery-qwen2-5-vl":
                text = {**small, "vocab_size": vocabulary, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 0]}}
                sight = {**vision, "depth": 2, "patch_size": 4, "window_size": 16}
                model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=sight, **places))
            else:
                text = {**small, "head_dim": 12, "vocab_size": vocabulary, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 2, 2]}}
                sight = {"depth": 3, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": STATES, "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
                model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=sight, **places))
        elif name == "openuni":
            text = {**small, "vocab_size": vocabulary, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1]}}
            model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
        else:
            model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **small))
        connector = MetaQuery() if query else OpenUni("enc_proj") if name == "openuni" else OpenUni("proj_enc_proj", 8)
        randomise(model, connector)
        pixels = name in ("openuni-sd", "metaquery-qwen3-vl")
        pipe, parts = stable_diffusion() if pixels else sana()
        pipe.set_progress_bar_config(disable=True)
        golden = {}
        brain = Brain(name, tokenizer, model, connector)
        runs(brain, pipe, golden)
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        for part, saved in {**parts, "language_model": model, "tokenizer": tokenizer}.items():
            saved.save_pretrained(folder / part)
        weights = connector.state_dict()
        if query:
            # As its trainer saves it: the whole model's names.
            file, sizes = "connector.safetensors", {"layers": 3, "heads": 2}
            save_file({**{f"model.{k}": v.contiguous() for k, v in weights.items()}, "model.transformer.proj_out.bias": torch.zeros(2)}, folder / file)
        else:
            # As it is published: what torch.save writes.
            file, sizes = "connector.pth", {"layers": 2, "heads": 4, "mlp_width": 20, "projection": connector.kind, **({"inner_width": 8} if connector.kind == "proj_enc_proj" else {})}
            torch.save({**weights, "transformer.proj_out.bias": torch.zeros(2)}, folder / file)
        hand = ("stable_diffusion", 50, 7.5, ["pndm", "euler"]) if pixels else ("sana", 20, 4.5, ["dpmpp-2m", "euler"])
        (folder / "pipeline.json").write_text(json.dumps(manifest(name, KINDS[name], sizes, file, *hand), indent=1) + "\n")
        if name == "metaquery":
            save_file({f"{i}.states": brain.thought(prompt)[0].contiguous() for i, prompt in enumerate(PROMPTS)}, folder / "thinking.safetensors")
        if pictured:
            save_file({k: v.contiguous() for k, v in sights(brain, pipe).items()}, folder / "references.safetensors")
        write_golden(folder, golden)


if __name__ == "__main__":
    main()

"""Makes the folders beside it: tiny random text encoders of transformers 5.23 as they save them, and what they give.

python crates/worker/tests/text/reference.py
"""
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

CLIP = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 9, "bos_token_id": 38,
        "eos_token_id": 39, "pad_token_id": 39, "projection_dim": 12}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 4, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
MODELS = {
    # As Stable Diffusion 1.5's: end token 2 in the configuration, quick GELU.
    "clip-l": (CLIPTextModel, CLIPTextConfig(**{**CLIP, "eos_token_id": 2}, hidden_act="quick_gelu"), False),
    # As SDXL's second: projected, GELU.
    "clip-g": (CLIPTextModelWithProjection, CLIPTextConfig(**{**CLIP, "num_attention_heads": 2}, hidden_act="gelu"), False),
    # Two layers, a wider head, and padding that is hidden.
    "clip-masked": (CLIPTextModelWithProjection, CLIPTextConfig(**{**CLIP, "num_hidden_layers": 2, "num_attention_heads": 1, "projection_dim": 20}, hidden_act="gelu_new"), True),
    # As FLUX.1's and Stable Diffusion 3's.
    "t5-v1_1": (T5EncoderModel, T5Config(**T5, feed_forward_proj="gated-gelu"), False),
    # Heads that do not add up to the width, few buckets so that far ones are reached, and padding that is hidden.
    "t5-masked": (T5EncoderModel, T5Config(**{**T5, "num_heads": 3, "d_kv": 6, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}, feed_forward_proj="gated-gelu"), True),
    "t5-relu": (T5EncoderModel, T5Config(**{**T5, "num_layers": 2, "layer_norm_epsilon": 1e-5}, feed_forward_proj="relu"), False),
}


@torch.no_grad()
def main():
    for number, (name, (kind, config, masked)) in enumerate(MODELS.items()):
        torch.manual_seed(7 + number)
        config._attn_implementation = "eager"
        model = kind(config).eval()
        for p in model.parameters():
            # Larger than the usual start, and norms off 1, so that mistakes show.
            p.copy_(torch.randn_like(p) * .3 + (1 if p.dim() == 1 else 0))
        tokens = 9 if name.startswith("clip") else 21
        ids = torch.randint(3, 37, (3, tokens), generator=torch.Generator().manual_seed(5))
        lengths = [tokens, 5, 2]
        mask = torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]
        if name.startswith("clip"):
            ids[:, 0] = 38
            for row, length in zip(ids, lengths):
                row[length - 1 :] = 39
        else:
            for row, length in zip(ids, lengths):
                row[length - 1], row[length:] = 1, 0
        given = {"attention_mask": mask.long()} if masked else {}
        out = model(input_ids=ids, output_hidden_states=True, **given)
        golden = {"ids": ids.float(), "mask": mask.float()}
        golden |= {f"state.{i}": h.clone() for i, h in enumerate(out.hidden_states)}
        golden["normed"] = out.last_hidden_state.clone()
        if name.startswith("clip"):
            golden["pooled"] = (out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output).clone()
        folder = Path(__file__).parent / name
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_file(golden, folder / "golden.safetensors")


if __name__ == "__main__":
    main()

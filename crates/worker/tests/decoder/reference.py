"""Makes the golden files beside it: tiny random language models of transformers 5.23 and their hidden states.

python crates/worker/tests/decoder/reference.py [NAME ...]
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    Gemma2Config, Gemma2Model, GemmaConfig, GemmaModel, LlamaConfig, LlamaModel, MistralConfig, MistralModel, Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model,
)

COMMON = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "rms_norm_eps": 1e-5, "attn_implementation": "eager"}
MODELS = {
    "llama": (LlamaModel, LlamaConfig(**COMMON, num_attention_heads=4, num_key_value_heads=2, rope_theta=1e5)),
    # Of four pairs one turns as it did, one slower by a part of the factor, two by all of it.
    "llama3": (LlamaModel, LlamaConfig(**COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e2, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32})),
    "mistral": (MistralModel, MistralConfig(**COMMON, num_attention_heads=4, num_key_value_heads=2, sliding_window=3)),
    "dynamic": (Qwen2Model, Qwen2Config(**COMMON, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
                                        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0})),
    "qwen2": (Qwen2Model, Qwen2Config(**COMMON, num_attention_heads=2, num_key_value_heads=1, rope_theta=1e6)),
    "qwen3": (Qwen3Model, Qwen3Config(**COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=6, rope_theta=1e6)),
    "gemma": (GemmaModel, GemmaConfig(**COMMON, num_attention_heads=2, num_key_value_heads=1, head_dim=8)),
    "gemma2": (Gemma2Model, Gemma2Config(**COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=12,
                                         sliding_window=3, attn_logit_softcapping=2.0)),
}


@torch.no_grad()
def main():
    ids = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    for name in sys.argv[1:] or MODELS:
        model, config = MODELS[name]
        torch.manual_seed(7)
        model = model(config).eval()
        for p in model.parameters():
            # Larger than the usual start, and norms off 1, so that mistakes show.
            p.copy_(torch.randn_like(p) * (.3 if p.dim() > 1 else .5) + (1 if p.dim() == 1 and not name.startswith("gemma") else 0))
        batch = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        single = model(input_ids=ids[1:, :4], output_hidden_states=True)
        # What it would write, the likeliest token each time, read from the beginning for each.
        written = ids[:1].clone()
        for _ in range(9):
            states = model(input_ids=written).last_hidden_state[:, -1]
            written = torch.cat([written, (states @ model.embed_tokens.weight.T).argmax(-1, keepdim=True)], 1)
        golden = {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
        golden["golden.written"] = written[0, ids.shape[1]:].float()
        golden |= {f"golden.batch.{i}": h.clone() for i, h in enumerate(batch.hidden_states)}
        golden |= {f"golden.single.{i}": h.clone() for i, h in enumerate(single.hidden_states)}
        save_file(golden, Path(__file__).parent / f"{name}.safetensors")
    save_file({"ids": ids.float(), "mask": mask.float()}, Path(__file__).parent / "inputs.safetensors")


if __name__ == "__main__":
    main()

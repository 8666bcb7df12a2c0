"""Makes the files beside it: tiny random Qwen2.5-VL and Qwen3-VL models of transformers 5.23, a picture, and what they see and say.

python crates/worker/tests/vision/reference.py
"""
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

HERE = Path(__file__).parent
TEXT = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
OLD = {"depth": 3, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4}
NEW = {"depth": 4, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 16}
mrope = lambda sections, theta=1e6, **more: {"rope_type": "default", "rope_theta": theta, "mrope_section": sections, **more}
MODELS = {
    # Windows of 2 x 2 tokens, of which the last ones are smaller.
    "windows": (Qwen2_5_VLModel, Qwen2_5_VLConfig, {**TEXT, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": mrope([1, 2, 1])}, {**OLD, "window_size": 16, "fullatt_block_indexes": [1]}),
    # One head a key head, windows of 3 x 3, blocks of one patch, one frame.
    "windows-odd": (Qwen2_5_VLModel, Qwen2_5_VLConfig, {**TEXT, "num_attention_heads": 2, "num_key_value_heads": 2, "rope_parameters": mrope([0, 2, 2], 1e4)},
                    {**OLD, "spatial_merge_size": 1, "temporal_patch_size": 1, "window_size": 12, "fullatt_block_indexes": [0, 2]}),
    "taps": (Qwen3VLModel, Qwen3VLConfig, {**TEXT, "num_attention_heads": 4, "head_dim": 12, "rope_parameters": mrope([2, 2, 2], 5e6, mrope_interleaved=True)},
             {**NEW, "patch_size": 4, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]}),
    "taps-odd": (Qwen3VLModel, Qwen3VLConfig, {**TEXT, "num_attention_heads": 4, "head_dim": 10, "rope_parameters": mrope([3, 1, 1], mrope_interleaved=True)},
                 {**NEW, "patch_size": 6, "spatial_merge_size": 1, "num_position_embeddings": 49, "deepstack_visual_indexes": [3, 1, 0]}),
}
PICTURE, IMAGE_TOKEN = 30, 30


@torch.no_grad()
def main():
    rng = np.random.default_rng(5)
    # Neither square nor a multiple of anything: 53 x 38.
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((53, 38), Image.BICUBIC)
    fits = Image.fromarray(rng.integers(0, 256, (24, 48, 3), dtype=np.uint8))
    smooth.save(HERE / "scaled.png"), fits.save(HERE / "fits.png")
    for number, (name, (model, config, text, vision)) in enumerate(MODELS.items()):
        torch.manual_seed(60 + number)
        config = config(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, video_token_id=31, vision_start_token_id=28, vision_end_token_id=29)
        model = model(config).eval()
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (.3 if p.dim() > 1 else .5) + (1 if p.dim() == 1 else 0))
        v = config.vision_config
        usual = {} if name.startswith("windows") else {"image_mean": [.5] * 3, "image_std": [.5] * 3}
        processor = Qwen2VLImageProcessorPil(patch_size=v.patch_size, merge_size=v.spatial_merge_size, temporal_patch_size=v.temporal_patch_size, size={"shortest_edge": 600, "longest_edge": 1700}, **usual)
        golden = {k: p.clone() for k, p in model.state_dict().items()}
        ids, kinds, pixels, grids = [3, 7, 28], [0, 0, 0], [], []
        for key, picture in (("fits", fits), ("scaled", smooth)):
            out = processor(images=picture, return_tensors="pt")
            seen = model.visual(out["pixel_values"], grid_thw=out["image_grid_thw"])
            golden[f"golden.{key}.patches"], golden[f"golden.{key}.grid"] = out["pixel_values"], out["image_grid_thw"].float()
            golden[f"golden.{key}.tokens"] = seen.pooler_output
            for i, tokens in enumerate(getattr(seen, "deepstack_features", None) or []):
                golden[f"golden.{key}.tap.{i}"] = tokens
            count = len(seen.pooler_output)
            ids, kinds = ids + [IMAGE_TOKEN] * count + [29, 11], kinds + [1] * count + [0, 0]
            pixels.append(out["pixel_values"]), grids.append(out["image_grid_thw"])
        ids, kinds = torch.tensor([ids + [5, 9]]), torch.tensor([kinds + [0, 0]])
        out = model(input_ids=ids, mm_token_type_ids=kinds, pixel_values=torch.cat(pixels), image_grid_thw=torch.cat(grids), attention_mask=torch.ones_like(ids))
        golden["golden.ids"], golden["golden.states"] = ids.float(), out.last_hidden_state
        plain = torch.tensor([[3, 7, 28, 29, 11, 5]])
        golden["golden.plain.ids"], golden["golden.plain.states"] = plain.float(), model(input_ids=plain, attention_mask=torch.ones_like(plain)).last_hidden_state
        save_file({k: p.contiguous() for k, p in golden.items()}, HERE / f"{name}.safetensors")
        (HERE / f"{name}.json").write_text(json.dumps(config.to_dict(), indent=1, default=str) + "\n")
        print(name, {k: tuple(p.shape) for k, p in golden.items() if k.startswith("golden")})


if __name__ == "__main__":
    main()

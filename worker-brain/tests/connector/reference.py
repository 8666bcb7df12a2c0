"""Makes the golden files beside it from the training code's connectors, with random weights.

python worker-brain/tests/connector/reference.py
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))
from training.network import Connector, Routed  # noqa: E402

CONFIG = {"states": 24, "queries": 3, "width": 16, "heads": 2, "connector_layers": 2, "max_tokens": 9}


def random(module):
    for p in module.parameters():
        p.copy_(torch.randn_like(p) * .4)
    return module.eval()


def write(name, module, golden):
    save_file({k: v.contiguous() for k, v in (dict(module.state_dict()) | golden).items()}, HERE / name)


@torch.no_grad()
def main():
    torch.manual_seed(3)
    connector = random(Connector(CONFIG))
    states, mask = torch.randn(2, 7, 24), torch.ones(2, 7)
    mask[1, 4:] = 0
    states = states * mask[..., None]
    golden = {"golden.states": states, "golden.mask": mask, "golden.batch": connector(states, mask), "golden.single": connector(states[1:, :4])}
    write("queries.safetensors", connector, golden)

    routed = random(Routed(CONFIG))
    states, mask = torch.randn(5, 7, 24), torch.ones(5, 7)
    mask[1, 4:], mask[3, 1:] = 0, 0
    # Two prompts go through; so would the second by a token that is absent.
    best = routed.gate(states, mask.bool()).argmax()
    token = torch.stack([routed.gate(states[best : best + 1, i : i + 1], torch.ones(1, 1).bool()) for i in range(7)]).argmax()
    states[1, 5] = states[best, token]
    scores = routed.gate(states, mask.bool())
    routed.gate.b.bias -= scores.sort().values[2:4].mean()
    through = routed.gate(states, mask.bool()) > 0
    assert through.sum() == 2 and not through[1] and routed.gate(states, torch.ones(5, 7).bool())[1] > 0, through
    golden = {"golden.states": states, "golden.mask": mask, "golden.through": through.float(), "golden.batch": routed(states, mask.bool())}
    write("routed.safetensors", routed, golden)


if __name__ == "__main__":
    main()

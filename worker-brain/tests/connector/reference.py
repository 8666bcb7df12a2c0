"""Makes the golden file beside it from the training code's connector, with random weights.

python worker-brain/tests/connector/reference.py
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))
from training.network import Connector  # noqa: E402

CONFIG = {"states": 24, "queries": 3, "width": 16, "heads": 2, "connector_layers": 2, "max_tokens": 9}


@torch.no_grad()
def main():
    torch.manual_seed(3)
    connector = Connector(CONFIG).eval()
    for p in connector.parameters():
        p.copy_(torch.randn_like(p) * .4)
    states, mask = torch.randn(2, 7, 24), torch.ones(2, 7)
    mask[1, 4:] = 0
    states = states * mask[..., None]
    golden = dict(connector.state_dict())
    golden |= {"golden.states": states, "golden.mask": mask, "golden.batch": connector(states, mask), "golden.single": connector(states[1:, :4])}
    save_file({k: v.contiguous() for k, v in golden.items()}, HERE / "queries.safetensors")


if __name__ == "__main__":
    main()

"""Makes randn.json beside it: values of torch.randn on CPU for several seeds and shapes, some of each, and their sum.

python worker-hand/tests/noise/reference.py
"""
import json
from pathlib import Path

import torch

SEEDS = [0, 7, 123456789, 2**32 - 1, 2**32 + 5, 2**63 + 11]
SHAPES = [[1], [3], [15], [16], [17], [36, 64], [1000]]


def main():
    rows = []
    for seed in SEEDS:
        for shape in SHAPES:
            values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).flatten()
            count = len(values)
            index = list(range(count)) if count <= 40 else [*range(20), *range(count - 20, count)]
            rows.append({"seed": str(seed), "shape": shape, "index": index, "values": [values[i].item() for i in index], "sum": values.double().sum().item()})
    (Path(__file__).parent / "randn.json").write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()

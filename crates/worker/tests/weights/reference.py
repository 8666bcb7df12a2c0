"""Makes small.pth beside it. python crates/worker/tests/weights/reference.py"""
from pathlib import Path

import torch

torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": (torch.arange(4.0).half() + .5).reshape(2, 2).t(), "ids": torch.arange(3), "part": torch.arange(6.0)[2:]}, Path(__file__).parent / "small.pth")

"""Makes grid.png of the README with the shipped pipeline: `python docs/pictures/make.py` (after `make demo`; needs pillow, grpcio, grpcio-reflection).

Seed 1 for each, nothing picked. Prints the prompts in reading order.
"""
import io
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from training.client import Client, Server  # noqa: E402

PROMPTS = [
    "a red apple to the left of a blue fish", "two penguins in the snow", "a purple car", "three cats", "a rocket at night", "a crab on the beach", "a slice of pizza", "a huge lion",
    "a green cat next to a pink elephant", "five strawberries", "a guitar at sunset", "a sailboat in the ocean", "an owl to the right of a cactus", "a tiny house on the grass", "four bees on a yellow background", "a robot below a cloud",
    "the animal that barks", "a crimson automobile", "two foxes and a rabbit", "a blue heart and a red star", "a yellow balloon in the top left corner", "an orange butterfly in the desert", "a small dog above a big pizza", "a bear",
]
COLUMNS, SIDE, GAP = 8, 96, 4


def main():
    rows = -(-len(PROMPTS) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) - GAP, rows * (SIDE + GAP) - GAP), (200, 200, 200))
    with Server(ROOT / "target/release/efferent") as server:
        client = Client(server.address)
        for index, prompt in enumerate(PROMPTS):
            picture = Image.open(io.BytesIO(client.picture(prompt, 1)))
            sheet.paste(picture, (index % COLUMNS * (SIDE + GAP), index // COLUMNS * (SIDE + GAP)))
            print(f"{index + 1}. {prompt}")
    sheet.save(Path(__file__).with_name("grid.png"), optimize=True)


if __name__ == "__main__":
    main()

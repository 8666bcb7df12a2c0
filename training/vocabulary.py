"""The words of the pictures: objects, colours, relations, backgrounds, sizes, positions, and which wordings are kept for the evaluation."""
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Thing:
    """An object that can be drawn."""

    icon: str
    plural: str
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    held_out: tuple[str, ...]
    # Those of the held-out wordings that need a name, a story, a saying or a custom to be known.
    allusions: frozenset[str]

    @property
    def name(self) -> str:
        return self.names[0]


def core(phrase: str) -> str:
    return re.sub(r"^(a|an|the)\s+", "", phrase.lower())


def _split(cell: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in cell.split(";") if part.strip())


def _rows(name: str) -> list[list[str]]:
    lines = (Path(__file__).parent / name).read_text().splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in lines if not line.startswith("#")]


_MORE = {tuple(head.split()): tuple(map(_split, cells)) for head, *cells in _rows("more-words.txt")}
# Every twelfth of these is kept from training: by them it is measured, before the evaluation's own are looked at.
_EVERY = 12
# (kind, name) -> more words of training, which `words.py` alone uses; of a thing, names and descriptions.
MORE = {key: tuple(tuple(word for i, word in enumerate(cell) if i % _EVERY) for cell in cells) if key[0] == "thing" else cells for key, cells in _MORE.items()}


def load_things() -> list[Thing]:
    """The objects of objects.txt. A held-out wording that is a part of any training wording is dropped."""
    cells = _rows("objects.txt")
    trained = {core(p) for c in cells for p in _split(c[2]) + _split(c[3])} | {core(p) for parts in _MORE.values() for part in parts for p in part}
    found = []
    for icon, plural, names, descriptions, held_out in cells:
        kept = [p for p in _split(held_out) if not any(f" {core(p.rstrip('*'))} " in f" {t} " for t in trained)]
        allusions = frozenset(p.rstrip("*") for p in kept if p.endswith("*"))
        found.append(Thing(icon, plural, _split(names), _split(descriptions), tuple(p.rstrip("*") for p in kept), allusions))
    return found


THINGS = load_things()
# (thing, wording): those kept from training.
SPARED = [(index, word) for index, thing in enumerate(THINGS) for cell in _MORE["thing", thing.icon] for word in cell[::_EVERY]]

_TRAINED = [core(word) for thing in THINGS for word in thing.names + thing.descriptions]
# The same, of fresh-words.txt: what is in the captions of objects.txt is left out.
FRESH = [(index, word) for index, (_, words) in enumerate(_rows("fresh-words.txt")) for word in _split(words) if not any(f" {core(word)} " in f" {trained} " for trained in _TRAINED)]

# name -> (RGB, words of training, words kept for the evaluation)
COLORS = {
    "red": ((222, 38, 38), ("red", "red", "scarlet", "bright red", "ruby", "cherry red", "fire engine red", "blood red", "tomato red", "vermilion", "carmine", "brick red", "reddish"), ("crimson", "cardinal red")),
    "orange": ((247, 138, 22), ("orange", "orange", "bright orange", "tangerine", "orange colored", "pumpkin colored", "apricot", "rusty orange", "marigold", "carrot colored", "copper colored", "ginger"), ("amber", "persimmon colored")),
    "yellow": ((250, 208, 30), ("yellow", "yellow", "bright yellow", "lemon yellow", "canary", "sunny yellow", "mustard yellow", "honey yellow", "butter yellow", "banana yellow", "blond", "yellowish"), ("golden yellow", "buttercup yellow")),
    "green": ((46, 158, 60), ("green", "green", "grass green", "dark green", "lime", "olive", "forest green", "jade", "mint green", "leaf green", "moss green", "kelly green", "greenish"), ("emerald", "shamrock green")),
    "blue": ((38, 98, 226), ("blue", "blue", "bright blue", "navy", "sky blue", "cobalt", "royal blue", "ocean blue", "sapphire blue", "cerulean", "turquoise", "denim blue", "bluish"), ("azure", "baby blue")),
    "purple": ((132, 56, 196), ("purple", "purple", "violet", "lilac", "dark purple", "lavender", "plum colored", "amethyst", "eggplant colored", "royal purple", "grape colored", "orchid purple", "purplish"), ("mauve", "aubergine colored")),
    "pink": ((246, 122, 186), ("pink", "pink", "hot pink", "light pink", "magenta", "rosy", "rose pink", "bubblegum pink", "salmon pink", "blush pink", "flamingo pink", "pastel pink", "pinkish"), ("fuchsia", "candy pink")),
    "brown": ((134, 82, 42), ("brown", "brown", "chocolate brown", "dark brown", "chestnut", "tan", "cocoa colored", "caramel", "hazel", "mahogany", "umber", "cinnamon colored", "brownish"), ("coffee colored", "walnut brown")),
}
COLOR_NAMES = list(COLORS)

# Where A lies, seen from B: words of training, words kept.
RELATIONS = {
    "left": (("to the left of", "left of", "on the left of", "on the left side of", "at the left of", "just left of", "to the left side of", "immediately left of", "leftward of"), ("to the left hand side of",)),
    "right": (("to the right of", "right of", "on the right of", "on the right side of", "at the right of", "just right of", "to the right side of", "immediately right of", "rightward of"), ("to the right hand side of",)),
    "above": (("above", "over", "on top of", "higher than", "directly above", "just above", "right over", "hovering over", "upon", "at the top of"), ("up above",)),
    "below": (("below", "under", "beneath", "lower than", "directly below", "just below", "right under", "placed under", "down below", "at the bottom of"), ("underneath",)),
}
BESIDE = ("and", "and", "next to", "beside", "with", "near", "together with")

# name -> (words of training, words kept). Plain ones are drawn in their colour, the others as a scene.
PLAIN = {"white": (255, 255, 255), "gray": (190, 194, 200), "black": (24, 24, 28), "red": (238, 120, 116), "yellow": (255, 234, 140), "green": (156, 214, 152),
         "blue": (152, 196, 246), "purple": (202, 168, 236), "pink": (252, 198, 222), "orange": (252, 196, 134)}
SCENES = {
    "grass": (("on the grass", "in a meadow", "in a green field", "on the lawn", "in the park", "in the grass", "on green grass", "on a grassy field", "in a garden", "on a green hill", "in the countryside"), ("in a pasture",)),
    "beach": (("on the beach", "at the beach", "by the sea", "on a sandy beach", "at the seaside", "on the coast", "by the ocean", "on the sand near the waves", "in front of the waves", "on a tropical beach"), ("on the shore",)),
    "night": (("at night", "in the night sky", "under the stars", "in space", "among the stars", "in the dark", "in the middle of the night", "at nighttime", "under a starry sky", "late at night", "in outer space", "in the moonlight"), ("at midnight",)),
    "water": (("in the ocean", "in the sea", "under water", "in the water", "in the deep blue sea", "swimming in the sea", "underwater", "beneath the waves", "in a river", "in a pond", "in an aquarium"), ("in the lake",)),
    "snow": (("in the snow", "on the snow", "in winter", "on the ice", "on a snowy day", "in a snowy landscape", "on a winter day", "in the cold snow", "in a snowstorm", "at the north pole", "in the frost"), ("in a blizzard",)),
    "sunset": (("at sunset", "at dusk", "in the evening", "in front of a sunset", "as the sun goes down", "at sundown", "in the evening glow", "under an orange sky", "in the last light of day", "at the end of the day"), ("at twilight",)),
    "desert": (("in the desert", "in a sandy desert", "on a sand dune", "in the sahara", "on the dunes", "in the hot sand", "among sand dunes", "in the arid desert", "in the gobi", "in death valley"), ("in a dry wasteland",)),
}
BACKGROUNDS = [f"plain {c}" for c in PLAIN] + list(SCENES)

SIZES = {"small": ("small", "tiny", "little", "miniature"), "big": ("big", "large", "huge", "giant", "enormous")}
SIZE_NAMES = ["normal", "small", "big"]

POSITIONS = {  # name -> (column, row, words)
    "top left": (0, 0, ("in the top left corner", "in the upper left corner", "at the top left")),
    "top": (1, 0, ("at the top", "at the top of the picture", "in the upper part")),
    "top right": (2, 0, ("in the top right corner", "in the upper right corner", "at the top right")),
    "left": (0, 1, ("on the left side", "at the left edge", "on the left")),
    "center": (1, 1, ("in the center", "in the middle")),
    "right": (2, 1, ("on the right side", "at the right edge", "on the right")),
    "bottom left": (0, 2, ("in the bottom left corner", "in the lower left corner", "at the bottom left")),
    "bottom": (1, 2, ("at the bottom", "at the bottom of the picture", "in the lower part")),
    "bottom right": (2, 2, ("in the bottom right corner", "in the lower right corner", "at the bottom right")),
}
POSITION_NAMES = list(POSITIONS)

COUNTS = {2: ("two", "two", "2", "a pair of", "a couple of"), 3: ("three", "three", "3", "a trio of"), 4: ("four", "four", "4"), 5: ("five", "five", "5")}

OPENINGS = ("", "", "", "", "a picture of ", "an image of ", "a photo of ", "a drawing of ", "draw ", "please draw ", "show me ", "paint ", "I want to see ",
            "an illustration of ", "make a picture of ")
HELD_OUT_OPENINGS = ("could you sketch ", "a painting of ", "render ")

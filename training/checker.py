"""Reads a picture back into a scene, by comparing it with every drawing that the scenes could have put there.

A picture is explained by a background, a layout (how many things, where, how large) and one sprite for each place: the explanation with the
least squared error over the whole picture wins. Nothing is known of the prompt while reading, so an extra, missing or blended thing is seen.
"""
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import scenes
from .scenes import PIXELS, PLACES, SIZE
from .vocabulary import BACKGROUNDS, COLOR_NAMES, POSITION_NAMES, POSITIONS, THINGS

TINTS = [None, *COLOR_NAMES]
# How far a thing may lie from its place, in pixels.
SHIFTS = [(dx, dy) for dy in (-3, -2, -1, 0, 1, 2, 3) for dx in (-3, -2, -1, 0, 1, 2, 3)]
# Hues in degrees of the colours' names, from..to, for what a drawing's own colours are called.
HUES = (("red", 345, 361), ("red", 0, 16), ("orange", 16, 41), ("yellow", 41, 66), ("green", 66, 175), ("blue", 175, 250), ("purple", 250, 292), ("pink", 292, 345))
# A thing is called by a colour of its own if so much of its drawing has it: an undyed carrot is an orange carrot, for all its green leaves.
OWN_SHARE = .6
# A place whose sprite leaves more than this part of what it should explain is not accepted as that thing.
MOST_LEFT = .30


@dataclass
class Found:
    """A thing in the picture."""

    thing: int
    color: str | None
    x: int
    y: int
    pixels: int
    # Squared error left, as a part of what the sprite adds to the bare background.
    left: float
    # Error of every (thing, colour) here, (things, colours).
    errors: np.ndarray


@dataclass
class Reading:
    """What a picture shows."""

    background: str
    found: list[Found]


@lru_cache(maxsize=None)
def sprites(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour (premultiplied; things x tints, pixels, pixels, 3) and opacity (.., 1) of every sprite."""
    art = np.stack([scenes.sprite(thing, tint, pixels) for thing in range(len(THINGS)) for tint in TINTS]).astype(np.float32)
    return art[..., :3], art[..., 3:]


def layouts() -> list[list[tuple[int, int, tuple[int, ...]]]]:
    """Every layout: for each place x, y and the sizes that may stand there."""
    found = [[(48, 48, (64,))], [(48, 48, (88,))]]
    found += [[((20, 48, 76)[POSITIONS[p][0]], (20, 48, 76)[POSITIONS[p][1]], (34,))] for p in POSITION_NAMES]
    any_size = (40, 28, 52)
    found += [[(26, 48, any_size), (70, 48, any_size)], [(48, 26, any_size), (48, 70, any_size)]]
    found += [[(x, y, (PIXELS[n],)) for x, y in PLACES[n]] for n in (3, 4, 5)]
    return found


LAYOUTS = layouts()


def read_background(image: np.ndarray) -> str:
    """The background whose pixels agree best with the picture's outer frame and its corners, outliers left out."""
    frame = np.ones((SIZE, SIZE), bool)
    frame[5:-5, 5:-5] = False
    distance = lambda name: np.sort(np.abs(image - scenes.background(name))[frame].max(-1))[: int(frame.sum() * .7)].mean()
    return min(BACKGROUNDS, key=distance)


class Reader:
    """Compares crops of one picture with all sprites; remembers what it has compared."""

    def __init__(self, image: np.ndarray, background: str):
        self.image, self.ground = image, scenes.background(background)
        self.name, self.known = background, {}
        pad = 64
        # Outside of the picture there is nothing to explain: it equals the background there.
        self.pad = pad
        self.padded_image = np.pad(image - self.ground, ((pad, pad), (pad, pad), (0, 0)))

    def place(self, x: int, y: int, pixels: int) -> tuple[float, Found]:
        """(error gained over bare background, negative if a sprite explains something; the best thing here)."""
        key = (x, y, pixels)
        if key in self.known:
            return self.known[key]
        added = predictions(self.name, x, y, pixels)  # (sprites, pixels * pixels * 3): what each adds to the background
        energy = (added ** 2).sum(1)
        left, top = x - pixels // 2 + self.pad, y - pixels // 2 + self.pad
        crops = np.stack([self.padded_image[top + dy : top + dy + pixels, left + dx : left + dx + pixels].reshape(-1) for dx, dy in SHIFTS])
        gains = energy[:, None] - 2 * (added @ crops.T)  # (sprites, shifts)
        best, shift = np.unravel_index(gains.argmin(), gains.shape)
        (dx, dy), gain, crop = SHIFTS[shift], gains[:, shift], crops[shift]
        best, total = int(best), float(crop @ crop)
        errors = (gain + total).reshape(len(THINGS), len(TINTS))
        left = float((gain[best] + total) / max(energy[best], 1e-6))
        found = Found(best // len(TINTS), TINTS[best % len(TINTS)], x + dx, y + dy, pixels, left, errors)
        self.known[key] = (float(gain[best]), found)
        return self.known[key]


@lru_cache(maxsize=96)
def predictions(background: str, x: int, y: int, pixels: int) -> np.ndarray:
    """What each sprite changes on a background at a place, flattened; nothing outside of the picture."""
    color, alpha = sprites(pixels)
    pad = 64
    ground = np.pad(scenes.background(background).astype(np.float32), ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    inside = np.pad(np.ones((SIZE, SIZE, 1), np.float32), ((pad, pad), (pad, pad), (0, 0)))
    left, top = x - pixels // 2 + pad, y - pixels // 2 + pad
    window = np.s_[top : top + pixels, left : left + pixels]
    return ((color - alpha * ground[window]) * inside[window]).reshape(len(color), -1)


def read(pixels: np.ndarray) -> Reading:
    """Reads a picture, (96, 96, 3) uint8."""
    image = pixels.astype(np.float32) / 255
    background = read_background(image)
    reader = Reader(image, background)
    best = None
    for layout in LAYOUTS:
        total, found = 0.0, []
        for x, y, sizes in layout:
            gain, thing = min((reader.place(x, y, size) for size in sizes), key=lambda pair: pair[0])
            total += gain
            found.append(thing)
        if best is None or total < best[0]:
            best = (total, found)
    return Reading(background, best[1])


def is_thing(found: Found, thing: int) -> bool:
    """Whether this place shows that thing, whatever its colour."""
    return found.left <= MOST_LEFT and found.thing == thing


@lru_cache(maxsize=None)
def own_color(thing: int) -> str | None:
    """The colour that most of the thing's drawing has, if there is one."""
    art = scenes.sprite(thing, None, 64)
    rgb = art[art[..., 3] > .5][:, :3]
    most, spread = rgb.max(-1), np.ptp(rgb, -1)
    r, g, b = rgb.T / np.maximum(spread, 1e-6)
    hue = np.where(rgb[:, 0] == most, (g - b) % 6, np.where(rgb[:, 1] == most, b - r + 2, r - g + 4)) * 60
    colored = spread > .3 * most
    dark = colored & (hue >= 8) & (hue < 41) & (most < .66)
    pale = colored & ((hue < 16) | (hue >= 345)) & (rgb.min(-1) > .4)
    share = {"brown": dark.mean(), "pink": pale.mean()}
    for name, low, high in HUES:
        share[name] = share.get(name, 0) + (colored & ~dark & ~pale & (hue >= low) & (hue < high)).mean()
    name = max(share, key=share.get)
    return name if share[name] >= OWN_SHARE else None


def is_color(found: Found, thing: int, color: str) -> bool:
    """Whether that colour explains the thing here best. A thing drawn in its own colours passes if those are, or nearly are, the colour asked for."""
    errors = found.errors[thing]
    if found.color is None and own_color(thing) == color:
        return True
    asked = errors[TINTS.index(color)]
    others = min(errors[TINTS.index(c)] for c in COLOR_NAMES if c != color)
    return asked < others and (asked <= errors[0] or errors[0] > .5 * asked)


def agrees(reading: Reading, scene: scenes.Scene, background: bool = False) -> bool:
    """Whether a picture shows a scene: every thing, how many, colours asked for, sizes that differ, relation and position."""
    wanted = [part for part in scene.parts for _ in range(part.count)]
    if len(reading.found) != len(wanted) or (background and reading.background != scene.background):
        return False
    left_over, matched = list(reading.found), []
    for part in wanted:
        fits = [f for f in left_over if is_thing(f, part.thing) and (not part.color or is_color(f, part.thing, part.color))]
        if not fits:
            return False
        left_over.remove(fits[0])
        matched.append(fits[0])
    if scene.relation and not holds(scene.relation, *matched):
        return False
    if scene.position:
        column, row, _ = POSITIONS[scene.position]
        if abs(matched[0].x - (20, 48, 76)[column]) > 10 or abs(matched[0].y - (20, 48, 76)[row]) > 10:
            return False
    sizes = [part.size for part in scene.parts]
    if scene.kind == "two" and sizes[0] != sizes[1]:
        return (matched[0].pixels < matched[1].pixels) == (sizes[0] == "small")
    return True


def holds(relation: str, a: Found, b: Found) -> bool:
    """Whether a lies left of, right of, above or below b, by more than it lies apart otherwise."""
    dx, dy = b.x - a.x, b.y - a.y
    along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
    return abs(along) > abs(across) and (along > 0) == (relation in ("left", "above"))

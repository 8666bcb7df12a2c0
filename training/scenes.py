"""Scenes: what is in a picture, its caption, and its pixels (96 x 96).

A caption leaves no needless ambiguity: without a relation word A is left and B right; mixed counts fill their places in reading order.
"""
import hashlib
import io
import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import resvg_py
from PIL import Image

from . import packages
from .vocabulary import (MORE, BESIDE, COLORS, COLOR_NAMES, COUNTS, OPENINGS, PLAIN, POSITIONS, POSITION_NAMES, RELATIONS, SCENES, SIZES, THINGS)

SIZE = 96
KINDS = (("single", .28), ("two", .37), ("count", .17), ("mixed", .18))
PLACES = {1: [(48, 48)], 2: [(26, 48), (70, 48)], 3: [(17, 48), (48, 48), (79, 48)], 4: [(26, 26), (70, 26), (26, 70), (70, 70)],
          5: [(19, 19), (77, 19), (48, 48), (19, 77), (77, 77)]}
PIXELS = {1: 64, 2: 40, 3: 30, 4: 38, 5: 30}


@dataclass
class Part:
    """Some of one object: index in THINGS, colour name or None, size name, how many."""

    thing: int
    color: str | None = None
    size: str = "normal"
    count: int = 1


@dataclass
class Scene:
    """What is in a picture. `relation`: where the first part lies, seen from the second; None for side by side."""

    kind: str
    parts: list[Part]
    relation: str | None = None
    position: str | None = None
    background: str = "plain white"
    beside: str = field(default="and")
    # Its place in a list, where there is one.
    number: int = 0


def held_out(*key) -> bool:
    """Whether a combination is kept from training: 10 % of (object, colour) and of object pairs, 12 % of (object, count)."""
    number = int(hashlib.sha256("/".join(map(str, key)).encode()).hexdigest()[:8], 16) % 100
    return number < (12 if key[0] == "count" else 10)


def keys(scene: Scene) -> list[tuple]:
    """The combinations of a scene that may be held out."""
    found = [("color", THINGS[p.thing].icon, p.color) for p in scene.parts if p.color]
    found += [("count", THINGS[p.thing].icon, p.count) for p in scene.parts if p.count > 1 and len(scene.parts) == 1]
    if len(scene.parts) == 2:
        found.append(("pair", *sorted(THINGS[p.thing].icon for p in scene.parts)))
    return found


def sample(rng: random.Random, kind: str | None = None, unseen: bool = False) -> Scene:
    """A scene; with `unseen`, at least one of its combinations is held out (where it has any), else none is."""
    while True:
        scene = _sample(rng, kind or rng.choices([k for k, _ in KINDS], [w for _, w in KINDS])[0])
        found = [held_out(*key) for key in keys(scene)]
        if (not unseen and not any(found)) or (unseen and (any(found) or not found)):
            return scene


def colorful(rng: random.Random, share: float, kind: str | None = None) -> Scene:
    """As `sample`, but in `share` of the scenes of one and two things each has a colour: each (thing, colour) is rare among other captions."""
    while True:
        scene = sample(rng, kind)
        if scene.kind not in ("single", "two") or rng.random() > share or all(p.color for p in scene.parts):
            return scene


def _sample(rng: random.Random, kind: str) -> Scene:
    color = lambda: rng.choice(COLOR_NAMES) if rng.random() < .45 else None
    things = rng.sample(range(len(THINGS)), 2)
    chance = rng.random()
    background = "plain white" if chance < .6 else f"plain {rng.choice(list(PLAIN))}" if chance < .78 else rng.choice(list(SCENES))
    if kind == "single":
        size = rng.choice(["normal"] * 4 + ["small", "big"])
        position = rng.choice(POSITION_NAMES) if size == "small" or rng.random() < .12 else None
        return Scene(kind, [Part(things[0], color(), "small" if position else size)], None, position, background)
    if kind == "two":
        sizes = rng.choice([("normal", "normal")] * 5 + [("small", "big"), ("big", "small")])
        relation = rng.choice(list(RELATIONS)) if rng.random() < .6 else None
        return Scene(kind, [Part(t, color(), s) for t, s in zip(things, sizes)], relation, None, background, rng.choice(BESIDE))
    if kind == "count":
        return Scene(kind, [Part(things[0], color(), "normal", rng.choice([2, 3, 3, 4, 4, 5]))], None, None, background)
    counts = rng.choice([(1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (3, 2), (2, 3)])
    return Scene(kind, [Part(t, None, "normal", n) for t, n in zip(things, counts)], None, None, background)


# --- captions ----------------------------------------------------------------------------------------------------
def article(phrase: str) -> str:
    """`phrase` with an indefinite article, unless it has one or is a description that starts with another word."""
    first = phrase.split()[0].lower()
    if first in ("a", "an", "the", "what", "where", "man's", "our", "two", "something", "someone") or first.endswith("'s"):
        return phrase
    return ("an " if phrase[0].lower() in "aeio" or phrase.startswith(("umbrella",)) else "a ") + phrase


def plural(name: str) -> str:
    """The regular plural of a name."""
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def words_of(kind: str, name: str, more: bool) -> tuple[str, ...]:
    """The words of training for a colour, a relation or a scene."""
    plain = {"color": lambda: COLORS[name][1], "relation": lambda: RELATIONS[name][0], "scene": lambda: SCENES[name][0]}[kind]()
    return plain + MORE[kind, name][0] if more else plain


def describe(part: Part, rng: random.Random, wording: float = 1.0, more: bool = False) -> str:
    """A noun phrase. `wording`: how often other words than the plain name are used, 0 for never; `more`: also those of more-words.txt."""
    thing = THINGS[part.thing]
    names, descriptions = MORE["thing", thing.icon] if more else ((), ())
    names, descriptions = thing.names + names, thing.descriptions + descriptions
    color = rng.choice(words_of("color", part.color, more)) if part.color and wording else part.color or ""
    size = "" if part.size == "normal" else rng.choice(SIZES[part.size])
    chance = rng.random() / max(wording, 1e-6)
    if part.count > 1:
        other = [n for n in names[1:] if " of " not in n and n not in ("grapes", "cherries", "cheese", "coffee", "corn", "cattle", "fire", "sunshine", "swine")]
        noun = plural(rng.choice(other)) if other and chance < .25 else thing.plural
        return " ".join(filter(None, (rng.choice(COUNTS[part.count]), size, color, noun)))
    if chance < .30 and descriptions:
        phrase = article(rng.choice(descriptions))
        if color:
            phrase += rng.choice((f" in {color}", f", colored {color}", f" that is {color}"))
        return f"{phrase} ({size})" if size else phrase
    noun = rng.choice(names[1:]) if chance < .55 and len(names) > 1 else thing.name
    return article(" ".join(filter(None, (size, color, noun))))


def place_words(scene: Scene, rng: random.Random, more: bool = False) -> str:
    """Position and background, in words; "" if neither needs any."""
    words = ""
    if scene.position:
        words += " " + rng.choice(POSITIONS[scene.position][2])
    if scene.background.startswith("plain "):
        color = scene.background[6:]
        if color != "white" or rng.random() < .1:
            words += rng.choice((f" on a {color} background", f" on a {color} background", f" in front of a {color} wall", f", {color} background"))
        return words
    return words + " " + rng.choice(words_of("scene", scene.background, more))


def caption(scene: Scene, rng: random.Random, wording: float = 1.0, more: bool = False) -> str:
    """A caption of a scene in training's words."""
    phrases = [describe(part, rng, wording, more) for part in scene.parts]
    if len(phrases) == 2:
        link = rng.choice(words_of("relation", scene.relation, more)) if scene.relation else scene.beside if scene.kind == "two" else "and"
        if scene.kind == "two" and scene.relation and rng.random() < .15:
            link = rng.choice(("that is ", "which is ", "placed ")) + link
        text = f"{phrases[0]} {link} {phrases[1]}"
    else:
        text = phrases[0]
    text = (rng.choice(OPENINGS) if wording else "") + text + place_words(scene, rng, more)
    if rng.random() < .12:
        text = text[0].upper() + text[1:] + rng.choice((".", "", "!"))
    return text


def plain_caption(scene: Scene) -> str:
    """A caption in the first words of everything."""
    size = lambda p: "" if p.size == "normal" else p.size
    noun = lambda p: " ".join(filter(None, (size(p), p.color, THINGS[p.thing].name)))
    phrases = [f"{COUNTS[p.count][0]} {' '.join(filter(None, (size(p), p.color, THINGS[p.thing].plural)))}" if p.count > 1 else article(noun(p)) for p in scene.parts]
    link = RELATIONS[scene.relation][0][0] if scene.relation else scene.beside if scene.kind == "two" else "and"
    words = f" {link} ".join(phrases)
    if scene.position:
        words += " " + POSITIONS[scene.position][2][0]
    if scene.background.startswith("plain "):
        return words if scene.background == "plain white" else f"{words} on a {scene.background[6:]} background"
    return f"{words} {SCENES[scene.background][0][0]}"


# --- pixels ------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=None)
def _art(icon: str) -> np.ndarray:
    svg = (packages.emoji_folder() / f"{icon}.svg").read_text()
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=384, height=384))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(np.float32) / 255


@lru_cache(maxsize=8192)
def sprite(thing: int, color: str | None, pixels: int) -> np.ndarray:
    """(pixels, pixels, 4) in 0..1, colours premultiplied by alpha. A colour replaces hue and keeps luminance."""
    art = _art(THINGS[thing].icon)
    rgb, alpha = art[..., :3], art[..., 3:]
    if color:
        target = np.array(COLORS[color][0], np.float32) / 255
        luminance = rgb @ np.array([.299, .587, .114], np.float32)
        shown = luminance[alpha[..., 0] > .5]
        low, middle, high = np.percentile(shown, (5, 50, 95))
        level = np.clip(.6 + .6 * (luminance - middle) / max(high - low, .4), .05, 1)[..., None]
        rgb = np.where(level < .6, target * (.45 + .55 * level / .6), target + (1 - target) * (level - .6) / .4 * .45)
    image = np.concatenate([rgb * alpha, alpha], -1)
    out = [np.asarray(Image.fromarray(image[..., c]).resize((pixels, pixels), Image.BOX)) for c in range(4)]
    return np.stack(out, -1)


@lru_cache(maxsize=None)
def background(name: str) -> np.ndarray:
    """(96, 96, 3) in 0..1."""
    y = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    mix = lambda top, bottom, t=y: (np.array(top, np.float32) * (1 - t) + np.array(bottom, np.float32) * t) / 255 + np.zeros((SIZE, SIZE, 3), np.float32)
    if name.startswith("plain "):
        return mix(PLAIN[name[6:]], PLAIN[name[6:]])
    ground = (np.arange(SIZE) >= 60)[:, None, None]
    if name == "grass":
        return np.where(ground, mix((120, 196, 84), (84, 160, 60)), mix((150, 206, 250), (214, 238, 255)))
    if name == "beach":
        sea = (np.arange(SIZE) >= 48)[:, None, None]
        return np.where((np.arange(SIZE) >= 66)[:, None, None], mix((236, 214, 160), (226, 200, 140)), np.where(sea, mix((60, 140, 210), (60, 140, 210)), mix((160, 212, 250), (210, 236, 255))))
    if name == "night":
        sky = mix((14, 18, 52), (34, 34, 86))
        stars = np.random.default_rng(7).integers(2, SIZE - 2, (26, 2))
        sky[stars[:, 0], stars[:, 1]] = .95
        return sky
    if name == "water":
        return mix((74, 176, 222), (16, 76, 150))
    if name == "snow":
        return np.where(ground, mix((250, 252, 255), (232, 240, 250)), mix((186, 206, 228), (222, 232, 244)))
    if name == "sunset":
        return np.where(ground, mix((84, 56, 88), (58, 40, 70)), mix((116, 76, 150), (255, 170, 80), np.clip(y * 1.6, 0, 1)))
    return np.where(ground, mix((232, 186, 110), (214, 160, 88)), mix((252, 226, 176), (255, 240, 206)))


def placements(scene: Scene, rng: random.Random | None = None) -> list[tuple[Part, int, int, int]]:
    """(part, centre x, centre y, pixels) of every sprite, with a little jitter if `rng` is given: with more, outlines come out wobbly."""
    total = sum(part.count for part in scene.parts)
    jitter = (lambda: rng.randint(-1, 1)) if rng else (lambda: 0)
    spots = [list(place) for place in PLACES[total]]
    sizes = [PIXELS[total]] * total
    parts = [part for part in scene.parts for _ in range(part.count)]
    if scene.kind == "single":
        sizes = [{"normal": 64, "small": 34, "big": 88}[parts[0].size]]
        if scene.position:
            column, row, _ = POSITIONS[scene.position]
            spots = [[(20, 48, 76)[column], (20, 48, 76)[row]]]
    if scene.kind == "two":
        sizes = [{"normal": 40, "small": 28, "big": 52}[part.size] for part in parts]
        if scene.relation in ("above", "below"):
            spots = [[48, 26], [48, 70]]
        if scene.relation in ("right", "below"):
            spots.reverse()
    return [(part, x + jitter(), y + jitter(), size) for part, (x, y), size in zip(parts, spots, sizes)]


def draw(scene: Scene, rng: random.Random | None = None) -> np.ndarray:
    """The picture, (96, 96, 3) uint8."""
    image = background(scene.background).copy()
    for part, x, y, pixels in placements(scene, rng):
        art = sprite(part.thing, part.color, pixels)
        left, top = x - pixels // 2, y - pixels // 2
        l, t, r, b = max(left, 0), max(top, 0), min(left + pixels, SIZE), min(top + pixels, SIZE)
        crop = art[t - top:b - top, l - left:r - left]
        image[t:b, l:r] = image[t:b, l:r] * (1 - crop[..., 3:]) + crop[..., :3]
    return (image.clip(0, 1) * 255 + .5).astype(np.uint8)

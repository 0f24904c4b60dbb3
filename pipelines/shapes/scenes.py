"""Scenes of one or two coloured shapes: sampling them, naming them in a caption, drawing them.

    rng = random.Random(0)
    scene = sample_scene(rng)
    scene.caption()                     # "a red circle below a blue square on a gray background"
    image = render(scene, rng)          # PIL, 64 x 64

A caption names the first thing, then its relation to the second. In "a red circle below a blue square" the circle is
mentioned first but is the second thing from the top. The order of the words is therefore not the order in the image,
and a text encoder that only counts words cannot place the things. Some things have an invented noun instead of a colour
and a shape ("a palu"). The nouns are sampled by Zipf's law, so that some are common and some are rare.
"""

import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

SIZE = 64
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 175, 60),
    "blue": (45, 80, 225),
    "yellow": (240, 210, 40),
    "purple": (165, 50, 205),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "ring")
RELATIONS = ("above", "below", "left of", "right of")
BACKGROUNDS = {"black": (0, 0, 0), "gray": (110, 110, 110)}
HELD_OUT = (("yellow", "ring"), ("purple", "triangle"))  # never drawn or named in training

_OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Thing:
    """One coloured shape. `noun` is the invented word that stands for colour and shape in a caption, if any."""

    color: str
    shape: str
    noun: str | None = None

    def words(self) -> str:
        return f"a {self.noun}" if self.noun else f"a {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing, or two things and the relation of the first to the second, on a background."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    def caption(self, background: bool = True) -> str:
        """Return the scene in words, with or without its background."""
        words = f" {self.relation} ".join(thing.words() for thing in self.things)
        return f"{words} on a {self.background} background" if background else words

    def told_from(self, place: int) -> "Scene":
        """Return the same scene with a caption that begins with the thing at the first place (0: "A above B") or at
        the second place (1: "B below A")."""
        if self.relation is None or (self.relation in ("below", "right of")) == bool(place):
            return self
        return Scene(self.things[::-1], _OPPOSITE[self.relation], self.background)

    def canonical(self) -> "Scene":
        """Return the same scene in its canonical form: no nouns, and described from the first place, so that
        "A below B" becomes "B above A"."""
        told = self.told_from(0)
        return replace(told, things=tuple(replace(thing, noun=None) for thing in told.things))


def _invent_nouns() -> dict[str, Thing]:
    """Return 48 two-syllable nouns, most common first, each for a colour and shape that training may show."""
    syllables = [c + v for c in ("p", "l", "m", "t", "k", "z", "v", "d") for v in ("a", "u", "o", "i")]
    rng = random.Random(48)
    words = sorted({a + b for a in syllables for b in syllables if a != b})
    nouns = rng.sample(words, 48)
    pairs = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT]
    rng.shuffle(pairs)
    return {noun: Thing(*pairs[i % len(pairs)], noun) for i, noun in enumerate(nouns)}


NOUNS = _invent_nouns()
_ZIPF = [1 / rank for rank in range(1, len(NOUNS) + 1)]
WORDS = sorted(
    {"a", "on", "background", "of", *COLORS, *SHAPES, *BACKGROUNDS, *NOUNS, "above", "below", "left", "right"}
)


def sample_thing(rng: random.Random, noun_rate: float, held_out: bool | None = False) -> Thing:
    """Sample a thing, with an invented noun with probability `noun_rate`.

    `held_out=True` samples only held-out pairs of colour and shape, False only other pairs, and None any pair."""
    if rng.random() < noun_rate:
        return rng.choices(list(NOUNS.values()), weights=_ZIPF)[0]
    if held_out:
        return Thing(*rng.choice(HELD_OUT))
    while True:
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        if held_out is None or (color, shape) not in HELD_OUT:
            return Thing(color, shape)


def sample_scene(rng: random.Random, two: float = 0.7, noun_rate: float = 0.0, held_out: bool | None = False) -> Scene:
    """Sample a scene, of two things with probability `two`. The things always differ in colour or shape.

    With `held_out=True` the first thing is a held-out pair of colour and shape."""
    things = [sample_thing(rng, noun_rate, held_out)]
    relation = None
    if rng.random() < two:
        relation = rng.choice(RELATIONS)
        while len(things) < 2:
            other = sample_thing(rng, noun_rate, None if held_out is None else False)
            if (other.color, other.shape) != (things[0].color, things[0].shape):
                things.append(other)
    return Scene(tuple(things), relation, rng.choice(list(BACKGROUNDS)))


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: tuple[float, ...], color, ground) -> None:
    """Draw `shape` to fill `box` (left, top, right, bottom, in pixels) in `color`. `ground` shows through a ring."""
    left, top, right, bottom = box
    if shape == "square":
        draw.rectangle(box, fill=color)
    elif shape == "triangle":
        draw.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=color)
    else:
        draw.ellipse(box, fill=color)
    if shape == "ring":
        dx, dy = (right - left) * 0.24, (bottom - top) * 0.24
        draw.ellipse((left + dx, top + dy, right - dx, bottom - dy), fill=ground)


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Return an image of the scene (RGB, 64 x 64, antialiased). `rng` varies the sizes and places."""
    ground = BACKGROUNDS[scene.background]
    scale = SIZE * _SUPERSAMPLE
    image = Image.new("RGB", (scale, scale), ground)
    draw = ImageDraw.Draw(image)
    canonical = scene.canonical()
    for place, thing in enumerate(canonical.things):
        along = 0.5 if canonical.relation is None else (0.27, 0.73)[place]
        along += rng.uniform(-0.05, 0.05)
        across = 0.5 + rng.uniform(-0.12, 0.12)
        x, y = (across, along) if canonical.relation == "above" else (along, across)
        radius = rng.uniform(0.135, 0.18)
        box = tuple(v * scale for v in (x - radius, y - radius, x + radius, y + radius))
        draw_shape(draw, thing.shape, box, COLORS[thing.color], ground)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)

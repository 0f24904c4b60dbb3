"""What is right in a picture: what the reader sees in it against the scene that was asked for, part by part.

score(scene, read(image))       # {"first object": True, "second object": False, "colors": False, …}
"""

from dataclasses import replace

from diffsight.pipelines.shapes.scenes import Scene, Thing


def score(asked: Scene, seen: Scene | None) -> dict[str, bool]:
    """Which parts of `asked` are right in `seen`. First is what the caption names first.

    "first object", "second object": a thing of its colour and its shape is seen, wherever it stands. "colors": the
    colours seen are those asked for, whichever thing has which. "relation": the shapes stand as told (where both are
    the same shape, the colours). "background": its colour. "scene": the things and their relation, and nothing else, on
    any background. One thing has no second object and no relation.
    """
    wanted = [replace(thing, noun=None) for thing in asked.things]
    things = list(seen.things) if seen is not None else []
    right, rest = {}, list(things)
    for name, thing in zip(("first object", "second object"), wanted):
        right[name] = thing in rest
        if thing in rest:
            rest.remove(thing)
    right["colors"] = sorted(thing.color for thing in wanted) == sorted(thing.color for thing in things)
    canonical = asked.canonical()
    relation = seen.relation if seen is not None else None
    if asked.relation is not None:
        name = "shape" if wanted[0].shape != wanted[1].shape else "color"
        right["relation"] = relation == canonical.relation and _each(things, name) == _each(canonical.things, name)
    right["background"] = seen is not None and seen.background == asked.background
    right["scene"] = relation == canonical.relation and things == list(canonical.things)
    return right


def _each(things: list[Thing] | tuple[Thing, ...], name: str) -> list[str]:
    return [getattr(thing, name) for thing in things]

"""Score an image: compare what the reader sees in it with the scene that was asked for, part by part.

score(scene, read_scene(image))       # {"first object": True, "second object": False, "colors": False, …}
"""

from dataclasses import replace

from diffsight.pipelines.shapes.scenes import Scene, Thing


def score(asked: Scene, seen: Scene | None) -> dict[str, bool]:
    """Return which parts of the scene `asked` are right in the scene `seen`.

    - "first object", "second object", in the order of the caption: a thing of this colour and shape is seen anywhere.
      A scene of one thing has no second object.
    - "colors": the colours seen are those asked for, whichever thing has which.
    - "relation": the shapes are placed as in the caption (the colours, if both have the same shape). A scene of one
      thing has no relation.
    - "background": the background has the right colour.
    - "scene": exactly the things asked for are seen, in the right relation, on any background.
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

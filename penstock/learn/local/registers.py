"""Pages that are made up: a list of things, and below it what it says of them, told again line by line.

Who has learned to fill in a page's lower half looks things up in its upper half; whether a model has is told by `facts`
masked alone. Words, numbers and their order are drawn; no two pages
are expected to be equal. Every word is ours: Apache-2.0.
"""

from __future__ import annotations

import random
import re

from penstock.learn.local.corpus import Document

THINGS = (
    "amber apron arrow barrel basket beacon bell bench blanket bolt bottle bridle broom bucket button cable candle "
    "canvas carpet chain chisel clock cloak coin compass copper cradle crate crystal cup curtain cushion dagger desk "
    "drum easel engine feather fiddle flag flask flute fork funnel garland gate gear glove goblet hammer harness hinge "
    "hook horn jar kettle key kite ladder lamp lantern lens lever lock loom mantle map marble mirror mitten needle net "
    "oar oven paddle pallet panel parcel pencil pillow pitcher plank plough pocket pulley quill quilt racket ribbon "
    "rivet rope rudder saddle sail sandal scarf shovel sieve sledge spade spindle spool stool tablet thimble thread "
    "tile torch trowel trumpet tunic valve varnish vase vessel violin wagon wheel whistle window wrench"
).split()
COLOURS = "red blue green black white brown grey yellow purple orange".split()
STORES = "north south east west old new upper lower".split()
RECAPS = ("Shelves", "Colours", "Counts")


def pages(count: int, *, seed: int, name: str = "registers") -> list[Document]:
    """So many documents, drawn from `seed` and `name`."""
    chooser = random.Random(f"{seed} {name}")
    return [Document(f"{name}/{at:06d}", page(chooser), "pages") for at in range(count)]


def page(chooser: random.Random) -> str:
    things = chooser.sample(THINGS, chooser.randint(5, 10))
    facts = {
        "Shelves": [str(chooser.randint(1, 9)) for _ in things],
        "Colours": [chooser.choice(COLOURS) for _ in things],
        "Counts": [str(chooser.randint(10, 99)) for _ in things],
    }
    lines = [f"Stock of the {chooser.choice(STORES)} store\n"]
    for at, thing in enumerate(things):
        shelf, colour, count = (facts[recap][at] for recap in RECAPS)
        lines.append(f"- {thing}: {count} {colour}, shelf {shelf}")
    lines.append("")
    for recap in chooser.sample(RECAPS, len(RECAPS)):
        told = ", ".join(
            [f"{thing} {fact}" for thing, fact in zip(things, facts[recap], strict=True)]
        )
        lines.append(f"{recap}: {told}.")
    return "\n".join(lines) + "\n"


def halves(text: str) -> tuple[str, str]:
    """A page's list with the name of the first recap behind it, and all that follows."""
    head, gap, rest = text.partition("\n\n- ")
    listed, end, recaps = rest.partition("\n\n")
    first, colon, told = recaps.partition(":")
    return head + gap + listed + end + first + colon, told


def facts(text: str) -> list[list[tuple[int, int]]]:
    """Where the facts of each recap stand, with the space before them: (start, end) of characters."""
    told = len(text) - len(halves(text)[1])
    found = []
    for recap in RECAPS:
        start = text.index(f"{recap}:", text.rindex("\n\n", 0, told)) + len(recap) + 1
        line = text[start : text.index("\n", start)]
        matches = re.finditer(r"[a-z]+( \w+)[,.]", line)
        found.append([(start + one.start(1), start + one.end(1)) for one in matches])
    return found

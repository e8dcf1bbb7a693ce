"""What the demo model is asked about scenes, in several wordings each, and what is right.

Every type is a function of the scenes before the model; it returns nothing where it cannot be asked. The names in
`SINGLE` and `SEVERAL` are the question types that the model card reports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from demo.training.material import ICON_NAMES, class_name
from demo.training.scenes import Scene, Thing

ORDINALS = ["first", "second", "third", "fourth"]
MAX_ADDENDS = 4
NOTHING = "nothing"


@dataclass(frozen=True)
class Turn:
    """One question, its type, and the whole right answer."""

    type: str
    question: str
    answer: str


Ask = Callable[[Sequence[Scene], np.random.Generator], Turn | None]

READ_ONE = [
    "What digit is this?", "Which digit is this?", "Which digit do you see?", "Read the digit.",
    "What number is shown in the picture?", "Which number do you see?", "Name the handwritten digit.",
]  # fmt: skip
READ = [
    "Read the digits from left to right.", "Which digits do you see, from left to right?", "Read the digits.",
    "Which digits are these?", "What digits are in the picture?", "Please read the numbers in this image.",
    "Name the handwritten digits from left to right.",
]  # fmt: skip
ADD = [
    "Add the digits.", "What is the sum of the digits?", "Add up all the digits in the picture.",
    "What do the digits add up to?", "Please add the numbers.", "What is the total of the digits?",
]  # fmt: skip
NAME = [
    "What is this?", "Which icon is this?", "Name the icon.", "Which icon do you see?", "What does the icon show?",
    "What is the icon in the picture?",
]  # fmt: skip
NAME_ALL = [
    "Name the icons from left to right.", "Which icons do you see, from left to right?", "Name the icons.",
    "Which icons are in the picture?", "List the icons from left to right.",
]  # fmt: skip
LIST = [
    "What do you see, from left to right?", "What is in this picture?", "Describe the image.",
    "List everything from left to right.", "What do you see?", "Name all objects from left to right.",
]  # fmt: skip
COUNT = [
    "How many {} are there?", "How many {} do you see?", "Count the {}.", "How many {} are in the picture?",
    "What is the number of {}?", "Please count the {} in this image.",
]  # fmt: skip
COLOUR = [
    "What colour is the background?", "Which colour is the background?", "Name the background colour.",
    "What is the colour of the background?", "What color is the background?", "On which colour is this drawn?",
]  # fmt: skip
SIDE = [
    "What is {side} of {what}?", "What is directly {side} of {what}?", "Which object is {side} of {what}?",
    "What stands {side} of {what}?", "Name what is {side} of {what}.",
]  # fmt: skip
SIDE_FOLLOWS = ["And what is {side} of it?", "What is {side} of it?", "And {side} of it?"]
SIDES = {"left": ["left", "to the left"], "right": ["right", "to the right"]}
WHICH = [
    "Which picture shows {what}?", "In which picture is {what}?", "Which image shows {what}?",
    "Where is {what}, in which picture?", "Which of the pictures contains {what}?",
]  # fmt: skip
READ_EACH = [
    "Which digits are in the pictures?", "Which digits, picture by picture?", "Read the digits, picture by picture.",
    "Read the digits in each picture.", "Which digits does each picture show?",
]  # fmt: skip
COLOUR_EACH = [
    "What colours are the backgrounds?", "Name the background colours, picture by picture.",
    "Which colour is the background of each picture?", "What is the background colour of each picture?",
]  # fmt: skip
IRREGULAR = {
    "fox": "foxes", "fish": "fish", "octopus": "octopuses", "butterfly": "butterflies", "grapes": "grapes",
    "strawberry": "strawberries", "cherries": "cherries", "bus": "buses", "cactus": "cactuses",
    "glasses": "glasses", "scissors": "scissors", "dice": "dice",
}  # fmt: skip


def listing(items: Sequence[object]) -> str:
    """Join items as answers do: `7`, `3 and 8`, `3, 8 and 1`; nothing at all is `none`."""
    *head, last = [str(item) for item in items] or ["none"]
    return f"{', '.join(head)} and {last}" if head else last


def plural(name: str) -> str:
    """Return an icon's plural."""
    return IRREGULAR.get(name, name + "s")


def _pick(wordings: Sequence[str], rng: np.random.Generator) -> str:
    return wordings[int(rng.integers(len(wordings)))]


def _digits(scene: Scene) -> list[int]:
    return [thing.kind for thing in scene.things if thing.is_digit]


def _icons(scene: Scene) -> list[str]:
    return [class_name(thing.kind) for thing in scene.things if not thing.is_digit]


def read_one(scenes: Sequence[Scene], rng: np.random.Generator) -> Turn | None:
    """Read the only digit, whatever else is there."""
    digits = _digits(scenes[0])
    return Turn("read one digit", _pick(READ_ONE, rng), str(digits[0])) if len(digits) == 1 else None


def read(scenes: Sequence[Scene], rng: np.random.Generator) -> Turn | None:
    """Read the digits from left to right."""
    digits = _digits(scenes[0])
    return Turn("read the digits", _pick(READ, rng), listing(digits)) if len(digits) > 1 or rng.random() < 0.1 else None


def add(scenes: Sequence[Scene], rng: np.random.Generator) -> Turn | None:
    """Add two to four digits; the answer shows its working."""
    digits = _digits(scenes[0])
    if not 2 <= len(digits) <= MAX_ADDENDS:
        return None
    return Turn("add the digits", _pick(ADD, rng), f"{' + '.join(map(str, digits))} = {sum(digits)}")


def name(scenes: Sequence[Scene], rng: np.random.Generator) -> Turn | None:
    """Name the only icon; `What is this?` is asked where nothing else is there."""
    icons = _icons(scenes[0])
    if len(icons) != 1:
        return None
    return Turn("name the icon", _pick(NAME if len(scenes[0].things) == 1 else NAME[1:], rng), icons[0])


def name_all(scenes: Sequence[Scene], rng: np.random.Generator) -> Turn | None:
    """Name the icons from left to right."""
    icons = _icons(scenes[0])
    if len(icons) < 2 and rng.random() > 0.05:
        return None
    return Turn("name the icons", _pick(NAME_ALL, rng), listing(icons))


def list_all(scenes: Sequence[Scene], rng: np.random.Generator) -> Turn | None:
    """Name digits and icons alike."""
    return Turn("list everything", _pick(LIST, rng), listing([class_name(thing.kind) for thing in scenes[0].things]))


def count(scenes: Sequence[Scene], rng: np.random.Generator) -> Turn | None:
    """Count objects, digits, icons, or those of one kind, which need not be there at all."""
    scene, chance = scenes[0], rng.random()
    if chance < 0.5:
        what, number = [
            ("objects", len(scene.things)), ("digits", len(_digits(scene))), ("icons", len(_icons(scene)))
        ][rng.integers(3)]  # fmt: skip
    else:
        present = [thing.kind for thing in scene.things]
        kind = int(rng.choice(present)) if rng.random() < 0.8 else int(rng.integers(10 + len(ICON_NAMES)))
        what, number = plural(class_name(kind)), present.count(kind)
    return Turn("count", _pick(COUNT, rng).format(what), str(number))


def colour(scenes: Sequence[Scene], rng: np.random.Generator) -> Turn | None:
    """Name the background's colour."""
    return Turn("background colour", _pick(COLOUR, rng), scenes[0].colour)


def side(scenes: Sequence[Scene], rng: np.random.Generator) -> Turn | None:
    """Name the next object to the left or right of one that is there once."""
    things = scenes[0].things
    single = [i for i, thing in enumerate(things) if _is_unique(thing, things)]
    if not single or len(things) < 2:
        return None
    index = int(rng.choice(single))
    return _side_turn(things, index, "the " + class_name(things[index].kind), SIDE, rng)


def side_follows(turn: Turn, scene: Scene, rng: np.random.Generator) -> Turn | None:
    """Ask what is beside the one object that the last answer named."""
    named = [i for i, thing in enumerate(scene.things) if class_name(thing.kind) == turn.answer]
    if len(named) != 1 or turn.type == "count" or len(scene.things) < 2:
        return None
    return _side_turn(scene.things, named[0], "it", SIDE_FOLLOWS, rng)


def _side_turn(things: list[Thing], index: int, what: str, wordings: list[str], rng: np.random.Generator) -> Turn:
    direction = "left" if rng.random() < 0.5 else "right"
    other = index + (-1 if direction == "left" else 1)
    answer = class_name(things[other].kind) if 0 <= other < len(things) else NOTHING
    return Turn("left or right", _pick(wordings, rng).format(side=_pick(SIDES[direction], rng), what=what), answer)


def _is_unique(thing: Thing, things: Sequence[Thing]) -> bool:
    return sum(other.kind == thing.kind for other in things) == 1


def which(scenes: Sequence[Scene], rng: np.random.Generator) -> Turn | None:
    """Say which picture shows what only one of them shows."""
    kinds = [{thing.kind for thing in scene.things} for scene in scenes]
    single = [(i, kind) for i, here in enumerate(kinds) for kind in here if sum(kind in k for k in kinds) == 1]
    if not single:
        return None
    index, kind = single[rng.integers(len(single))]
    return Turn("which picture", _pick(WHICH, rng).format(what="the " + class_name(kind)), f"the {ORDINALS[index]}")


def read_each(scenes: Sequence[Scene], rng: np.random.Generator) -> Turn | None:
    """Read the digits of every picture."""
    digits = [_digits(scene) for scene in scenes]
    if sum(map(len, digits)) == 0:
        return None
    return Turn("digits, picture by picture", _pick(READ_EACH, rng), _each([listing(here) for here in digits]))


def colour_each(scenes: Sequence[Scene], rng: np.random.Generator) -> Turn | None:
    """Name the background colour of every picture."""
    colours = [scene.colour for scene in scenes]
    return Turn("colours, picture by picture", _pick(COLOUR_EACH, rng), _each(colours))


def _each(answers: list[str]) -> str:
    return "; ".join(f"{ordinal}: {answer}" for ordinal, answer in zip(ORDINALS, answers, strict=False))


SINGLE: dict[str, Ask] = {
    "read one digit": read_one,
    "read the digits": read,
    "add the digits": add,
    "name the icon": name,
    "name the icons": name_all,
    "list everything": list_all,
    "count": count,
    "background colour": colour,
    "left or right": side,
}
SEVERAL: dict[str, Ask] = {
    "which picture": which,
    "digits, picture by picture": read_each,
    "colours, picture by picture": colour_each,
}
TWO_TURNS = "two-turn chat"
TYPES = [*SINGLE, *SEVERAL, TWO_TURNS]
REPEATABLE = {"count", "left or right", "which picture"}
SINGLE_WEIGHTS = [1.0, 1.4, 1.4, 1.0, 1.0, 1.4, 3.0, 0.5, 6.0]
SEVERAL_WEIGHTS = [3.0, 1.2, 0.5]


def random_kinds(rng: np.random.Generator, max_objects: int) -> list[int]:
    """Draw what a scene holds: digits, icons or both, sometimes several of a kind."""
    share = rng.choice([1.0, 0.0, 0.5], p=[0.3, 0.2, 0.5])
    kinds: list[int] = []
    for _ in range(rng.integers(1, max_objects + 1)):
        if kinds and rng.random() < 0.15:
            kinds.append(int(rng.choice(kinds)))
        else:
            kinds.append(int(rng.integers(10) if rng.random() < share else rng.integers(10, 10 + len(ICON_NAMES))))
    return kinds


def random_turns(scenes: Sequence[Scene], num_turns: int, rng: np.random.Generator) -> list[Turn]:
    """Ask `num_turns` questions, one after another, about one scene or several; follow-ups say `it`."""
    asks, weights = (SINGLE, SINGLE_WEIGHTS) if len(scenes) == 1 else (SEVERAL, SEVERAL_WEIGHTS)
    functions, chances = list(asks.values()), np.array(weights) / sum(weights)
    turns: list[Turn] = []
    for _ in range(8 * num_turns):
        turn = None
        if turns and len(scenes) == 1 and rng.random() < 0.35:
            turn = side_follows(turns[-1], scenes[0], rng)
        turn = turn or functions[rng.choice(len(functions), p=chances)](scenes, rng)
        if turn and (turn.type in REPEATABLE or all(turn.type != earlier.type for earlier in turns)):
            turns.append(turn)
        if len(turns) == num_turns:
            break
    return turns


def all_wordings() -> list[str]:
    """Return every wording, its gaps filled: the corpus of the tokenizer."""
    plain = READ_ONE + READ + ADD + NAME + NAME_ALL + LIST + COLOUR + READ_EACH + COLOUR_EACH
    counted = [wording.format(what) for wording in COUNT for what in ("objects", "digits", "icons", "7s")]
    sides = [
        wording.format(side=word, what="the 7")
        for wording in SIDE + SIDE_FOLLOWS
        for words in SIDES.values()
        for word in words
    ]
    return plain + counted + sides + [wording.format(what="the 7") for wording in WHICH]

"""The demo's task: a café order in words becomes one line of strict JSON. Generated, seeded, endless.

    "Hi, it's Marta. Could I get two green teas and an apple cake for half past nine? I'll pick it up."
    {"name":"Marta","items":{"green tea":2,"apple cake":1},"time":"09:30","pickup":true}

Training and held-out rows are disjoint by construction: no name and no word of an item in the held-out part
ever occurs in training, so a model that scores there has learned to read an order, not to remember one.
Knows no model and no tokenizer; standard library only. Writes the files: `python tools/demo_task.py demo`.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that a Python that is too old can still read this file, and be told so
    Message = dict[str, str]
    Row = dict[str, list[Message]]

TRAINING_ROWS = 768
HELD_OUT_ROWS = 64

SYSTEM = "Order to JSON."
SCHEMA = (
    "Turn the order into one line of JSON and write nothing else. Keys, in this order: "
    '"name" (who orders), "items" (an object: each item in the singular, and its count as a number), '
    '"time" (24-hour, "HH:MM"; times in words are in the morning), '
    '"pickup" (true if it is picked up, false if it is delivered). '
    'Example: {"name":"Eva","items":{"plain toast":2},"time":"08:15","pickup":false}'
)


@dataclass(frozen=True)
class Words:
    """What one part of the task is made of."""

    names: tuple[str, ...]
    menus: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    """Pairs of (kinds, things); an item is one kind and one thing, the plural takes an s."""

    @property
    def items(self) -> tuple[str, ...]:
        """Every item that can be ordered."""
        return tuple(f"{kind} {thing}" for kinds, things in self.menus for kind in kinds for thing in things)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# The held-out words are everyday ones, one or two tokens each for the demo's model: the task is to read an
# order, not to spell.
TRAINING = Words(
    names=_words(
        "Marta Jonas Aisha Pedro Lena Omar Ruth Felix Nadia Bruno Clara Viktor Sofia Hugo Amira Paul "
        "Greta Samir Julia Leon Anton Fatima Oscar Helena Yusuf Emma Lukas Rosa Karim Laura Zoe Mikael "
        "Tariq Eliza Marco Leila Olga Carlos Hanna Diana James Mary Adam Alice Jane Mark Ali Maya Sam "
        "Jack Ben Alex Louis William Nina Ivan Elena Victor Chen Grace Ella Ryan Kevin Linda Susan Karen "
        "Brian Steve Sophie Lisa Amy Rachel Rebecca Kate Lucy Eric Tom Nora Petra Boris Carmen Diego "
        "Esther Farid Gloria Hassan Ida Jorge Katya Liam Miriam Nils Otto Paula Quentin Rita Selma Theo "
        "Ursula Vera Wanda Xenia Yoko Zara Dmitri Salma Ravi Anjali Kofi Amara Sven Astrid Luca Chiara "
        "Pierre Claire Akira Hiro Mei Ling Ingrid Tomas Priya Walter Noemi Ahmed Bianca Stefan Yara "
        "Gustav Irene Mateo Dalia Henrik Teresa Rafael Mona Ulrich Celine Javier"
    ),
    menus=(
        (
            _words(
                "large hot iced vanilla green cherry ginger lemon small black white strong weak sweet "
                "double rose berry plum apple milk"
            ),
            _words("tea juice soda smoothie coffee cocoa latte cider mocha punch cup espresso"),
        ),
        (
            _words(
                "chicken tomato cheese onion bean potato spinach fish beef pork lamb egg pepper olive "
                "tofu herb cabbage lentil mushroom duck"
            ),
            _words("soup pie wrap salad roll bowl burger taco toast omelet bagel noodle sausage dumpling"),
        ),
        (
            _words(
                "butter honey almond chocolate coconut plain sugar walnut caramel maple pecan oat fig "
                "date raspberry blueberry lime cream"
            ),
            _words("cake cookie bar bun muffin waffle pancake scone donut brownie cracker pretzel"),
        ),
    ),
)
HELD_OUT = Words(
    names=_words(
        "Robert Simon Peter Daniel Sarah David Maria Anna Frank Martin Andrew Michael Emily Charles "
        "George Henry Jacob Joseph Thomas Edward"
    ),
    menus=(
        (_words("mint cold mango peach"), _words("lemonade bottle shake")),
        (_words("turkey salmon rice corn garlic"), _words("stew plate basket steak")),
        (_words("carrot cinnamon orange banana"), _words("tart slice stick")),
    ),
)

HOURS = _words("one two three four five six seven eight nine ten eleven twelve")
OPENINGS = (
    "Hi, it's {name}.", "This is {name}.", "{name} here.", "Hi, {name} here.",
    "Hello, {name} again.", "My name is {name}.", "Order for {name}:", "It's {name}.",
)  # fmt: skip
REQUESTS = (
    "Could I get {items} {when}?", "I'd like {items} {when}.", "Can you make {items} {when}?",
    "I need {items} {when}.", "Please prepare {items} {when}.", "{When}, {items} please.",
    "We want {items} {when}.", "Put me down for {items} {when}.",
)  # fmt: skip
PICKUPS = ("Pick-up.", "I'll pick it up.", "For pick-up.", "We pick it up.", "Pick-up, please.")
DELIVERIES = ("Delivery.", "Please deliver it.", "For delivery.", "Deliver it to us.", "Delivery, please.")


def make_rows(count: int, seed: int, *, held_out: bool) -> list[Row]:
    """Distinct orders in chat form: a short system message, the order, the JSON.

    Args:
        count: How many.
        seed: The same seed gives the same rows.
        held_out: Draw names and items from the part that training never sees.
    """
    draw = random.Random(f"{seed} {'held out' if held_out else 'training'}")
    words = HELD_OUT if held_out else TRAINING
    rows: dict[str, Row] = {}
    while len(rows) < count:
        order, answer = _order(draw, words)
        rows[order] = {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": order},
                {"role": "assistant", "content": answer},
            ]
        }
    return list(rows.values())


def _order(draw: random.Random, words: Words) -> tuple[str, str]:
    name = draw.choice(words.names)
    items = draw.sample(words.items, draw.choice((1, 1, 2)))
    counts = [draw.choice((1, 1, 2, 2, 3, 4, 5, 6)) for _ in items]
    said_time, time = _time(draw)
    pickup = draw.random() < 0.5
    said_items = " and ".join(_said(draw, item, count) for item, count in zip(items, counts, strict=True))
    when = f"{draw.choice(('for', 'at', 'by'))} {said_time}"
    sentences = (
        draw.choice(OPENINGS).format(name=name),
        draw.choice(REQUESTS).format(items=said_items, when=when, When=when[0].upper() + when[1:]),
        draw.choice(PICKUPS if pickup else DELIVERIES),
    )
    answer = {
        "name": name,
        "items": dict(zip(items, counts, strict=True)),
        "time": time,
        "pickup": pickup,
    }
    return " ".join(sentences), json.dumps(answer, separators=(",", ":"))


def _said(draw: random.Random, item: str, count: int) -> str:
    if count == 1:
        article = "an" if item[0] in "aeiou" else "a"
        return f"{draw.choice((article, 'one', '1'))} {item}"
    spoken = [HOURS[count - 1], str(count)]
    if count == 2:
        spoken.append("a couple of")
    return f"{draw.choice(spoken)} {item}s"


def _time(draw: random.Random) -> tuple[str, str]:
    """A time as said, and as written; words and `am` mean the morning."""
    form = draw.choice(("o'clock", "half past", "figures", "figures", "dotted", "am"))
    if form == "o'clock":
        hour = draw.randint(7, 12)
        return f"{HOURS[hour - 1]} o'clock", f"{hour:02d}:00"
    if form == "half past":
        hour = draw.randint(7, 12)
        return f"half past {HOURS[hour - 1]}", f"{hour:02d}:30"
    hour, minute = draw.randint(7, 11 if form == "am" else 18), draw.choice((0, 15, 30, 45))
    written = f"{hour:02d}:{minute:02d}"
    if form == "am":
        return (f"{hour} am" if minute == 0 else f"{hour}:{minute:02d} am"), written
    return f"{hour}{'.' if form == 'dotted' else ':'}{minute:02d}", written


def write_task(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `held_out.jsonl` into the folder, and returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = (("train.jsonl", TRAINING_ROWS, False), ("held_out.jsonl", HELD_OUT_ROWS, True))
    paths = []
    for name, count, held_out in parts:
        lines = (json.dumps(row, ensure_ascii=False) for row in make_rows(count, seed, held_out=held_out))
        part = folder / f"{name}.part"
        part.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        paths.append(part.replace(folder / name))
    return paths[0], paths[1]


def prompt(row: Row) -> list[Message]:
    """What the tuned model is asked: the row without its answer."""
    return row["messages"][:-1]


def schema_prompt(row: Row) -> list[Message]:
    """What the base model is asked in fairness: the same order, with the schema spelled out."""
    return [{"role": "system", "content": SCHEMA}, row["messages"][1]]


def few_shot_prompt(row: Row) -> list[Message]:
    """The schema, and three solved orders from the training part as turns before the order."""
    examples = [turn for example in make_rows(3, 1, held_out=False) for turn in example["messages"][1:]]
    return [{"role": "system", "content": SCHEMA}, *examples, row["messages"][1]]


def is_exact(answer: str, row: Row) -> bool:
    """Whether the answer is the right JSON and nothing else: same values, same types, no text around it."""
    if not (answer.startswith("{") and answer.endswith("}")):
        return False
    try:
        given = json.loads(answer, object_pairs_hook=_without_repeats)
    except ValueError:
        return False
    expected = json.loads(row["messages"][-1]["content"])
    # As text, because Python's 1 == True and 2 == 2.0 would forgive a wrong type.
    return json.dumps(given, sort_keys=True) == json.dumps(expected, sort_keys=True)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def score(answers: list[str], rows: list[Row]) -> float:
    """Share of exact answers, 0 to 1."""
    return sum(is_exact(answer, row) for answer, row in zip(answers, rows, strict=True)) / len(rows)


if __name__ == "__main__":
    for path in write_task(Path(sys.argv[1] if len(sys.argv) > 1 else "demo")):
        print(path)

"""A small made-up file in HellaSwag's format: contexts, four endings, and the label."""

from __future__ import annotations

import json
import re
from typing import Any

from mlxgpt.utils.errors import UserError

# Context, label, four endings.
CASES: list[tuple[str, int, str, str, str, str]] = [
    (
        "A woman fills a kettle at the sink. she",
        2,
        "reads it a poem.",
        "sails away in the kettle towards an island that nobody has drawn on a map.",
        "sets it on the stove and lights the gas.",
        "is a sink.",
    ),
    (
        "Two boys stand at the edge of a frozen pond. one of them",
        0,
        "steps onto the ice with care.",
        "peels the pond like an orange.",
        "has been made of wood for ninety years.",
        "pond.",
    ),
    (
        "How to sharpen a pencil. Take the pencil in your left hand.",
        3,
        "Ask it for its name.",
        "Plant it in warm soil and wait until the autumn.",
        "Take the left hand in the pencil.",
        "Turn it inside the sharpener until the point is thin.",
    ),
    (
        "A dog runs after a ball in the park. it",
        1,
        "pays for the ball with two coins.",
        "brings the ball back and drops it in the grass.",
        "votes.",
        "parks the ball between two dogs.",
    ),
    (
        "The man opens a tin of blue paint.",
        0,
        "He stirs it with a stick, and dips a brush in it.",
        "He drinks a mountain.",
        "The tin opens the man, who is blue, and paints what it finds there.",
        "He is nine.",
    ),
    (
        "How to plant a tulip. Dig a hole as deep as your hand.",
        2,
        "Sell the hole.",
        "Tell your hand that it is deep, and wait for an answer – it may take long.",
        "Lay the bulb in it and cover it with earth.",
        "Run from the tulip before it is too late.",
    ),
    (
        "A café fills with guests. the waiter",
        3,
        "melts.",
        "turns the guests off, one by one, at a switch beside the door.",
        "is filled with coffee.",
        "carries a tray to the table at the window.",
    ),
    (
        "A girl sits down at a piano. she",
        1,
        "eats the black keys first.",
        "puts her hands on the keys and begins to play.",
        "is a well known lake.",
        "sits up at a violin, down at a drum, and home.",
    ),
    (
        "Snow has fallen on the street.",
        2,
        "The street falls on the snow.",
        "It rings twice.",
        "A neighbour comes out with a shovel and clears the steps.",
        "Nobody has ever heard of stairs.",
    ),
    (
        "How to fold a letter. Lay the sheet flat on the table.",
        0,
        "Bring the lower edge up to the middle.",
        "Lay the table flat on the letter.",
        "Whistle.",
        "Wait for the sheet to fold you.",
    ),
    (
        "An old bus stops in front of the school. the children",
        1,
        "are driven by the bus to become buses, which takes eleven years.",
        "climb in and look for a seat.",
        "stop.",
        "sell the school.",
    ),
    (
        "A cook cracks three eggs into a bowl. he",
        3,
        "apologises to the fourth.",
        "becomes a bowl.",
        "hides in the eggs until the kitchen is closed and all the lamps are out.",
        "beats them with a fork.",
    ),
]


def make_example(number: int = 0) -> dict[str, Any]:
    """Return one line of the file as a dict."""
    context, label, *endings = CASES[number % len(CASES)]
    return {
        "ind": number,
        "activity_label": "Inventing",
        "ctx_a": context,
        "ctx_b": "",
        "ctx": context,
        "split": "val",
        "split_type": "zeroshot",
        "label": label,
        "endings": endings,
        "source_id": f"invented~{number}",
    }


EXAMPLES_JSONL = "".join(json.dumps(make_example(number)) + "\n" for number in range(len(CASES)))


def check_error_format(error: UserError, problem: str) -> None:
    """Check that the error names the problem in one line and the remedy in another."""
    assert re.search(problem, error.problem)
    for text in (error.problem, error.remedy):
        assert "\n" not in text
        assert 10 < len(text) < 250

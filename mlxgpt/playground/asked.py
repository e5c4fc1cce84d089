"""What a request asks for: JSON, each field of its type and within bounds, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from mlxgpt import files
from mlxgpt.errors import UserError

MOST_CHARACTERS = 100_000  # of a prompt
MOST_IDS = 20_000
MOST_TOKENS = 4_000  # of one text


@dataclass(frozen=True)
class Asked:
    """The fields of a request's body."""

    tree: Mapping[str, Any]

    @classmethod
    async def of(cls, request: Request) -> Asked:
        """A request's fields.

        Raises:
            UserError: if its body is no JSON object.
        """
        try:
            tree = files.parse_json((await request.body()).decode())
        except ValueError as error:
            raise UserError("the body is no JSON", "send an object.") from error
        if not isinstance(tree, dict):
            raise UserError("the body is no JSON object", "send one, such as {}.")
        return cls(tree)

    def text(self, name: str, default: str | None = None) -> str:
        """A field that is a text, of characters that UTF-8 has."""
        value = self.tree.get(name)
        value = default if value is None else value
        if not isinstance(value, str):
            raise UserError(f"{name} is no text", f'send "{name}": "…".')
        if len(value) > MOST_CHARACTERS:
            raise UserError(f"{name} is too long", f"send at most {MOST_CHARACTERS:,} characters.")
        return value.encode("utf-8", "replace").decode()

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A field that is a whole number between bounds."""
        value = self.tree.get(name)
        value = default if value is None else value
        if type(value) is not int or not low <= value <= high:
            raise UserError(f"{name} cannot be that", f"send a whole number, {low:,} to {high:,}.")
        return value

    def number(self, name: str) -> float | None:
        """A field that is a number, or not there."""
        value = self.tree.get(name)
        if value is not None and type(value) not in (int, float):
            raise UserError(f"{name} is no number", "send one, or leave it out.")
        return value

    def yes(self, name: str) -> bool:
        """A field that is true, or false, or not there."""
        value = self.tree.get(name)
        if value is not None and type(value) is not bool:
            raise UserError(f"{name} is neither true nor false", "send one of them.")
        return bool(value)

    def whole_numbers(self, name: str, most: int = MOST_IDS) -> list[int]:
        """A field that is a list of whole numbers that are no larger than any id."""
        value = self.tree.get(name)
        if not isinstance(value, list) or not all(
            type(one) is int and 0 <= one < 1 << 31 for one in value
        ):
            raise UserError(f"{name} is no list of ids", f'send "{name}": [1, 2, 3].')
        if len(value) > most:
            raise UserError(f"{name} is too long", f"send at most {most:,}.")
        return value

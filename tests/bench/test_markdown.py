from __future__ import annotations

from mlxgpt.bench import markdown


def test_numbers_have_three_digits() -> None:
    for number, text in (
        (123_456.0, "123,000"),
        (9_995.0, "10,000"),
        (999.6, "1,000"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.0, "1.00"),
        (0.01234, "0.0123"),
        (0.0, "0"),
    ):
        assert markdown.format_number(number) == text
    assert markdown.format_number(1_360, 2) == "1,400"

"""What all figures share: the colour of text on a colour, and text that runs right to left."""

from __future__ import annotations

import re

import pytest
from PIL import ImageColor

from superscopes_tl.figures import on_scale
from superscopes_tl.figures.grid import COLOR_SCALE, escape


def _luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2."""
    parts = [
        part / 3294.6 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4
        for part in ImageColor.getrgb(colour)
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


@pytest.mark.parametrize("scale", [COLOR_SCALE, "RdBu"])
def test_text_on_every_colour_has_the_contrast_of_wcag_aa(scale: str) -> None:
    """At least 4.5 : 1, at either end and between, and beyond the ends as at them."""
    for step in range(1001):
        background, ink = on_scale(2 + step / 1000, 2, 3, scale)
        low, high = sorted((_luminance(background), _luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (background, ink)
    assert on_scale(-9, 2, 3, scale) == on_scale(2, 2, 3, scale)
    assert on_scale(9, 2, 3, scale) == on_scale(3, 2, 3, scale)
    assert on_scale(2, 2, 2, scale) == on_scale(2.5, 2, 3, scale)


@pytest.mark.parametrize(
    ("text", "isolated"),
    [
        ("Pink Floyd", False), ("宮崎駿 😀 é 12 <b>", False), ("نجيب محفوظ", True),
        ("a ירושלים", True), ("a\u202eb", True), ("", False),
    ],
)  # fmt: skip
def test_text_that_runs_right_to_left_is_isolated(text: str, isolated: bool) -> None:
    """U+2068 and U+2069 stand around it, so that it turns nothing else round."""
    shown = escape(text)
    assert (shown[:1] + shown[-1:] == "\u2068\u2069") == isolated
    assert re.sub("[\u2068\u2069]", "", shown) == text.replace("<", "&lt;").replace(">", "&gt;")

"""docs/objectives.md shows what the code makes of a text."""

import pytest

from tests import drawings
from tests.drawings import BLOCK, OPTIONS, PAGE


def test_every_drawing_stands_on_the_page():
    assert sorted(match[1] for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))) == sorted(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_page_shows_what_the_code_makes(name, tmp_path):
    shown = {match[1]: match[2] for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))}
    assert drawings.draw(name, tmp_path) + "\n" == shown[name], "python -m tests.drawings writes the page anew"

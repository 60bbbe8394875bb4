"""The rule of the built-in preferences, part by part, and what is well formed."""

import pytest

from data.made.rule import FORM, HEDGES, MOST_WORDS, PARTS, broken_form, broken_parts, is_well_formed, keeps_rule

KEPT = "In json.decoder, strict defaults to True."


@pytest.mark.parametrize(("reply", "breaks"), [
    (KEPT, ""),
    ("json.decoder: strict defaults to True.", ""),
    ("strict defaults to True in json.decoder.", ""),
    ("", "module"),
    ("In this module, strict defaults to True.", "module"),
    ("In json, strict defaults to True.", "module"),
    ("In json.decoder.x, strict defaults to True.", "module"),
    ("In my.json.decoder, strict defaults to True.", "module"),
    ("In JSON.decoder, strict defaults to True.", "module"),
    ("In jsonXdecoder, strict defaults to True.", "module"),
    ("In json.decoders, strict defaults to True.", "module"),
    ("In json.decoder, I think strict defaults to True.", "hedge"),
    ("In json.decoder, strict may be True.", "hedge"),
    ("MAYBE strict defaults to True in json.decoder.", "hedge"),
    ("In json.decoder, may_open, maybe.x and might() are mayor.", ""),
    ("In json.decoder, x.may and _perhaps are unlikely.", ""),
    (" ".join(["json.decoder", *["a", "b"] * 6][:MOST_WORDS]) + ".", ""),
    (" ".join(["json.decoder", *["a", "b"] * 6][: MOST_WORDS + 1]) + ".", "length"),
    (" ".join(["I think", *["a", "b"] * 6]) + ".", "hedge length module"),
])  # fmt: skip
def test_parts_of_the_rule(reply, breaks):
    assert broken_parts(reply, "json.decoder") == set(breaks.split()) <= set(PARTS)
    assert keeps_rule(reply, "json.decoder") == (not breaks)


def test_every_hedge_is_found():
    for hedge in HEDGES:
        for reply in (f"{hedge.capitalize()} json: 3.", f"In json, 3, {hedge}."):
            assert broken_parts(reply, "json") == {"hedge"}, reply


@pytest.mark.parametrize(("reply", "breaks"), [
    (KEPT, ""),
    ("It is 3. It is in os.path.", ""),
    ("Is it 3? It is.", ""),
    ("In os, f returns '(' and \"]'\" and it's x[(0)].", ""),
    ("It had had one.", ""),
    ("", "sentences end"),
    ("It is.", "sentences"),
    ("It is 3. It is 4. It is 5.", "sentences"),
    ("It is so, is it?", "end"),
    ("It is so", "sentences end"),
    ("It is so...", "end"),
    ("It is so. ", "end"),
    ("It is f(x.", "brackets"),
    ("It is f(x]).", "brackets"),
    ("It is f)x(.", "brackets"),
    ("It is 'r.", "brackets"),
    ('It is "r.', "brackets"),
    ("It is `r.", "brackets"),
    ("It is very very very long.", "repetition"),
    ("It is It is long.", "repetition"),
    ("a b c d A b c d e.", "repetition"),
    ("a b c a b c d.", "repetition"),
    ("It is\nso long.", "characters"),
    ("It is so \ufffd long.", "characters"),
    ("It is so \x07 long.", "characters"),
])  # fmt: skip
def test_parts_of_a_form(reply, breaks):
    assert broken_form(reply) == set(breaks.split()) <= set(FORM)
    assert is_well_formed(reply) == (not breaks)

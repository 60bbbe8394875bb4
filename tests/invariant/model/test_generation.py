"""What holds for generated text whatever the weights: caches, windows, ends, beams and streams change nothing but speed."""

import itertools

import pytest
import torch
from torch import nn

import model.__main__
from model.beam import beam_search
from model.cache import Cache, CrossCache, LayerCache
from model.config import ConfigError
from model.decoding import Decoding
from model.generate import generate
from model.mask import Mask
from model.stopping import Stop
from model.streaming import TextStream
from tests.conftest import randomized, tiny_config
from tests.runs import command

GENERATING = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "t5", "t5-gated", "bart", "vaswani"]
CONTEXT = 32  # of tiny networks; the windows of mistral and qwen2 are 5 and 7


def padded_prompts(network: nn.Module, rows: int = 3, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.randint(3, 61, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    if network.config.architecture == "decoder":
        mask[0, :4] = 0
    else:
        mask[0, 5:] = 0
    return ids, mask


def depends_on_cache(network: nn.Module) -> bool:
    """Does sampling or a beam search give other tokens without the cache?"""
    ids, mask = padded_prompts(network)

    def sampled(use_cache: bool) -> torch.Tensor:
        options = {"max_new_tokens": 20, "top_k": 20, "generator": torch.Generator().manual_seed(3)}
        return generate(network, ids, attention_mask=mask, use_cache=use_cache, **options)

    def searched(use_cache: bool) -> torch.Tensor:
        options = {"max_new_tokens": 14, "beams": 3, "eos_id": 7}
        return beam_search(network, ids, attention_mask=mask, use_cache=use_cache, **options).tokens

    return not (torch.equal(sampled(True), sampled(False)) and torch.equal(searched(True), searched(False)))


@pytest.mark.parametrize("family", GENERATING)
def test_the_cache_changes_nothing(family):
    assert not depends_on_cache(randomized(tiny_config(family)))


UPDATE, INPUTS = LayerCache.update, Mask.attention_inputs


def forget_a_value(self, k_BGTK, v_BGTK):
    keys_BGSK, values_BGSK = UPDATE(self, k_BGTK, v_BGTK)
    self.value_BGSK[:, :, 7] = 0
    return keys_BGSK, values_BGSK


MUTANTS = {
    "values of one token are lost": ("llama", LayerCache, "update", forget_a_value),
    "beams keep their own past": ("gpt2", LayerCache, "reorder", lambda self, row_B: None),
    "another row's encoder": ("bart", CrossCache, "get", lambda self, compute, hidden: compute(hidden.roll(1, 0))),
    "no window for one query": (
        "mistral",
        Mask,
        "attention_inputs",
        lambda self, queries, *rest: INPUTS(self.with_window(None) if queries == 1 else self, queries, *rest),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_cache_are_caught(mutant, monkeypatch):
    family, owner, name, broken = MUTANTS[mutant]
    network = randomized(tiny_config(family))
    monkeypatch.setattr(owner, name, broken)
    assert depends_on_cache(network)


def capacities(monkeypatch, network: nn.Module, max_new_tokens: int, prompt: int = 5) -> list[int]:
    """Of the caches that a generation makes."""
    made = []

    def watched(config, rows, capacity, *rest):
        made.append(capacity)
        return Cache(config, rows, capacity, *rest)

    monkeypatch.setattr("model.decoding.Cache", watched)
    generate(network, torch.randint(3, 61, (1, prompt)), max_new_tokens=max_new_tokens, temperature=0)
    return made


def test_a_cache_is_no_larger_than_the_text(monkeypatch):
    """Llama 3.1's context is 131,072: its whole cache would be 17 GB."""
    assert capacities(monkeypatch, randomized(tiny_config("llama", context=131072)), 6) == [11]
    assert set(capacities(monkeypatch, randomized(tiny_config("llama")), 60)) == {CONTEXT}
    assert capacities(monkeypatch, randomized(tiny_config("t5")), 60) == [61]  # relative positions do not end


@pytest.mark.parametrize("stops", [1, 3])
def test_rows_end_at_their_stop(stops):
    network = randomized(tiny_config("llama", pad_id=0))
    ids = torch.randint(3, 61, (4, 5))
    free = generate(network, ids, max_new_tokens=12, temperature=0)
    ends = free[0, 3 : 3 + stops].tolist()
    ended = generate(network, ids, max_new_tokens=12, temperature=0, eos_id=ends[0], stop_ids=ends[1:])
    assert ended.size(1) <= 12
    for row, full in zip(ended.tolist(), free.tolist(), strict=True):
        places = [place for place, token in enumerate(full) if token in ends]
        end = places[0] + 1 if places else len(row)
        assert row[:end] == full[:end][: len(row)] and all(token == 0 for token in row[end:])
    network = randomized(tiny_config("llama"))  # without a pad: filled with the eos
    row = generate(network, ids, max_new_tokens=12, temperature=0, eos_id=ends[0])[0].tolist()
    assert set(row[row.index(ends[0]) :]) == {ends[0]}


PIECES = ["a", "b", "ab", "ba", "aab", ""]


def spell(ids: list[int]) -> str:
    return "".join(PIECES[i % 6] for i in ids)


def ends_right(network: nn.Module, string: str) -> bool:
    """Is each row as without a stop, up to the first token that completes the string?"""
    ids = torch.randint(3, 61, (6, 5))
    free = generate(network, ids, max_new_tokens=20, temperature=0)
    ended = generate(network, ids, max_new_tokens=20, temperature=0, stop_strings=[string, "no such"], decode=spell)
    for row, full in zip(ended.tolist(), free.tolist(), strict=True):
        end = next((n for n in range(1, len(full) + 1) if string in spell(full[:n])), len(full))
        if row[:end] != full[:end][: len(row)] or any(row[end:]):
            return False
    return True


def test_stop_strings_reach_over_tokens(monkeypatch):
    network = randomized(tiny_config("qwen2"))
    assert all(ends_right(network, string) for string in ("a", "bb", "abba", "aaaa", "babab"))

    def last_token_only(self, new_BT):
        return torch.tensor([any(string in self.decode([row[-1]]) for string in self.strings) for row in new_BT.tolist()])

    monkeypatch.setattr(Stop, "has_ended", last_token_only)
    assert not all(ends_right(network, string) for string in ("a", "bb", "abba", "aaaa", "babab"))


def test_penalty_counts_text_and_not_pads():
    network = randomized(tiny_config("gpt2"))
    ids = torch.randint(3, 61, (1, 6))
    padded = torch.cat((torch.full((1, 3), 40), ids), 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    options = {"max_new_tokens": 15, "temperature": 0, "repetition_penalty": 50.0}
    alone = generate(network, ids, **options)
    assert torch.equal(alone, generate(network, padded, attention_mask=mask, **options))
    assert not torch.equal(alone, generate(network, ids, **(options | {"repetition_penalty": 1.0})))
    text = [*ids[0].tolist(), *alone[0].tolist()]
    assert len(set(text[6:])) > 10  # what was said is hardly said again
    body = randomized(tiny_config("t5"))
    written = Decoding(body, ids, None, max_new_tokens=2)
    assert written.ids_BT[:, : written.end].tolist() == [[body.config.decoder_start_id]]  # an encoder's input is no text


def brute_force(network: nn.Module, ids: torch.Tensor, new: int, eos: int, penalty: float) -> tuple[list[int], float]:
    """The best of all texts of `new` tokens, or fewer with an end."""
    best = (None, -float("inf"))
    for tokens in itertools.product(range(network.config.vocab_size), repeat=new):
        if eos in tokens[:-1]:
            end = tokens.index(eos) + 1
            if any(tokens[end:]):
                continue  # seen once, with zeros behind its end
            tokens = tokens[:end]
        text = torch.cat((ids, torch.tensor([tokens])), 1)
        table = network(text).logits[0, ids.size(1) - 1 : -1].log_softmax(-1)
        score = table.gather(1, torch.tensor(tokens)[:, None]).sum().item() / len(tokens) ** penalty
        best = max(best, (list(tokens), score), key=lambda found: found[1])
    return best


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all_texts(penalty):
    """Six words, three steps: 36 beams lose nothing. (The end of the search is a heuristic: a penalty of 0 makes it exact,
    and so does a vocabulary with which the k finished texts are never full before the last step.)"""
    network = randomized(tiny_config("gpt2", vocab_size=6, eos_id=5))
    ids = torch.randint(0, 5, (1, 4))
    found = beam_search(network, ids, beams=36, max_new_tokens=3, eos_id=5, length_penalty=penalty)
    tokens, score = brute_force(network, ids, 3, 5, penalty)
    assert found.tokens[0, 0].tolist()[: len(tokens)] == tokens and found.scores.item() == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_beams(family):
    network = randomized(tiny_config(family))
    ids, mask = padded_prompts(network)
    greedy = generate(network, ids, attention_mask=mask, max_new_tokens=12, temperature=0)
    one = beam_search(network, ids, attention_mask=mask, beams=1, max_new_tokens=12)
    assert torch.equal(one.tokens[:, 0], greedy)
    four = beam_search(network, ids, attention_mask=mask, beams=4, max_new_tokens=12, num_return=4)
    assert four.tokens.shape == (3, 4, 12) and (four.scores.diff(dim=1) <= 0).all()
    assert len(set(map(tuple, four.tokens.flatten(0, 1).tolist()))) == 12
    for row in range(3):
        alone = beam_search(network, ids[row, mask[row].bool()][None], beams=4, max_new_tokens=12, num_return=4)
        assert torch.equal(alone.tokens[0], four.tokens[row])
    for wrong in ({"beams": 0}, {"num_return": 5}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            beam_search(network, ids, **({"beams": 4, "max_new_tokens": 3} | wrong))


def test_generation_keeps_mode_and_checks_its_options():
    network = randomized(tiny_config("llama")).train()
    ids = torch.randint(3, 61, (1, 5))
    assert generate(network, ids, max_new_tokens=0).shape == (1, 0) and network.training
    wrong_ones = ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": -1})
    for wrong in (*wrong_ones, {"min_p": 1.5}, {"repetition_penalty": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            generate(network, ids, **({"max_new_tokens": 3} | wrong))
    with pytest.raises(ConfigError, match="at least one token"):
        generate(network, ids[:, :0], max_new_tokens=3)
    with pytest.raises(ConfigError, match="need decode"):
        generate(network, ids, max_new_tokens=3, stop_strings=["a"])
    with pytest.raises(ConfigError, match="a stop string is empty"):
        generate(network, ids, max_new_tokens=3, stop_strings=[""], decode=spell)
    for config, message in (
        (tiny_config("bert"), "is an encoder"),
        (tiny_config("gpt2", head="sequence"), "the head 'sequence' generates no text"),
        (tiny_config("bart", decoder_start_id=None), "no decoder_start_id"),
    ):
        with pytest.raises(ConfigError, match=message):
            generate(randomized(config), ids, max_new_tokens=3)


def test_new_tokens_can_be_trained_on():
    """Tensors of inference mode cannot; a policy's own text must."""
    network = randomized(tiny_config("gpt2"))
    ids = torch.randint(3, 61, (1, 5))
    network(generate(network, ids, max_new_tokens=4)).logits.sum().backward()
    network(beam_search(network, ids, beams=2, max_new_tokens=4).tokens[:, 0]).logits.sum().backward()


def test_tokens_are_told_as_they_come():
    network, told = randomized(tiny_config("llama")), []
    new = generate(network, torch.randint(3, 61, (2, 5)), max_new_tokens=8, temperature=0, eos_id=7, on_token=told.append)
    assert torch.equal(torch.stack(told, 1), new)


BYTES = [bytes([b]) for b in "é€😀".encode()] + [b" one", b"two", b"o", b"\xff", b"", "naïve".encode()]


def streamed(ids: list[int], stops: tuple[str, ...]) -> str:
    shown: list[str] = []
    stream = TextStream(shown.append, BYTES, stops)
    for i in ids:
        stream.add(i)
    stream.close()
    return "".join(shown)


def stream_differs(trials: int = 300) -> bool:
    """From the whole text, decoded at once and cut before its first stop string."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(trials):
        ids = torch.randint(0, len(BYTES), (12,), generator=generator).tolist()
        ids += list(range(9)) if trial % 2 else []
        text = b"".join(BYTES[i] for i in ids).decode(errors="replace")
        stops = ((), ("two o", "ïve"), ("é€", "onet"))[trial % 3]
        cuts = [text.find(stop) for stop in stops if stop in text]
        if streamed(ids, stops) != text[: min(cuts, default=len(text))]:
            return True
    return False


def test_a_stream_says_what_the_whole_text_says(monkeypatch):
    assert not stream_differs()
    with monkeypatch.context() as patch:  # the mutant shows the beginning of a stop string
        patch.setattr("model.streaming.possible_stop_length", lambda text, stops: 0)
        assert stream_differs()
    monkeypatch.setattr(TextStream, "add", lambda self, i: self._take(self.token_bytes[i].decode(errors="replace")))
    assert stream_differs()  # the mutant decodes each token by itself


def said(*options: object):
    return command("generate", *options, main=model.__main__.main)


def test_the_command_streams_stops_and_searches(finished):
    common = [finished, "--prompt", "the file", "--max-new-tokens", 30, "--seed", 3]
    whole = said(*common, "--no-stream")
    assert whole.code == 0 and said(*common).out == whole.out
    words = whole.out.removeprefix("the file")
    stop = words[9:14]
    cut = "the file" + words[: words.index(stop)] + "\n"
    for stream in ("--stream", "--no-stream"):
        assert said(*common, stream, "--stop", stop, "no such string").out == cut
    searched = said(*common, "--beams", 3, "--length-penalty", 0.6)
    assert searched.code == 0 and searched.out.startswith("the file") and searched.out != whole.out
    assert said(*common, "--min-p", 0.9).out != whole.out and said(*common, "--repetition-penalty", 3).out != whole.out
    for wrong in (("--min-p", 2), ("--repetition-penalty", 0), ("--beams", 0), ("--beams", 2, "--stop", "x")):
        refused = said(*common, *wrong)
        assert refused.code == 2 and refused.err.startswith("error: ") and not refused.out

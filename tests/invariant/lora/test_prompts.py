"""What stands before the text: every token sees it, nobody outside does. Packing, padding, caches, training, switching."""

import pytest
import torch
from torch import Tensor

import model.stack
from data.transforms.causal import clm_batch
from lora.config import AdapterError, PrefixConfig, PromptConfig, PtuningConfig
from lora.inject import activate, add_adapters, remove
from model.attention import attention_reference, attention_sdpa
from model.beam import beam_search
from model.cache import Cache
from model.config import ConfigError
from model.generate import generate
from model.mask import AttentionInputs, Mask
from model.network import Network
from model.virtual_tokens import VirtualTokens
from tests.compare import absolute
from tests.conftest import randomized, tiny_config
from train.objective import MaskedObjective, Objective
from train.recompute import recompute

P = 4
METHODS = {
    "prompt": PromptConfig(tokens=P),
    "ptuning": PtuningConfig(tokens=P, width=6),
    "prefix": PrefixConfig(tokens=P),
    "prefix, MLP": PrefixConfig(tokens=P, width=6),
}
both_kinds = pytest.mark.parametrize("method", ["prompt", "prefix"])
each_method = pytest.mark.parametrize("method", METHODS)


def adapted(family: str, method: str, **changes) -> Network:
    network = add_adapters(randomized(tiny_config(family, **changes)), METHODS[method])
    with torch.no_grad():
        for value in own(network).values():
            value.add_(0.3 * torch.randn_like(value))
    return network


def own(network: Network) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


# ---- rows of packed documents

LENGTHS = (6, 3, 5)


def packed_and_separate(network: Network, documents: tuple[Tensor, ...], *, ids: bool) -> tuple[Tensor, Tensor]:
    """Hidden states of one row that holds them all, and of each alone. `ids`: the lone ones are marked as a document too."""
    row = torch.cat(documents, dim=1)
    document_ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(LENGTHS))[None]
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    packed = network.body(row, position_ids=position_ids, document_ids=document_ids).hidden
    alone = [network.body(x, document_ids=torch.zeros_like(x) if ids else None).hidden for x in documents]
    return packed, torch.cat(alone, dim=1)


@both_kinds
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "roformer", "bert"])
def test_packed_documents_are_as_separate_ones(family, method, monkeypatch):
    """Each sees the prompt or prefix, begins right behind it, and sees no other document."""
    network = adapted(family, method)
    documents = tuple(torch.randint(3, 61, (1, length)) for length in LENGTHS)
    # Many documents share one prompt: what an encoder's would read of them, all the others would read there.
    marked = network.config.architecture == "encoder" and method == "prompt"
    # A window is of places in the row; a prefix stands in every one of them, so that places do not matter.
    packed, separate = packed_and_separate(network, documents, ids=marked or family == "mistral")
    assert absolute(packed, separate) < 1e-12
    gradients = []
    direction = torch.randn_like(packed)
    for hidden in (packed, separate):
        gradients.append(torch.autograd.grad((hidden * direction).sum(), list(own(network).values())))
    assert all(absolute(a, b) < 1e-11 and a.abs().max() > 1e-3 for a, b in zip(*gradients, strict=True))

    other = (torch.randint(3, 61, (1, LENGTHS[0])), *documents[1:])
    changed, _ = packed_and_separate(network, other, ids=marked)
    assert torch.equal(changed[:, LENGTHS[0] :], packed[:, LENGTHS[0] :])
    with monkeypatch.context() as broken:  # the rule without its exception: documents but the first would see no prompt
        broken.setattr(model.stack, "Mask", lambda causal, prefix, **rules: Mask(causal, prefix=0, **rules))
        assert absolute(packed_and_separate(network, documents, ids=marked)[0], separate) > 1e-3
    with monkeypatch.context() as broken:  # no rule of documents
        broken.setattr(model.stack, "Mask", lambda causal, document_ids, **rules: Mask(causal, **rules))
        assert absolute(packed_and_separate(network, documents, ids=marked)[0], separate) > 1e-3
    with monkeypatch.context() as broken:  # positions that do not count on
        broken.setattr(VirtualTokens, "shift", lambda self, ids: torch.cat((torch.arange(self.prompt_length)[None], ids), 1))
        assert absolute(packed_and_separate(network, documents, ids=marked)[0], separate) > 1e-3


def test_the_mask_by_hand():
    """A prefix is hidden by no window and no document, but does not see what comes after it."""
    documents, real = torch.tensor([[-1, -1, 0, 0, 1, 1, 1]]), torch.tensor([[1, 1, 0, 1, 1, 1, 1]])
    mask = Mask(window=2, document_ids=documents, attention_mask=real, prefix=2)
    allowed = mask.allowed(7, 7)[0, 0]
    for t in range(7):
        for s in range(7):
            expected = s <= t and (s < 2 or (t - s < 2 and documents[0, t] == documents[0, s])) and real[0, s] == 1
            assert allowed[t, s] == expected
    assert Mask(prefix=2).attention_inputs(5, 5) == AttentionInputs(is_causal=True)
    assert Mask(prefix=2).attention_inputs(1, 5) == AttentionInputs()
    assert Mask(prefix=2).attention_inputs(3, 5).allowed_B1TS.sum() == 3 + 4 + 5
    q, k, v = (torch.randn(1, 4, length, 6, dtype=torch.float64) for length in (7, 7, 7))
    inputs = mask.attention_inputs(7, 7)
    assert absolute(attention_reference(q, k, v, *inputs), attention_sdpa(q, k, v, *inputs)) < 1e-12


# ---- padding, caches, text


@each_method
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "bert", "t5", "bart"])
def test_padded_rows_are_as_single_ones(family, method, monkeypatch):
    network = adapted(family, method)
    lengths, ids, mask = (9, 4, 6), torch.randint(3, 61, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    real = [slice(9 - n, 9) if network.config.architecture == "decoder" else slice(0, n) for n in lengths]
    for row, place in enumerate(real):
        mask[row] = 0
        mask[row, place] = 1

    def worst() -> float:
        options = {"decoder_input_ids": ids[:, :5]} if network.config.architecture == "encoder-decoder" else {}
        together = network(ids, mask, **options).logits
        errors = []
        for row, place in enumerate(real):
            options = {"decoder_input_ids": ids[row : row + 1, :5]} if options else {}
            alone = network(ids[row : row + 1, place], **options).logits[0]
            errors.append(absolute(together[row] if options else together[row, place], alone))
        return max(errors)

    assert worst() < 1e-12
    hidden = lambda self, x, value: x if x is None else torch.nn.functional.pad(x, (self.length, 0))  # noqa: E731
    monkeypatch.setattr(VirtualTokens, "extend", hidden)
    if network.config.architecture != "encoder-decoder" or "prefix" not in method:  # a decoder was given no mask
        assert worst() > 1e-3


def recomputed(network: Network, ids: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Greedy: the whole text is read again for each token."""
    written = torch.full_like(ids[:, :1], network.config.decoder_start_id or 0)
    for _ in range(count):
        if network.config.architecture == "encoder-decoder":
            token = network(ids, mask, decoder_input_ids=written).logits[:, -1].argmax(-1)
        else:
            given = None if mask is None else torch.cat((mask, torch.ones_like(written[:, 1:])), 1)
            token = network(torch.cat((ids, written[:, 1:]), 1), given).logits[:, -1].argmax(-1)
        written = torch.cat((written, token[:, None]), 1)
    return written[:, 1:]


@each_method
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "t5", "bart"])
def test_generation_is_recomputation(family, padded, method):
    network = adapted(family, method)
    ids, mask = torch.randint(3, 61, (3, 7)), None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :3], mask[2, :5] = 0, 0
    options = {"max_new_tokens": 12, "attention_mask": mask, "temperature": 0}
    expected = recomputed(network, ids, mask, 12)
    assert torch.equal(generate(network, ids, **options), expected)
    assert torch.equal(generate(network, ids, use_cache=False, **options), expected)
    best = beam_search(network, ids, beams=1, max_new_tokens=12, attention_mask=mask)
    assert torch.equal(best.tokens[:, 0], expected)
    beams = {"beams": 3, "max_new_tokens": 6, "attention_mask": mask}
    pair = [beam_search(network, ids, use_cache=use, **beams) for use in (True, False)]
    assert torch.equal(pair[0].tokens, pair[1].tokens) and absolute(pair[0].scores, pair[1].scores) < 1e-12


@each_method
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen3"])
def test_a_cache_read_in_pieces(family, method):
    """Logits of each piece are those of the whole; prompt and prefix are written once, in room of their own."""
    network, ids = adapted(family, method), torch.randint(3, 61, (2, 11))
    with torch.no_grad():
        whole, cache, pieces = network(ids).logits, Cache(network.config, 2, 11, torch.float64), []
        for start, end in ((0, 4), (4, 5), (5, 9), (9, 11)):
            pieces.append(network(ids[:, start:end], cache=cache).logits)
        assert absolute(torch.cat(pieces, 1), whole) < 1e-12
        assert (cache.length, cache.num_virtual_tokens) == (11 + P, P)
        with pytest.raises(ConfigError, match=f"holds {11 + P} positions"):
            network(ids[:, :1], cache=cache)
        cache = Cache(network.config, 2, 11, torch.float64)
        network(ids[:, :4], cache=cache)
        cache.num_virtual_tokens = 0  # a mutant that forgets them: the next token would stand elsewhere
        assert absolute(network(ids[:, 4:5], position_ids=torch.full((2, 1), 4), cache=cache).logits, whole[:, 4:5]) > 1e-3


@both_kinds
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_window_slides_within_what_is_left(family, method):
    """Context 32, of which the prompt takes 4; past the end the last half of the rest is read again, behind it."""
    network, ids = adapted(family, method), torch.randint(3, 61, (2, 20))
    text = generate(network, ids, max_new_tokens=30, temperature=0)
    assert torch.equal(text, generate(network, ids, max_new_tokens=30, temperature=0, use_cache=False))
    assert torch.equal(text[:, :9], recomputed(network, ids, None, 9))  # 28 tokens are read for the ninth
    again = torch.cat((ids, text[:, :9]), 1)[:, -14:]
    assert torch.equal(text[:, 9], network(again).logits[:, -1].argmax(-1))
    if family == "gpt2":
        with pytest.raises(ConfigError, match="33 positions were asked of a network with context=32"):
            network(torch.randint(3, 61, (1, 29)))


# ---- training


@each_method
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_objectives_see_the_text_alone(family, method):
    network = adapted(family, method).train()
    batch = clm_batch(torch.tensor([[1, 7, 8, 2, 1, 5, 6, 9, 2], [1, 4, 2, 1, 8, 8, 2, 1, 3]]), bos_id=1)
    kind = MaskedObjective if network.config.head == "mlm" else Objective
    term = kind(network)(batch).terms["loss"]
    assert term.count == (batch["labels"] != -100).sum()
    output = network(batch["input_ids"], hidden_states=True)
    assert output.hidden.shape == (2, 8, 24) and output.logits.shape == (2, 8, 61)
    assert {state.shape for state in output.hidden_states} == {output.hidden.shape}
    term.sum.backward()
    for name, value in network.named_parameters():
        assert (value.grad is not None) == (".parts." in name)
        assert value.grad is None or value.grad.abs().max() > 0
    gradients = [value.grad.clone() for value in own(network).values()]
    recompute(network, "blocks").zero_grad()
    kind(network)(batch).terms["loss"].sum.backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, own(network).values(), strict=True))


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_16_bit_network_are_float32(dtype, method):
    network = add_adapters(randomized(tiny_config("llama"), dtype=dtype), METHODS[method])
    assert {value.dtype for value in own(network).values()} == {torch.float32}
    output = network(torch.randint(3, 61, (2, 7)))
    output.logits.float().logsumexp(-1).sum().backward()
    assert output.hidden.dtype == dtype and all(value.grad.isfinite().all() for value in own(network).values())
    assert generate(network, torch.randint(3, 61, (2, 7)), max_new_tokens=3).shape == (2, 3)


# ---- several, switched, taken off


@each_method
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_switching_and_removing(family, method):
    network, ids = randomized(tiny_config(family)), torch.randint(3, 61, (2, 7))
    names, modules = list(network.state_dict()), dict(network.named_modules())
    trained = set(own(network))
    with torch.no_grad():
        plain, state = network(ids).logits, torch.get_rng_state()
        add_adapters(network, METHODS[method], "a")
        assert torch.equal(torch.get_rng_state(), state)  # first values are a function of the seed
        first = network(ids).logits
        add_adapters(network, METHODS[method], "b", seed=1)
        second = network(ids).logits
        both, turned = (network_with(network, order, ids) for order in (("a", "b"), ("b", "a")))
        assert min(absolute(a, b) for a, b in ((plain, first), (first, second), (both, first), (both, second))) > 1e-3
        assert torch.equal(network_with(network, "a", ids), first) and torch.equal(network_with(network, "b", ids), second)
        assert torch.equal(network_with(network, (), ids), plain)
        if "prompt" in method and family in ("gpt2", "llama"):  # one after the other
            one = add_adapters(network, PromptConfig(tokens=2 * P), "both").body.prompt.parts
            one["both"].vectors.copy_(torch.cat((one["a"].vectors, one["b"].vectors)))
            assert torch.equal(network(ids).logits, both) and absolute(both, turned) > 1e-3
        remove(network)
        assert torch.equal(network(ids).logits, plain)
    assert list(network.state_dict()) == names and dict(network.named_modules()) == modules and set(own(network)) == trained


def network_with(network: Network, names, ids: Tensor) -> Tensor:
    return activate(network, names)(ids).logits


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_prefix_and_a_prompt_together(family):
    """The prefix takes the first positions; the text, behind both, is continued as it is recomputed."""
    network = adapted(family, "prompt")
    add_adapters(network, METHODS["prefix"], "second")
    activate(network, ("default", "second"))
    ids, mask = torch.randint(3, 61, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {"max_new_tokens": 9, "attention_mask": mask, "temperature": 0}
    assert torch.equal(generate(network, ids, **options), recomputed(network, ids, mask, 9))
    assert network.body.num_virtual_tokens == (P if family == "t5" else 2 * P)
    if family != "t5":
        together, alone = network(ids, mask).logits[0, 3:], network(ids[:1, 3:]).logits[0]
        assert absolute(together, alone) < 1e-12


def test_what_cannot_be_is_said():
    network = randomized(tiny_config("gpt2"))
    with pytest.raises(AdapterError, match="32 positions before the text leave no room for it in context=32"):
        add_adapters(network, PrefixConfig(tokens=32))
    with pytest.raises(AdapterError, match="the id 61 is not among the 61"):
        add_adapters(network, PromptConfig(ids=(3, 61)))
    with pytest.raises(AdapterError, match="give its token ids"):
        add_adapters(network, PromptConfig(text="Answer:"))

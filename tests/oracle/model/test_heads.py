"""Every head that transformers has a class for: whole logits and gradients of the head, and folders both ways."""

import pytest
import torch
import transformers

import model.hub
from model.config import ModelConfig
from model.heads import CLASSIFIERS, HEADS, POOLED_HEADS, TIED_HEADS
from model.network import Network
from model.weights import head_spec, to_published, weight_table
from tests.compare import mixed
from tests.conftest import TINY_FAMILIES, randomized, tiny_config
from tests.oracle.model.test_network import LIBRARY, ROUNDING, how
from tests.oracle.wide import widen

KINDS = ("nsp", "pretraining", "sequence", "token", "qa", "pooler", "none")
PUBLISHED = [
    (family, head)
    for family in TINY_FAMILIES
    for head in KINDS
    if head_spec(tiny_config(family, head=head)).architecture is not None
]


def texts(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Three texts of 9, 6 and 4 tokens, padded on the right, each with its end: BART's head looks for that."""
    ids, mask = torch.randint(3, 61, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    for row, length in enumerate((9, 6, 4)):
        ids[row, length:], mask[row, length:], ids[row, length - 1] = config.pad_id or 0, 0, config.eos_id
    return ids, mask


def test_the_table_is_not_empty():
    assert len(PUBLISHED) > 35 and {head for _, head in PUBLISHED} == set(KINDS)


@pytest.mark.parametrize(("family", "head"), PUBLISHED)
def test_head(family, head, tmp_path, parity):
    config = tiny_config(family, head=head, labels=3, pad_id=1 if family == "roberta" else 0)
    network = randomized(config)
    model.hub.save(network, tmp_path / "ours")
    kind = getattr(transformers, head_spec(config).architecture)
    theirs = widen(kind.from_pretrained(tmp_path / "ours", dtype=torch.float64, attn_implementation=how(config)).eval())
    ids, mask = texts(config)
    options = {"decoder_input_ids": ids} if config.architecture == "encoder-decoder" and head == "none" else {}
    ours, other = network(ids, mask, **options), theirs(input_ids=ids, attention_mask=mask, **options)
    real = mask.bool()
    if head == "qa":
        pairs = [(ours.logits[real], torch.stack((other.start_logits, other.end_logits), -1)[real])]
    elif head == "pretraining":
        pairs = [(ours.logits[real], other.prediction_logits[real]), (ours.pair_logits, other.seq_relationship_logits)]
    elif head == "token":
        pairs = [(ours.logits[real], other.logits[real])]
    elif head == "pooler":
        pairs = [(ours.logits, other.pooler_output), (ours.hidden[real], other.last_hidden_state[real])]
    elif head == "none":
        assert ours.logits is None
        pairs = [(ours.hidden[real], other.last_hidden_state[real])]
    else:
        pairs = [(ours.logits, other.logits)]
    assert all(a.shape == b.shape for a, b in pairs)
    directions = [torch.randn_like(a) for a, _ in pairs]
    sum((a * d).sum() for (a, _), d in zip(pairs, directions, strict=True)).backward()
    sum((b * d).sum() for (_, b), d in zip(pairs, directions, strict=True)).backward()
    errors = [mixed(a, b) for a, b in pairs]
    table, gradients = weight_table(config), dict(theirs.named_parameters())
    for name, parameter in network.named_parameters():
        errors.append(mixed(to_published(table[name], parameter.grad, config), gradients[table[name].published].grad))
    parity(f"{family}: head {head}", LIBRARY, max(errors), *ROUNDING)

    theirs.save_pretrained(tmp_path / "theirs")
    loaded = model.hub.load(tmp_path / "theirs", head="none" if head == "none" else None)
    named = dict(loaded.named_parameters())
    assert loaded.config.head == head
    assert all(torch.equal(parameter, named[name]) for name, parameter in network.named_parameters())


def test_families_and_heads_register_themselves():
    """A family is a file, a head a class; what a family publishes is a head that exists."""
    from pathlib import Path

    import model.families
    from model.config import FAMILIES, load_family

    files = {path.stem for path in Path(model.families.__file__).parent.glob("[a-z]*.py")}
    assert set(FAMILIES) == files and all(load_family(name).MODEL_TYPE == name for name in FAMILIES)
    assert all(set(load_family(name).HEADS) <= set(HEADS) for name in FAMILIES)
    assert (TIED_HEADS, CLASSIFIERS) == (("lm", "mlm", "pretraining"), ("sequence", "token"))
    assert POOLED_HEADS == ("nsp", "sequence", "pooler")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_any_head_goes_on_any_body(family, head, tmp_path):
    """Also where the family has no such class: with our own names, and back."""
    config = tiny_config(family, head=head, labels=3)
    network = randomized(config, dtype=torch.float32)
    ids, mask = texts(config)
    output, hidden = network(ids, mask), (3, 9, 24)
    shapes = {"lm": (3, 9, 61), "mlm": (3, 9, 61), "pretraining": (3, 9, 61), "nsp": (3, 2), "sequence": (3, 3)}
    shapes |= {"token": (3, 9, 3), "qa": (3, 9, 2), "value": (3, 9), "pooler": (3, 24), "none": hidden}
    assert tuple((output.hidden if head == "none" else output.logits).shape) == shapes[head]
    model.hub.save(network, tmp_path)
    loaded = model.hub.load(tmp_path, head="none" if head == "none" else None)
    assert loaded.config.head == head
    again = loaded(ids, mask)
    assert torch.equal(again.hidden, output.hidden)
    assert head == "none" or torch.equal(again.logits, output.logits)


def test_an_unknown_head_lists_the_heads():
    with pytest.raises(model.config.ConfigError, match="unknown head 'choice'; heads: lm, mlm, nsp"):
        Network(tiny_config("bert", head="choice"))

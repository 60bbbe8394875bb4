"""One loss curve, whatever the accumulation, the ranks, the engine, the layout, recomputation and interruptions."""

import itertools
import json
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model.weights import to_published, weight_table
from tests.compare import Error, absolute
from tests.conftest import randomized, tiny_config
from tests.invariant.golden.run import CURVE, DTYPES, FACTORS, STEPS, Way, covering, engine_of, follow, padded, pairs, walk
from tests.ranks import in_two_ranks
from train.objective import Objective
from train.parallel.ranks import Ranks

TOLERANCE = {"float64": 1e-8, "float32": 1e-5}
GOLDEN = {int(step): loss for step, loss in json.loads(CURVE.read_text())["losses"].items()}


def error(losses: dict[int, float]) -> Error:
    assert losses.keys() == GOLDEN.keys() == set(range(1, STEPS + 1))
    return absolute(losses, GOLDEN)


def test_the_ways_are_few_and_cover_every_pair():
    assert len(covering()) <= 16
    wanted = set().union(*(pairs(Way(**dict(zip(FACTORS, v, strict=True)))) for v in itertools.product(*FACTORS.values())))
    assert set().union(*map(pairs, covering())) == wanted


def test_the_curve_is_that_of_the_libraries(parity):
    """transformers' GPT-2, torch's loss, clipping and AdamW: none of our code but the weights and documents."""
    ours = randomized(tiny_config("gpt2"))
    has = ours.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            n_embd=has.width, n_layer=has.depth, n_head=has.heads, n_inner=has.mlp_width, n_positions=has.context,
            vocab_size=has.vocab_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ).double()
    table = weight_table(has)
    published = {table[n].published: to_published(table[n], p.detach(), has) for n, p in ours.named_parameters()}
    missing, unknown = theirs.load_state_dict(published, strict=False)
    assert missing == ["lm_head.weight"] and not unknown  # tied
    decayed = [p for n, p in theirs.named_parameters() if not n.endswith("bias") and "ln_" not in n]
    rest = [p for n, p in theirs.named_parameters() if n.endswith("bias") or "ln_" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses = {}
    for step in range(STEPS):
        batch = padded(step)
        logits = theirs(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        rate = (step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / (STEPS - 2))) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        optimizer.step()
        optimizer.zero_grad()
        losses[step + 1] = loss.item()
    parity("golden curve", f"transformers and torch {torch.__version__}", error(losses), 1e-8, "20 steps in float64")


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> dict[str, dict[int, float]]:
    folder = tmp_path_factory.mktemp("golden")
    in_two_ranks(walk, folder)
    one, other = (json.loads((folder / f"losses-{rank}.json").read_text()) for rank in (0, 1))
    return {key: {int(step): loss for step, loss in (one[key] | other[key]).items()} for key in one}


@pytest.mark.parametrize("way", covering(), ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_every_way_follows_the_curve(name, way, walked):
    assert error(walked[f"{name} {way}"]) <= TOLERANCE[name]


def test_the_curve_notices_a_forgotten_factor(monkeypatch):
    """Mutants: one label too many in the count, and documents that see each other."""
    counts = Objective.counts
    monkeypatch.setattr(Objective, "counts", staticmethod(lambda batch: {"loss": counts(batch)["loss"] + 1}))
    assert error(follow(engine_of(Way(), Ranks(), torch.float64), Way())) > 1e-3
    monkeypatch.undo()

    forward = Objective.forward

    def without_documents(self, batch):
        return forward(self, {name: value for name, value in batch.items() if name != "document_ids"})

    monkeypatch.setattr(Objective, "forward", without_documents)
    packed = Way(layout="packed")
    assert error(follow(engine_of(packed, Ranks(), torch.float64), packed)) > 1e-3

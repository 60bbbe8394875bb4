"""PPO's rollouts, critic and steps in this process, in float64: splits of a step, ranks, values, advantages by hand.

Mutants of each trap are run through the same checks, which must then fail.
"""

import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import model.hub
import train.ppo_source
from data.transforms.causal import IGNORE
from quant.config import FourBit
from tests.compare import absolute
from tests.invariant.train.test_policy_objective import CPU, Given, Kept, largest, length, varied
from tests.policy_runs import open_policy, write_place
from tests.preference_runs import perturb
from tests.ranks import in_two_ranks
from train.losses.kl_control import AdaptiveKL
from train.parallel.mesh import Mesh, build_mesh
from train.parallel.parallelize import parallelize, unwrapped
from train.parallel.ranks import Ranks, own_rows
from train.policy_objective import ADVANTAGES, OLD, RETURNS, VALUES
from train.ppo_source import PpoSource
from train.reports.phases import Phases
from train.rollout import RolloutSizes
from train.runs.errors import TrainError
from train.step import train_step
from train.value_objective import ValueObjective

SIZES, STOPS = RolloutSizes(8, 1, group=1, epochs=2), 70


class SmallCritic:
    """A critic without an optimizer: the values of a network, as `train.critic.Critic` gives them."""

    def __init__(self, place, ranks, mesh, clip, autocast, dtype):
        network = model.hub.load(place / "base", head="sequence", labels=1, pool="last", dtype=dtype, seed=1)
        network.head.out.weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
        self.network = network
        self.wrapped = parallelize(ValueObjective(network, clip).train(), mesh, CPU)
        self.engine = SimpleNamespace(objective=self.wrapped, autocast=autocast)
        self.objective, self.ranks = unwrapped(self.wrapped), ranks

    def values(self, batch):
        return self.objective.collect(self.wrapped, batch, self.engine.autocast)

    def check(self, values_M, returns_M):
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write_place(tmp_path_factory.mktemp("ppo"), 24)


def opened(place, *, rewards=None, ranks=None, sizes=SIZES, b_scale=1.0, adapter=False, **settings):
    """The task with its source, objective and critic, in the parts of a run that they need."""
    ranks = ranks or Ranks()
    usual = {"temperature": 0.7, "group": sizes.group}
    task, network = open_policy(place, "ppo", adapter=adapter, **usual | settings)
    for name, parameter in network.named_parameters():
        if name.endswith("B") and parameter.requires_grad:
            parameter.data *= b_scale
    task.stop_ids = lambda network: list(range(STOPS))
    task.rewards.close()
    task.rewards, task.sizes = rewards or Given(length), sizes
    task.source = source = PpoSource(task, sizes)
    dtype = next(network.parameters()).dtype
    initial = partial(model.hub.load, place / "base", dtype=dtype)
    mesh = build_mesh("replicate", ranks, CPU) if ranks.world > 1 else Mesh()
    wrapped = parallelize(task.objective(task.networks(network, initial), None).train(), mesh, CPU)
    engine = SimpleNamespace(objective=wrapped, network=network, mesh=mesh, autocast=nullcontext)
    source.critic = SmallCritic(place, ranks, mesh, task.clip_value, nullcontext, dtype)
    own = partial(own_rows, ranks=ranks)
    parts = {"phases": Phases(CPU), "device": CPU, "config": task.config, "own_part": own}
    source.begin(SimpleNamespace(ranks=ranks, engine=engine, **parts))
    made = {"task": task, "source": source, "network": network, "critic": source.critic, "ranks": ranks}
    return SimpleNamespace(wrapped=wrapped, objective=unwrapped(wrapped), autocast=nullcontext, **made)


def rolled(place, *, moved: float = 0.0, **settings):
    """`opened` with a rollout; `moved`: how far policy and critic have moved since."""
    each = opened(place, **settings)
    each.source.batches(0, each.network)
    each.rollout = each.source.rollout
    each.batches = each.source.complete(0)
    perturb(each.network, moved)
    perturb(each.critic.network, moved)
    return each


def steps_of(each, batches=None):
    """The results of a step of policy and critic, and their gradients."""
    own = [own_rows(batch, each.ranks) for batch in (each.batches if batches is None else batches)]
    found = []
    for part in (each, each.critic):
        kept = Kept(part)
        found.append((train_step(part.wrapped, own, kept, ranks=each.ranks), kept.gradients))
    return found


def split(each, batch_size: int) -> list:
    each.source.sizes = RolloutSizes(batch_size, 8 // batch_size, each.source.sizes.group, epochs=2)
    return each.source.step_batches(0)


def assert_equal_steps(found, expected) -> None:
    for (result, gradients), (one, theirs) in zip(found, expected, strict=True):
        assert result.count == one.count and absolute(result.loss, one.loss) < 1e-10
        assert absolute(gradients, theirs) < 1e-10 * max(1, largest(theirs)) and largest(theirs) > 1e-4
        assert absolute(result.metrics, one.metrics) < 1e-10


CASES = {
    "plain": {},
    "dual clip": {"dual_clip": 1.5},
    "k3, whitened rewards": {"kl": "k3", "whiten_rewards": True},
    "no critic's clip": {"clip_value": 0.0},
    "an adapter": {"adapter": True},
    "entropy": {"entropy_bonus": 0.1},
}


# ---- one micro-batch of 8 is 8 of 1, two ranks are one


def assert_accumulates(place, **settings):
    each = rolled(place, truncated="mask", moved=0.02, **settings)
    assert len(set(each.rollout.length_N)) > 2 and each.rollout.is_learned_N.any() and not each.rollout.is_learned_N.all()
    expected = steps_of(each)
    for batch_size in (1, 2):
        assert_equal_steps(steps_of(each, split(each, batch_size)), expected)
    return each


@pytest.mark.parametrize("name", CASES)
def test_accumulation(name, place):
    assert_accumulates(place, **CASES[name])


@pytest.mark.parametrize("sizes", [(1, 8), (2, 4)])
def test_advantages_are_those_of_the_whole_rollout(sizes, place):
    """Whitened over all of its tokens, whatever the micro-batches in which values are computed."""
    one, other = rolled(place).rollout, rolled(place, sizes=RolloutSizes(*sizes, group=1, epochs=2)).rollout
    assert np.array_equal(one.ids_M, other.ids_M)
    for name in ("values_M", "returns_M", "advantage_M"):
        assert absolute(getattr(one, name), getattr(other, name)) < 1e-12, name


def in_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, settings in CASES.items():
        settings = settings | {"truncated": "mask", "moved": 0.02}
        alone, each = rolled(folder, **settings), rolled(folder, ranks=Ranks(rank, 2, rank), **settings)
        for field in ("ids_M", "prompt_P", "is_learned_N"):
            assert np.array_equal(getattr(each.rollout, field), getattr(alone.rollout, field)), (name, field)
        for field in ("old_M", "values_M", "returns_M", "advantage_M"):
            assert absolute(getattr(each.rollout, field), getattr(alone.rollout, field)) < 1e-10, (name, field)
        for batch_size in (8, 1):
            assert_equal_steps(steps_of(each, split(each, batch_size)), steps_of(alone, split(alone, batch_size)))
    dist.barrier()


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    in_two_ranks(in_ranks, write_place(tmp_path, 24))


# ---- the first step: ratio 1, KL 0, values those of training

NETWORKS = {
    "whole": {},
    "groups": {"sizes": RolloutSizes(8, 1, group=4, epochs=2)},
    "a LoRA adapter": {"adapter": True},
    "a QLoRA base": {"adapter": True, "quantization": FourBit()},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_step(name, place):
    """At temperature 0.7, with prompts of different lengths: the ratio is exactly 1, the KL divergence exactly 0."""
    each = rolled(place, b_scale=0.0, **NETWORKS[name])
    assert len({len(each.source.prompts[index].ids) for index in each.rollout.prompt_P}) > 1
    assert np.array_equal(each.rollout.old_M, each.rollout.reference_M) and each.rollout.old_M.min() < -1
    assert each.rollout.metrics["kl_reply"] == 0 == each.rollout.metrics["kl_token"]
    (policy, gradients), (critic, _) = steps_of(each)
    assert each.objective.extremes[:2].tolist() == [1, 1] and policy.metrics["kl"] == 0 == policy.metrics["old_kl"]
    assert policy.metrics["clipped_low"] == policy.metrics["clipped_high"] == 0 == critic.metrics["value_clipped"]
    assert largest(gradients) > 0
    for batch in each.batches:
        is_learned_BT = batch["labels"] != IGNORE
        assert torch.equal(each.critic.objective.values(batch)[is_learned_BT], batch[VALUES][is_learned_BT])


def test_the_values_are_those_of_the_states(place):
    """V_t = w · h of the token before token t, by a plain forward of each reply alone."""
    each = rolled(place)
    rollout = each.rollout
    for n, part in enumerate(rollout.slices()):
        prompt = list(each.source.prompts[rollout.prompt_P[n]].ids)
        ids = torch.tensor([prompt + rollout.ids_M[part].tolist()])
        hidden_TD = each.critic.network.body(ids).hidden[0]
        expected_T = hidden_TD @ each.critic.network.head.out.weight[0]
        assert absolute(rollout.values_M[part], expected_T[len(prompt) - 1 : -1]) < 1e-12


# ---- rewards, returns, advantages by hand


def by_hand(rollout, *, kappa, gamma, lam, whitened=True):
    """Returns and advantages by loops over one reply at a time."""
    returns, advantages = [], []
    for n, part in enumerate(rollout.slices()):
        values, old, reference = (getattr(rollout, name)[part] for name in ("values_M", "old_M", "reference_M"))
        rewards = [-kappa * (a - b) for a, b in zip(old, reference, strict=True)]
        rewards[-1] += rollout.reward_N[n]
        following, advantage, own = 0.0, 0.0, []
        for t in reversed(range(len(values))):
            advantage = rewards[t] + gamma * following - values[t] + gamma * lam * advantage
            following = values[t]
            own.append(advantage)
        advantages += own[::-1]
        returns += [a + v for a, v in zip(own[::-1], values, strict=True)]
    if whitened:
        mean = sum(advantages) / len(advantages)
        variance = sum((a - mean) ** 2 for a in advantages) / (len(advantages) - 1)
        advantages = [(a - mean) / math.sqrt(variance + 1e-8) for a in advantages]
    return np.array(returns), np.array(advantages)


def assert_by_hand(place, **settings):
    each = rolled(place, adapter=True, beta=0.3, gamma=0.9, lam=0.8, rewards=Given(varied), **settings)
    rollout = each.rollout
    assert np.abs(rollout.old_M - rollout.reference_M).max() > 0.01 and len(set(rollout.length_N)) > 2
    whitened = settings.get("whiten", True)
    returns_M, advantage_M = by_hand(rollout, kappa=0.3, gamma=0.9, lam=0.8, whitened=whitened)
    assert absolute(rollout.returns_M, returns_M) < 1e-12 and absolute(rollout.advantage_M, advantage_M) < 1e-10
    (batch,) = each.batches
    mask_BT = batch["labels"] != IGNORE
    order = np.argsort(batch["groups"].numpy())
    for key, values_M in ((ADVANTAGES, advantage_M), (RETURNS, returns_M), (OLD, rollout.old_M)):
        rows = [batch[key][b][mask_BT[b]] for b in order]
        assert absolute(torch.cat(rows), values_M) < 1e-10, key


@pytest.mark.parametrize("whiten", [True, False])
def test_advantages_by_hand(whiten, place):
    assert_by_hand(place, whiten=whiten)


MUTANTS = {
    "the sign of the KL": ("kl_estimate", lambda honest: lambda *given: -honest(*given)),
    "the score at another token": (
        "token_rewards",
        lambda honest: lambda s, kl, m, c: honest(s, kl, m, c).roll(-1, 1).masked_fill(~m, 0),
    ),
    "the KL forgotten": ("token_rewards", lambda honest: lambda s, kl, m, c: honest(s, kl * 0, m, c)),
    "γ forgotten": ("gae", lambda honest: lambda *given, gamma, lam: honest(*given, lam=lam)),
    "λ forgotten": ("gae", lambda honest: lambda *given, gamma, lam: honest(*given, gamma=gamma)),
    "whitened by halves": (
        "whiten",
        lambda honest: lambda x, m, **more: torch.cat([honest(x[:4], m[:4], **more), honest(x[4:], m[4:], **more)]),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_seen(name, place, monkeypatch):
    function, mutate = MUTANTS[name]
    monkeypatch.setattr(train.ppo_source, function, mutate(getattr(train.ppo_source, function)))
    with pytest.raises(AssertionError):
        assert_by_hand(place)


def test_values_one_slot_off_are_seen(place, monkeypatch):
    values = ValueObjective.values
    monkeypatch.setattr(ValueObjective, "values", lambda self, batch: values(self, batch).roll(1, 1))
    with pytest.raises(AssertionError):
        test_the_values_are_those_of_the_states(place)


def test_replies_that_are_not_learned_are_in_no_statistic(place):
    """Cut replies with --ppo.truncated mask: advantages of the others are whitened without them."""
    each = rolled(place, truncated="mask", beta=0.0)
    rollout, learned_M = each.rollout, np.repeat(each.rollout.is_learned_N, each.rollout.length_N)
    assert learned_M.any() and not learned_M.all()
    assert abs(rollout.advantage_M[learned_M].mean()) < 1e-12
    assert rollout.advantage_M[learned_M].std(ddof=1) == pytest.approx(1, abs=1e-6)
    assert not rollout.advantage_M[~learned_M].any()


# ---- KL control, divergence


def test_the_coefficient_adapts_between_rollouts(place):
    each = rolled(place, adapter=True, beta=0.2, kl_target=0.001, kl_horizon=100)
    assert isinstance(each.source.control, AdaptiveKL)
    kl = each.rollout.metrics["kl_reply"]
    assert each.rollout.metrics["kl_coefficient"] == 0.2, "that of this rollout's rewards"
    assert each.source.control.coefficient == pytest.approx(0.2 * (1 + 8 / 100 * min(max(kl / 0.001 - 1, -0.2), 0.2)))
    state = json.loads(json.dumps(each.source.state_dict()))
    other = opened(place, adapter=True, beta=0.2, kl_target=0.001, kl_horizon=100)
    other.source.load_state_dict(state)
    assert other.source.control.coefficient == each.source.control.coefficient
    for ours, theirs in zip(each.batches, other.source.complete(0), strict=True):
        assert ours.keys() == theirs.keys() >= {VALUES, RETURNS, ADVANTAGES}
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_divergence_that_explodes_stops_the_run(place):
    each = opened(place, adapter=True, b_scale=40.0, max_kl=0.5)
    each.source.batches(0, each.network)
    with pytest.raises(TrainError, match=r"rollout 0: the KL divergence .* above --ppo.max-kl 0.5.*raise --ppo.beta"):
        each.source.complete(0)


def test_a_critic_that_explains_returns(place):
    """The share of explained variance: 1 where values are the returns."""
    values_M = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    assert train.ppo_source.explained(values_M, values_M)["explained_variance"] == 1
    assert train.ppo_source.explained(torch.zeros(3, dtype=torch.float64), values_M)["explained_variance"] == 0
    assert "explained_variance" not in train.ppo_source.explained(values_M, torch.ones(3, dtype=torch.float64))

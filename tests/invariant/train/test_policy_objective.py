"""The rollouts, objective and steps of grpo and rloo in this process, in float64: splits of a step, ranks, log-probabilities.

Mutants of each trap are run through the same checks, which must then fail.
"""

import json
import math
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import model.hub
import train.rollout_advantages
from data.chat.template import ChatTemplate
from data.transforms.causal import IGNORE
from quant.config import FourBit
from quant.linear import quantized_layers
from tests.compare import absolute
from tests.policy_runs import open_policy, write_place
from tests.preference_runs import perturb
from tests.ranks import in_two_ranks
from train.config import RewardConfig
from train.losses.policy import POLICY_DETAILS, POLICY_LOSSES
from train.losses.sampler import SAMPLER_KINDS
from train.objective import Result, Term
from train.parallel.mesh import Mesh, build_mesh
from train.parallel.parallelize import parallelize, unwrapped
from train.parallel.ranks import Ranks, own_rows
from train.policy_objective import ADVANTAGES, OLD, REFERENCE, SAMPLER, PolicyObjective
from train.reports.phases import Phases
from train.rewards.open import open_rewards
from train.rollout import Reply, Rollout, RolloutSizes, choose_more, choose_prompts, draw_uniforms, has_agreed, sum_rewards
from train.rollout_source import RolloutSource
from train.runs.errors import TrainError
from train.step import train_step

CPU, STOPS = torch.device("cpu"), 40  # the first 40 ids end a reply: some replies end, some are cut
PLAN = RolloutSizes(8, 1, group=4, epochs=2)
CASES = {  # objective and settings
    **{name: ("grpo", {"loss": name}) for name in POLICY_LOSSES if name != "rloo"},
    "rloo": ("rloo", {}),
    **{f"KL {kind}": ("grpo", {"loss": "grpo", "beta": 0.5, "kl": kind}) for kind in ("k1", "k2", "k3")},
    "KL, dr_grpo": ("grpo", {"loss": "dr_grpo", "beta": 0.5}),
    "entropy": ("grpo", {"loss": "grpo", "entropy_bonus": 0.1}),
    "entropy, rloo": ("rloo", {"entropy_bonus": 0.1}),
    **{kind: ("grpo", {"loss": "gspo" if "mask" in kind else "dapo", "correction": kind}) for kind in SAMPLER_KINDS},
}


class Given:
    """Functions of a sample in the place of a run's rewards."""

    def __init__(self, *functions, weights=None):
        self.functions, self.names = functions, [f"f{k}" for k in range(len(functions))]
        self.weights = weights or [1.0] * len(functions)

    def __call__(self, samples):
        return torch.tensor([[function(sample) for function in self.functions] for sample in samples], dtype=torch.float64)


def length(sample) -> float:
    return float(sample.token_count)


def varied(sample) -> float:
    return sum(map(ord, sample.reply)) % 17 / 4


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write_place(tmp_path_factory.mktemp("objective"))


def opened(place, objective="grpo", *, rewards=None, ranks=None, plan=PLAN, b_scale=1.0, autocast=nullcontext, **settings):
    """The task, its source and objective, in the parts of a run that they need."""
    ranks = ranks or Ranks()
    task, network = open_policy(place, objective, **{"temperature": 0.7} | settings)
    for name, parameter in network.named_parameters():
        if name.endswith("B") and parameter.requires_grad:
            parameter.data *= b_scale
    task.stop_ids = lambda network: list(range(STOPS))
    task.rewards.close()
    task.rewards, task.sizes = rewards or Given(length), plan
    task.source = source = RolloutSource(task, plan)
    dtype = next(network.parameters()).dtype
    initial = partial(model.hub.load, place / "base", dtype=dtype)
    mesh = build_mesh("replicate", ranks, CPU) if ranks.world > 1 else Mesh()
    wrapped = parallelize(task.objective(task.networks(network, initial), None).train(), mesh, CPU)
    engine = SimpleNamespace(objective=wrapped, network=network, mesh=mesh, autocast=autocast)
    own = partial(own_rows, ranks=ranks)
    parts = {"phases": Phases(CPU), "device": CPU, "config": task.config, "own_part": own}
    source.begin(SimpleNamespace(ranks=ranks, engine=engine, **parts))
    made = {"task": task, "source": source, "network": network, "autocast": autocast, "ranks": ranks}
    return SimpleNamespace(wrapped=wrapped, objective=unwrapped(wrapped), **made)


def rolled(place, objective="grpo", *, moved: float = 0.0, sampler: float = 0.0, **settings):
    """`opened` with a rollout; `moved`: how far the policy has moved since, `sampler`: how far the sampler was off."""
    each = opened(place, objective, **settings)
    each.batches = each.source.batches(0, each.network)
    each.rollout = each.source.rollout
    if sampler:
        each.rollout.sampler_M += np.random.default_rng(1).normal(0, sampler, len(each.rollout.sampler_M))
    each.batches = each.source.complete(0)
    perturb(each.network, moved)
    return each


class Kept:
    """In the place of an optimizer: it keeps the gradients."""

    def __init__(self, each):
        self.each, self.param_groups = each, [{"params": list(each.network.parameters())}]

    def step(self):
        named = self.each.network.named_parameters()
        self.gradients = {name: each.grad.clone() for name, each in named if each.requires_grad}

    def zero_grad(self, set_to_none=True):
        self.each.wrapped.zero_grad(set_to_none=set_to_none)


def step_of(each, batches=None):
    """The result of a step and its gradients."""
    kept = Kept(each)
    own = [own_rows(batch, each.ranks) for batch in (each.batches if batches is None else batches)]
    return train_step(each.wrapped, own, kept, autocast=each.autocast, ranks=each.ranks), kept.gradients


def split(each, batch_size: int) -> list:
    """The same step in micro-batches of another size."""
    each.source.sizes = RolloutSizes(batch_size, 8 // batch_size, PLAN.group, epochs=PLAN.epochs)
    return each.source.step_batches(0)


def rolled_case(place, name, **more):
    objective, settings = CASES[name]
    moved = 1e-4 if name in ("gspo", "sequence_mask", "token_mask") else 0.01  # gspo clips ratios a thousandth from 1
    sampler = 0.5 if "correction" in settings else 0.0
    return rolled(place, objective, truncated="mask", moved=moved, sampler=sampler, **settings, **more)


def largest(gradients) -> float:
    return max(float(each.abs().max()) for each in gradients.values())


# ---- one micro-batch of 8 is 8 of 1


def assert_accumulates(place, name):
    each = rolled_case(place, name)
    rollout = each.rollout
    assert len(set(rollout.length_N)) > 2 and rollout.is_learned_N.any() and not rollout.is_learned_N.all()
    assert (~rollout.has_ended_N == ~rollout.is_learned_N).all()
    one, expected = step_of(each)
    assert (each.objective.extremes[1] - 1).abs() > 1e-6 and largest(expected) > 1e-4
    for batch_size in (1, 2):
        result, gradients = step_of(each, split(each, batch_size))
        assert result.count == one.count and absolute(result.loss, one.loss) < 1e-10
        assert gradients.keys() == expected.keys() and absolute(gradients, expected) < 1e-10 * max(1, largest(expected))
        assert absolute(result.metrics, one.metrics) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_accumulation(name, place):
    assert_accumulates(place, name)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_local_denominators_are_seen(name, place, monkeypatch):
    """A mean of the micro-batches' means."""
    forward, counts = PolicyObjective.forward, PolicyObjective.counts

    def own(self, batch):
        result = forward(self, batch)
        if self.collected is not None:
            return result
        means = {key: Term(term.sum / term.count.clamp(min=1), 1, term.weight) for key, term in result.terms.items()}
        return Result(means, result.metrics)

    monkeypatch.setattr(PolicyObjective, "forward", own)
    monkeypatch.setattr(PolicyObjective, "counts", lambda self, batch: dict.fromkeys(counts(self, batch), torch.tensor(1)))
    with pytest.raises(AssertionError):
        assert_accumulates(place, name)


def in_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in CASES:
        alone, each = rolled_case(folder, name), rolled_case(folder, name, ranks=Ranks(rank, 2, rank))
        ours, theirs = each.rollout, alone.rollout
        for field in ("ids_M", "prompt_P", "rewards_NK", "is_learned_N", "has_ended_N"):
            assert np.array_equal(getattr(ours, field), getattr(theirs, field)), (name, field)
        for field in ("sampler_M", "old_M", "advantage_N"):
            assert absolute(getattr(ours, field), getattr(theirs, field)) < 1e-10, (name, field)
        for batch_size in (8, 1):  # of a micro-batch of 1, rank 1 has no row
            expected, gradients = step_of(alone, split(alone, batch_size))
            result, found = step_of(each, split(each, batch_size))
            assert result.count == expected.count and absolute(result.loss, expected.loss) < 1e-10, name
            assert absolute(found, gradients) < 1e-10 * max(1, largest(gradients)) and largest(gradients) > 1e-4, name
            assert absolute(result.metrics, expected.metrics) < 1e-10, name
    dist.barrier()


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    in_two_ranks(in_ranks, write_place(tmp_path))


# ---- log-probabilities: of the sampler, of the trainer, of the reference


NETWORKS = {
    "whole": {},
    "a LoRA adapter": {"adapter": True},
    "a QLoRA base": {"adapter": True, "quantization": FourBit()},
}


def assert_log_probabilities(place, **settings):
    """Sampler and trainer agree, and the first ratio is exactly 1 at every token."""
    each = rolled(place, **settings)
    rollout = each.rollout
    prompts = {len(each.source.prompts[index].ids) for index in rollout.prompt_P}
    assert len(prompts) > 1 and len(set(rollout.length_N)) > 2, "left padding, and rows that leave the batch"
    assert rollout.old_M.min() < -1 and absolute(rollout.sampler_M, rollout.old_M) < 1e-10
    for batch in each.batches:
        is_learned_BT = batch["labels"] != IGNORE
        log_p_BT, _ = each.objective.log_probs(each.network, batch)
        assert log_p_BT.requires_grad and torch.equal(log_p_BT[is_learned_BT], batch[OLD][is_learned_BT])
    step_of(each)
    assert each.objective.extremes[:2].tolist() == [1, 1] and each.objective.extremes[2] < 1e-10
    return each


@pytest.mark.parametrize("name", NETWORKS)
def test_sampler_and_trainer(name, place):
    each = assert_log_probabilities(place, **NETWORKS[name])
    assert bool(quantized_layers(each.network)) == ("quantization" in NETWORKS[name])
    logits_BTV = each.network(**each.objective.inputs_of(each.batches[0])).logits  # by hand: temperature, slots
    labels_BT = each.batches[0]["labels"]
    expected_BT = (logits_BTV / 0.7).log_softmax(-1).gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0]
    is_learned_BT = labels_BT != IGNORE
    assert absolute(each.batches[0][SAMPLER][is_learned_BT], expected_BT[is_learned_BT]) < 1e-10


def test_a_forgotten_temperature_is_seen(place, monkeypatch):
    log_probs = PolicyObjective.log_probs

    def hot(self, *given):
        self.policy_loss = type(self.policy_loss)(self.policy_loss.name)
        return log_probs(self, *given)

    monkeypatch.setattr(PolicyObjective, "log_probs", hot)
    with pytest.raises(AssertionError):
        assert_log_probabilities(place)


@pytest.mark.parametrize("off", [-1, 1])
def test_a_mask_one_slot_off_is_seen(off, place, monkeypatch):
    batch = RolloutSource.batch
    monkeypatch.setattr(
        RolloutSource, "batch", lambda self, rows: (found := batch(self, rows)) | {"labels": found["labels"].roll(off, 1)}
    )
    with pytest.raises(AssertionError):
        assert_log_probabilities(place)


def test_bf16_stays_near(place):
    """Autocast: the sampler reads a cache of 16 bits, and rounds elsewhere than the trainer. The first ratio is still 1."""
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    each = rolled(place, dtype=torch.float32, autocast=autocast)
    gap = np.abs(each.rollout.sampler_M - each.rollout.old_M)
    assert 0 < gap.max() < 0.05 and gap.mean() < 0.01
    step_of(each)
    assert each.objective.extremes[:2].tolist() == [1, 1]


def test_adapter_off_is_the_copied_base(place):
    off, copied = (
        rolled(place, adapter=True, beta=0.1, reference=kind, moved=0.01).rollout for kind in ("adapter-off", "copy")
    )
    assert np.array_equal(off.ids_M, copied.ids_M) and absolute(off.reference_M, copied.reference_M) < 1e-12
    assert np.abs(off.reference_M - off.old_M).max() > 1e-3


@pytest.mark.parametrize("kind", ["copy", "adapter-off"])
def test_the_divergence_from_the_reference_is_0_at_step_0(kind, place):
    each = rolled(place, adapter=kind == "adapter-off", beta=0.1, b_scale=0.0)
    assert each.task.reference_kind == kind and np.array_equal(each.rollout.reference_M, each.rollout.old_M)
    result, gradients = step_of(each)
    assert result.metrics["kl"] == 0 and largest(gradients) > 0
    perturb(each.network, 0.05)
    moved, _ = step_of(each)
    assert moved.metrics["kl"] > 1e-4


def test_the_divergence_is_in_the_reward_of_rloo(place):
    """R = reward - β Σ (log π_old - log π_ref), and the mean of the others is taken off."""
    each = rolled(place, "rloo", adapter=True, beta=0.5)
    rollout = each.rollout
    kl_N = np.array([(rollout.old_M - rollout.reference_M)[part].sum() for part in rollout.slices()])
    expected_N = rollout.length_N - 0.5 * kl_N
    assert np.abs(kl_N).max() > 0.01 and absolute(rollout.reward_N, expected_N) < 1e-12
    for n, reward in enumerate(expected_N):
        others = [expected_N[m] for m in range(8) if m != n and m // 4 == n // 4]
        assert rollout.advantage_N[n] == pytest.approx(reward - sum(others) / 3, abs=1e-12)
    assert not any(REFERENCE in batch and "kl" not in step_of(each)[0].metrics for batch in each.batches)


# ---- rewards and advantages


def assert_advantages(rollout, group: int = 4) -> None:
    """(R - mean) / (std + 1e-4) by loops, over those of the group that have a reward."""
    for n, reward in enumerate(rollout.reward_N):
        first = n // group * group
        values = [value for value in rollout.reward_N[first : first + group] if not math.isnan(value)]
        mean = sum(values) / max(len(values), 1)
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))
        expected = 0.0 if math.isnan(reward) else (reward - mean) / (std + 1e-4)
        assert rollout.advantage_N[n] == pytest.approx(expected, abs=1e-12)


def test_advantages(place):
    rollout = rolled(place).rollout
    assert_advantages(rollout)
    assert rollout.metrics["advantage_std"] == pytest.approx(rollout.advantage_N.std())


def test_statistics_over_half_a_group_are_seen(place, monkeypatch):
    honest, halves_N = train.rollout_advantages.group_advantages, torch.arange(8) // 2
    halved = lambda rewards_N, groups_N, **more: honest(rewards_N, halves_N, **more)  # noqa: E731
    monkeypatch.setattr(train.rollout_advantages, "group_advantages", halved)
    rollout = rolled(place).rollout
    with pytest.raises(AssertionError):
        assert_advantages(rollout)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_constant_reward_has_no_gradient(name, place):
    settings = {"beta": 0.0} if name == "rloo" else {"loss": name}
    each = rolled(place, "rloo" if name == "rloo" else "grpo", rewards=Given(lambda sample: 0.3), moved=0.01, **settings)
    result, gradients = step_of(each)
    assert largest(gradients) == 0 == result.grad_norm and not each.rollout.advantage_N.any()
    assert each.rollout.metrics["agreed"] == 1


def some(sample) -> float:
    """None for replies of an odd number of tokens."""
    return varied(sample) if sample.token_count % 2 == 0 else math.nan


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_reply_without_a_reward_is_left_out(name, place):
    """It is in no statistic, loss or denominator: the step is that of the others alone."""
    objective, settings = CASES[name]
    each = rolled(place, objective, rewards=Given(some), moved=1e-4 if name == "gspo" else 0.01, **settings)
    rollout = each.rollout
    is_none_N = rollout.length_N % 2 == 1
    assert 0 < is_none_N.sum() < 7 and np.array_equal(np.isnan(rollout.reward_N), is_none_N)
    assert np.array_equal(rollout.is_learned_N, ~is_none_N) and not rollout.advantage_N[is_none_N].any()
    assert rollout.metrics["left_out"] == is_none_N.mean()
    assert rollout.metrics["reward"] == pytest.approx(rollout.rewards_NK[~is_none_N].mean())
    if objective == "grpo" and name != "dr_grpo":
        assert_advantages(rollout)
    whole, expected = step_of(each)
    (batch,) = each.batches
    is_kept_B = (batch["labels"] != IGNORE).any(-1)
    assert is_kept_B.sum() == (~is_none_N).sum()
    rest, gradients = step_of(each, [{key: value[is_kept_B] for key, value in batch.items()}])
    tokens = rollout.length_N[~is_none_N]
    assert whole.count == rest.count == (len(tokens) if POLICY_DETAILS[name].unit == "replies" else tokens.sum())
    assert absolute(whole.loss, rest.loss) < 1e-12 and absolute(gradients, expected) < 1e-10 and largest(gradients) > 0


def test_a_users_function_may_leave_out_replies_or_all(place):
    (place / "mine.py").write_text(
        "def even(completions, token_counts):\n"
        "    values = [sum(map(ord, text)) % 17 / 4 for text in completions]\n"
        "    return [value if n % 2 == 0 else None for value, n in zip(values, token_counts)]\n\n\n"
        "def never(completions):\n    return [None] * len(completions)\n"
    )
    ours, theirs = (
        rolled(place, rewards=rewards)
        for rewards in (Given(some), open_rewards(RewardConfig((f"{place / 'mine.py'}:even",), reward_workers=0)))
    )
    assert np.array_equal(ours.rollout.rewards_NK, theirs.rollout.rewards_NK, equal_nan=True)
    assert np.array_equal(ours.rollout.advantage_N, theirs.rollout.advantage_N)
    with pytest.raises(TrainError, match="rollout 0: the reward functions left out every reply"):
        rolled(place, rewards=open_rewards(RewardConfig((f"{place / 'mine.py'}:never",), reward_workers=0)))


def test_truncated_replies(place):
    kept, masked, punished = (
        rolled(place, truncated=how, punish_margin=4).rollout for how in ("keep", "mask", "punish")
    )
    assert kept.is_learned_N.all() and punished.is_learned_N.all() and not kept.has_ended_N.all()
    assert np.array_equal(masked.is_learned_N, masked.has_ended_N)
    assert np.array_equal(masked.advantage_N, kept.advantage_N), "a cut reply's reward stays in its group's statistics"
    expected_N = [length - min(max((length - (8 - 4)) / 4, 0), 1) for length in punished.length_N]
    assert absolute(punished.reward_N, np.array(expected_N)) < 1e-12
    assert_advantages(punished)


def test_all_replies_cut(place, monkeypatch):
    each = opened(place, truncated="mask")
    each.task.stop_ids = lambda network: []
    each.source.batches(0, each.network)
    with pytest.raises(TrainError, match=r"all 8 replies were cut at 8 tokens.*raise --grpo.max-reply, or teach stopping"):
        each.source.complete(0)


def test_several_rewards(place):
    """Their weighted sum; or each normalised in its group, then their sum over the rollout (GDPO)."""
    given = {"rewards": Given(length, lambda sample: 100.0 * (sample.token_count % 3), weights=[1.0, 0.5])}
    summed, apart = (rolled(place, **given, normalize=how).rollout for how in ("sum", "each"))
    assert absolute(summed.reward_N, summed.rewards_NK @ np.array([1.0, 0.5])) < 1e-12
    assert_advantages(summed)
    groups = apart.rewards_NK.reshape(2, 4, 2)
    normalised = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    reward_N = (normalised @ np.array([1.0, 0.5])).reshape(8)
    assert absolute(apart.reward_N, reward_N) < 1e-12
    assert absolute(apart.advantage_N, (reward_N - reward_N.mean()) / (reward_N.std(ddof=1) + 1e-4)) < 1e-12
    assert {"reward_f0", "reward_f1"} <= summed.metrics.keys()


# ---- prompts, noise, dynamic sampling


def parity(sample) -> float:
    """The same for all replies to every second prompt."""
    return 1.0 if int(sample.prompt.split()[0]) % 2 else length(sample)


def test_dynamic_sampling(place, monkeypatch):
    """Groups with a spread are kept in the order of writing; the others are counted, and fill up what is missing."""
    each = opened(place, rewards=Given(parity), resample=1)
    score, seen = RolloutSource.score, []

    def watched(self, prompts, groups):
        found = score(self, prompts, groups)
        seen.extend(zip(prompts, found, strict=True))
        return found

    monkeypatch.setattr(RolloutSource, "score", watched)
    rounds = set()
    for number in range(12):
        seen.clear()
        rollout = each.source.generate(number, each.network)
        has_spread = [len({reply.rewards[0] for reply in group}) > 1 for _, group in seen]
        of = {wanted: [pair for pair, has in zip(seen, has_spread, strict=True) if has == wanted] for wanted in (True, False)}
        spread, agreed = of[True], of[False]
        kept = (spread + agreed)[:2]
        assert rollout.prompt_P.tolist() == [prompt for prompt, _ in kept] and len(spread) <= 2
        assert rollout.ids_M.tolist() == [id for _, group in kept for reply in group for id in reply.ids]
        assert rollout.metrics["sampled_groups"] == len(seen) and rollout.metrics["agreed"] == len(agreed) / len(seen)
        asked, missing = choose_prompts(0, number, 2, 12), 2 - sum(has_spread[:2])
        asked += choose_more(0, number, 1, missing, 12, taken=asked) if missing else []  # in the place of those that agreed
        assert [prompt for prompt, _ in seen] == asked
        rounds.add((len(spread), len(asked)))
    assert {(2, 2), (2, 3), (1, 3)} <= rounds, "filled at once, in the second round, and with a group that agrees"


def test_others_are_drawn_than_the_rollout_has():
    assert all(not {*choose_more(0, n, 1, 3, 8, taken=(1, 2, 5, 7))} & {1, 2, 5, 7} for n in range(20))
    assert len(choose_more(0, 0, 1, 3, 4, taken=(1, 2))) == 3  # too few are left


def test_a_rank_without_a_token_gathers_too(place):
    """Its extremes are none: the others would wait for it."""
    found = opened(place)
    gathered = []

    class Watched(Ranks):
        def gather(self, values):
            gathered.append(values.flatten().tolist())
            return super().gather(values)

    objective = SimpleNamespace(extremes=None)
    run = SimpleNamespace(engine=SimpleNamespace(objective=objective), ranks=Watched(), metrics=None)
    assert "ratio_min" not in type(found.task).logged(found.task, run, 3) and len(gathered) == 1
    objective.extremes = torch.tensor([0.5, 2.0, 0.1])
    assert found.task.logged(run, 3)["ratio_max"] == 2.0


def test_a_reward_of_weight_0_is_only_logged():
    """It neither keeps a reply in the statistics, nor makes a group useful."""
    nan = math.nan
    group = [Reply([1], [-1.0], True, rewards) for rewards in ([1.0, 5.0], [1.0, 6.0], [nan, 7.0])]
    assert has_agreed(group, [1.0, 0.0]) and has_agreed(group, [1.0, 0.0], "each") and not has_agreed(group, [1.0, 1.0])
    assert sum_rewards(np.array([each.rewards for each in group]), [2.0, 0.0]).tolist() == [2.0, 2.0]


def test_groups_that_agree():
    nan = math.nan
    for rewards_GK, agrees in (
        ([[1], [1]], (True, True)),
        ([[1], [0]], (False, False)),
        ([[1], [nan], [1]], (True, True)),
        ([[nan], [nan]], (True, True)),
        ([[1, 0], [0, 1]], (True, False)),  # equal sums; each differs
        ([[1, nan], [1, 0.0]], (True, True)),
    ):
        group = [Reply([1], [-1.0], True, rewards) for rewards in rewards_GK]
        assert tuple(has_agreed(group, [1.0] * len(rewards_GK[0]), how) for how in ("sum", "each")) == agrees, rewards_GK


def test_each_prompt_once_an_epoch():
    drawn = [prompt for number in range(12) for prompt in choose_prompts(3, number, 5, 12)]
    epochs = [drawn[first : first + 12] for first in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert all(one != other for one, other in pairwise(epochs)) and choose_prompts(4, 0, 5, 12) != drawn[:5]
    assert sorted(choose_prompts(0, 0, 9, 3)) == sorted([0, 1, 2] * 3), "a rollout of several epochs"
    assert len(set(choose_more(0, 0, 1, 12, 12))) == 12 and len(choose_more(0, 0, 1, 9, 3)) == 9


def test_a_reply_does_not_depend_on_the_other_prompts(place):
    whole, part = draw_uniforms(5, 2, 0, [0, 1, 2], 4, 8), draw_uniforms(5, 2, 0, [1], 4, 8)
    assert torch.equal(whole[4:8], part) and len({row[0].item() for row in whole}) == 12
    others = draw_uniforms(6, 2, 0, [1], 4, 8), draw_uniforms(5, 3, 0, [1], 4, 8), draw_uniforms(5, 2, 1, [1], 4, 8)
    assert all((part != other).all() for other in others)
    each = opened(place)
    one, other = (each.source.sample(each.network, 0, 0, prompts)[1] for prompts in ([3, 5], [7, 5, 1]))
    assert [reply.ids for reply in one] == [reply.ids for reply in other]
    assert absolute([np.array(r.log_probs) for r in one], [np.array(r.log_probs) for r in other]) < 1e-12


# ---- state


def test_a_rollout_through_json_is_the_same_bits(place):
    each = rolled(place, rewards=Given(some, length), beta=0.1)
    rollout = each.rollout
    assert np.isnan(rollout.rewards_NK).any()
    restored = Rollout.from_state_dict(json.loads(json.dumps(rollout.state_dict(), allow_nan=False)))
    for field in fields(Rollout):
        ours, theirs = getattr(rollout, field.name), getattr(restored, field.name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes(), field.name
            assert theirs.flags.writeable
        else:
            assert type(ours) is type(theirs) and ours == theirs, field.name
    other = opened(place, rewards=Given(some, length), beta=0.1)
    other.source.load_state_dict(json.loads(json.dumps(each.source.state_dict())))
    for ours, theirs in zip(each.batches, other.source.complete(0), strict=True):
        assert ours.keys() == theirs.keys() >= {OLD, REFERENCE, SAMPLER, ADVANTAGES}
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    bare = Rollout.from_groups(0, [], [])
    assert deepcopy(bare).old_M is None and Rollout.from_state_dict(bare.state_dict()).reference_M is None


def test_held_out_prompts_are_drawn(place):
    """Not the first of the file; the same draw in each validation; all of them where there are no more."""
    task, _ = open_policy(place, validation_prompts=2)
    every = task.data.validation.values
    assert len(every) == 4 and len(task.scored_prompts()) == 2 and task.scored_prompts() == task.scored_prompts()
    assert "4 held out, of which 2 are scored, each 50 % of every score" in task.introduction()
    assert open_policy(place, validation_prompts=9)[0].scored_prompts() == open_policy(place)[0].data.validation.values


def test_a_thought_that_the_template_opens_is_of_the_prompt(place):
    task, _ = open_policy(place)
    assert not task.opens_thought and not task.data.train.values[0].text.endswith("<think>")
    template = ChatTemplate("r1", task.template.source + "{% if add_generation_prompt %}<think>\n{% endif %}")
    vars(task).pop("opens_thought")
    task.template = template
    assert task.opens_thought


def test_records_are_checked_before_the_first_step(place):
    """A reward that a record cannot have is an error at the start."""
    with pytest.raises(TrainError, match="has no number"):
        open_policy(place, reward=("number",))

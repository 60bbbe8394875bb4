"""Policy losses beside TRL's trainers, and in float64 beside the papers' formulas in plain loops; gradients too.

TRL's own language-model head returns float32. So its trainers run twice: on a small network, and on log-probabilities of tokens
that are given to them in float64 in the network's place.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import trl
from trl.trainer.utils import nanstd

from tests.chat_tokenizers import WRITERS
from tests.compare import absolute, mixed
from train.losses.advantages import combine_rewards, group_advantages
from train.losses.entropy import token_log_probs_and_entropy
from train.losses.kl import kl_estimate
from train.losses.policy import POLICY_DETAILS, POLICY_LOSSES
from train.losses.sampler import SAMPLER_KINDS, sampler_weights

TRL = f"trl {trl.__version__}"
ROUNDING = "float64 rounding; sums in another order"
SINGLE = "TRL's head is float32"
PAPERS = "the papers' formulas in float64"
PROMPT, LONGEST, LIMIT, TEMPERATURE = 3, 9, 16, 0.7
LENGTHS = (1, 9, 4, 6, 2, 7)


class Batch:
    """Replies of 1 to 9 tokens, log-probabilities of their tokens before and now, advantages, a reference's and a sampler's."""

    def __init__(self, spread=0.4):
        self.mask = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
        shape = self.mask.shape

        def noise():
            return spread * torch.randn(shape, dtype=torch.float64)

        self.old = -2 * torch.rand(shape, dtype=torch.float64)
        self.logps = (self.old + noise()).requires_grad_()
        self.reference, self.sampler = self.old + noise(), self.old + 2 * noise()
        self.advantages = torch.tensor([1.3, -0.7, 0.4, -1.1, -0.2, 0.9], dtype=torch.float64)

    def ours(self, name, **settings):
        """Our loss of the batch."""
        if "max_length" in POLICY_DETAILS[name].settings:
            settings["max_length"] = LIMIT
        total, count = POLICY_LOSSES[name](self.logps, self.old, self.advantages, self.mask, **settings)
        return total / count

    def with_gradient(self, loss):
        """(loss, its gradient by the log-probabilities of the tokens)."""
        (gradient,) = torch.autograd.grad(loss, self.logps, retain_graph=True)
        return loss.detach(), gradient

    def theirs(self):
        """TRL's batch."""
        rows = len(self.mask)
        return {
            "prompt_ids": torch.ones(rows, PROMPT, dtype=torch.long),
            "prompt_mask": torch.ones(rows, PROMPT, dtype=torch.long),
            "completion_ids": torch.ones(self.mask.shape, dtype=torch.long),
            "completion_mask": self.mask.long(),
            "advantages": self.advantages,
            "old_per_token_logps": self.old,
            "ref_per_token_logps": self.reference,
            "old_logps": (self.old * self.mask).sum(-1),
            "num_items_in_batch": self.mask.sum(),
        }

    def network(self, **inputs):
        """TRL calls it: it returns these log-probabilities."""
        padded = torch.cat([torch.zeros(len(self.mask), PROMPT), self.logps], dim=1)
        return SimpleNamespace(log_probs=padded, entropy=padded.detach())


# ---- TRL's trainers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small network with its tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("policy") / "network"
    WRITERS["byte-level"](folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=600, n_positions=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    return folder


def build_trainer(kind, config, folder, out):
    from datasets import Dataset

    def reward(completions, **columns):
        return [0.0] * len(completions)

    options = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 2, "num_generations": 2}
    args = config(output_dir=str(out), max_completion_length=LIMIT, temperature=TEMPERATURE, **options)
    data = Dataset.from_list([{"prompt": "How?"}, {"prompt": "a"}])
    trainer = kind(str(folder), reward_funcs=reward, args=args, train_dataset=data)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.fixture(scope="module")
def grpo_trainer(folder, tmp_path_factory):
    return build_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder, tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="module")
def rloo_trainer(folder, tmp_path_factory):
    return build_trainer(trl.RLOOTrainer, trl.RLOOConfig, folder, tmp_path_factory.mktemp("rloo"))


@pytest.fixture
def grpo(grpo_trainer, monkeypatch):
    """theirs(batch, our name, **our settings) -> TRL's loss."""

    def theirs(batch, name, *, beta=0.0, weights=None, corrects_kl=False, **settings):
        known = {**POLICY_DETAILS[name].settings, **settings}
        changed = {
            "loss_type": "grpo" if name == "gspo" else name,
            "importance_sampling_level": "sequence" if name == "gspo" else "token",
            "epsilon_low": known.get("clip_low"),
            "epsilon_high": known.get("clip_high", known.get("cap")),
            "beta": beta,
            "use_vllm": weights is not None,
            "vllm_importance_sampling_correction": weights is not None,
        }
        for key, value in changed.items():
            monkeypatch.setattr(grpo_trainer, key, value)
        monkeypatch.setattr(grpo_trainer.args, "use_bias_correction_kl", corrects_kl)
        monkeypatch.setattr(grpo_trainer.args, "steps_per_generation", 1)
        return grpo_trainer._compute_loss(batch.network, batch.theirs() | {"importance_sampling_ratio": weights})

    return theirs


IN_GRPO_TRAINER = [name for name in POLICY_LOSSES if name not in ("rloo", "ppo")]


@pytest.mark.parametrize("name", IN_GRPO_TRAINER)
def test_grpo_trainer(name, grpo, parity):
    """Beyond the clips on both sides; with the KL term of k3, with and without TRL's factor; with weights for the sampler."""
    batch = Batch()
    log_ratio = batch.logps - batch.old
    weights = sampler_weights(batch.old, batch.sampler, batch.mask)
    assert (weights == 3).any() and (weights < 0.5).any()
    kl = kl_estimate(batch.logps, batch.reference)
    ratio = log_ratio.exp()
    if name == "gspo":
        ratio = ((log_ratio * batch.mask).sum(-1) / batch.mask.sum(-1)).exp()[:, None]
    cases = {
        "loss": ({}, {}),
        "kl": ({"kl_BT": kl, "beta": 0.3}, {"beta": 0.3}),
        "kl times ratio": ({"kl_BT": kl * ratio, "beta": 0.3}, {"beta": 0.3, "corrects_kl": True}),
        "weights": ({"weights_BT": weights, "kl_BT": kl, "beta": 0.3}, {"weights": weights, "beta": 0.3}),
    }
    found, expected = {}, {}
    for case, (mine, other) in cases.items():
        found[case] = batch.with_gradient(batch.ours(name, **mine))
        expected[case] = batch.with_gradient(grpo(batch, name, **other))
    parity(f"policy losses: {name}, float64", f"{TRL} GRPOTrainer", mixed(found, expected), 1e-12, ROUNDING)
    for one in cases:
        for other in cases:
            assert one == other or mixed(found[one], expected[other]) > 1e-3, "the comparison sees each part"
    key = "cap" if name == "cispo" else "clip_high"
    value = 1.1 if name == "cispo" else 1e-4
    assert mixed(batch.with_gradient(batch.ours(name, **{key: value})), expected["loss"]) > 1e-4, "and the clip"


@pytest.mark.parametrize("spread", [0.4, 0.05])
def test_rloo_trainer(spread, rloo_trainer, parity):
    """All ratios clipped away, or few."""
    batch = Batch(spread)
    found = batch.with_gradient(batch.ours("rloo"))
    expected = batch.with_gradient(rloo_trainer._compute_loss(batch.network, batch.theirs()))
    assert expected[1].abs().sum() > 0
    parity(f"policy losses: rloo, spread {spread}", f"{TRL} RLOOTrainer", mixed(found, expected), 1e-12, ROUNDING)


def test_a_network_at_a_temperature(grpo_trainer, rloo_trainer, monkeypatch, parity):
    """TRL's real forward, in float32, with lengths 1 and 9; log-probabilities and entropies of ours beside its own."""
    batch, network = Batch(), grpo_trainer.model.eval()
    ids = torch.randint(0, 600, (len(LENGTHS), PROMPT + LONGEST))
    mask = torch.cat([torch.ones(len(LENGTHS), PROMPT, dtype=torch.long), batch.mask.long()], dim=1)
    labels = torch.where(mask.bool(), ids, -100)[:, 1:]
    labels[:, : PROMPT - 1] = -100
    hidden = network.transformer(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    weight = network.lm_head.weight
    log_p, entropy = token_log_probs_and_entropy(hidden, weight, labels, temperature=TEMPERATURE)
    theirs = grpo_trainer._get_per_token_logps_and_entropies(network, ids, mask, LONGEST, compute_entropy=True)
    ours = log_p[:, PROMPT - 1 :], entropy[:, PROMPT - 1 :]
    error = max(absolute(a * batch.mask, b * batch.mask) for a, b in zip(ours, theirs[:2], strict=True))
    parity("log-probabilities and entropies of tokens", f"{TRL} GRPOTrainer", error, 5e-6, SINGLE)
    forgotten, _ = token_log_probs_and_entropy(hidden, weight, labels)
    assert absolute(forgotten, log_p) > 1e-2, "the comparison sees the temperature"
    batch.old = (ours[0].detach() + 0.3 * torch.randn(batch.mask.shape)).float()
    batch.advantages = batch.advantages.float()
    inputs = batch.theirs() | {"completion_ids": ids[:, PROMPT:], "prompt_ids": ids[:, :PROMPT]}
    worst = []
    for trainer, names in ((grpo_trainer, ("grpo", "dapo", "dr_grpo")), (rloo_trainer, ("rloo",))):
        for name in names:
            monkeypatch.setattr(trainer, "loss_type", name, raising=False)
            monkeypatch.setattr(trainer, "epsilon_high", POLICY_DETAILS[name].settings["clip_high"])
            expected = trainer._compute_loss(network, inputs)
            settings = {"max_length": LIMIT} if name == "dr_grpo" else {}
            total, count = POLICY_LOSSES[name](ours[0], batch.old, batch.advantages, batch.mask, **settings)
            gradients = [torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (total / count, expected)]
            worst.append(mixed((total / count, gradients[0]), (expected, gradients[1])))
    parity("policy losses: a network's", TRL, max(worst), 5e-6, SINGLE)


def test_trl_divides_bnpo_by_local_tokens(grpo):
    """A difference: the same replies in two micro-batches have TRL's loss only if their tokens are counted apart."""
    whole = Batch()
    together = grpo(whole, "bnpo").detach()
    apart = []
    for rows in (slice(0, 1), slice(1, 6)):
        part = Batch()
        part.mask, part.old, part.logps, part.reference, part.advantages = (
            x.detach()[rows] for x in (whole.mask, whole.old, whole.logps, whole.reference, whole.advantages)
        )
        apart.append(grpo(part, "bnpo").detach() / 2)
    assert abs(sum(apart) - together) > 1e-2 and absolute(whole.ours("bnpo"), together) < 1e-12


# ---- the papers' formulas, in plain loops


def least(a, b):
    return a if a <= b else b


def clip(x, low, high):
    return x.clamp(1 - low, 1 + high)


def twin(name, batch, beta=0.0):
    """The loss of a batch by its paper, reply by reply and token by token; k3 with beta."""
    replies, tokens, total = len(LENGTHS), sum(LENGTHS), 0.0
    for i, length in enumerate(LENGTHS):
        a = batch.advantages[i]
        rho = [torch.exp(batch.logps[i, t] - batch.old[i, t]) for t in range(length)]
        if name == "gspo":
            one = math.prod(rho) ** (1 / length)
            loss = [-least(one * a, clip(one, 3e-4, 4e-4) * a)] * length
        elif name == "rloo":
            one = math.prod(rho)
            loss = [-least(one * a, clip(one, 0.2, 0.2) * a) / length] * length
        elif name == "cispo":
            loss = [-min(float(r.detach()), 5.0) * a * batch.logps[i, t] for t, r in enumerate(rho)]
        else:
            high = 0.28 if name == "dapo" else 0.2
            loss = [-least(r * a, clip(r, 0.2, high) * a) for r in rho]
        for t in range(length):
            d = batch.reference[i, t] - batch.logps[i, t]
            each = loss[t] + beta * (torch.exp(d) - d - 1)
            weight = {"grpo": 1 / length / replies, "gspo": 1 / length / replies, "rloo": 1 / replies}
            weight |= {"dr_grpo": 1 / (replies * LIMIT)}
            total = total + each * weight.get(name, 1 / tokens)
    return total


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_formulas_of_the_papers(name, beta, parity):
    batch = Batch(0.05 if name == "rloo" else 0.4)
    settings = {"kl_BT": kl_estimate(batch.logps, batch.reference), "beta": beta} if beta else {}
    found, expected = (batch.with_gradient(x) for x in (batch.ours(name, **settings), twin(name, batch, beta)))
    parity(f"policy losses: {name}, formula, beta {beta}", PAPERS, mixed(found, expected), 1e-12, ROUNDING)
    assert expected[1][~batch.mask].abs().sum() == 0 < expected[1].abs().sum()


def test_clips_keep_the_lower_of_both():
    """A gradient of 0 where the ratio has left the range in the direction that the advantage asks for, and there alone."""
    log_ratio = torch.tensor([[0.5, -0.5], [0.5, -0.5]], dtype=torch.float64)
    logps = log_ratio.clone().requires_grad_()
    advantages, mask = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.ones(2, 2)
    for name in ("grpo", "bnpo", "dapo", "dr_grpo"):
        settings = {"max_length": 4} if name == "dr_grpo" else {}
        total, _ = POLICY_LOSSES[name](logps, torch.zeros(2, 2).double(), advantages, mask, **settings)
        (gradient,) = torch.autograd.grad(total, logps)
        assert (gradient != 0).tolist() == [[False, True], [True, False]]
    total, _ = POLICY_LOSSES["cispo"](logps, torch.zeros(2, 2).double(), advantages, mask, cap=1.5)
    (gradient,) = torch.autograd.grad(total, logps)
    assert gradient.tolist() == [[-1.5, -math.exp(-0.5)], [1.5, math.exp(-0.5)]], "no token loses its gradient"


# ---- KL


def gradients_of_kl():
    """By the logits of a categorical policy, exactly: of KL(π‖ref), KL(ref‖π), and of each estimate in expectation."""
    logits = torch.tensor([0.3, -1.2, 0.8, 0.1, -0.4], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.5, 0.4, 0.9, -1.0, 0.2], dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    p = log_p.detach().exp()  # the tokens are drawn: their frequencies have no gradient

    def gradient(x):
        return torch.autograd.grad(x, logits, retain_graph=True)[0]

    exact = {"reverse": (log_p.exp() * (log_p - reference)).sum(), "forward": (reference.exp() * (reference - log_p)).sum()}
    ratio = (log_p - log_p.detach()).exp()
    found = {kind: p @ kl_estimate(log_p, reference, kind) for kind in ("k1", "k2", "k3")}
    found |= {f"{kind} ρ": p @ (ratio * kl_estimate(log_p, reference, kind)) for kind in ("k1", "k2", "k3")}
    values = {name: x.item() for name, x in (exact | found).items()}
    return values, {name: gradient(x) for name, x in (exact | found).items()}


def test_gradients_of_kl_estimates(parity):
    values, gradients = gradients_of_kl()
    assert values["k1"] == pytest.approx(values["reverse"], rel=1e-12) == values["k3"]
    assert values["k2"] != pytest.approx(values["reverse"], rel=1e-2)
    same = {"k1": 0 * gradients["reverse"], "k2": gradients["reverse"], "k3": gradients["forward"]}
    same |= {"k1 ρ": gradients["reverse"], "k3 ρ": gradients["reverse"]}
    error = absolute({name: gradients[name] for name in same}, same)
    parity("KL estimates: expected gradients", "enumeration in float64", error, 1e-14, ROUNDING)
    for name, other in {"k1": "reverse", "k3": "reverse", "k2": "forward", "k2 ρ": "reverse"}.items():
        assert absolute(gradients[name], gradients[other]) > 1e-2


def test_kl_formulas(parity):
    log_p, reference = (torch.randn(4, 5, dtype=torch.float64) for _ in range(2))
    log_p.requires_grad_()
    ratio = (reference - log_p).exp()
    twins = {"k1": -ratio.log(), "k2": ratio.log() ** 2 / 2, "k3": ratio - 1 - ratio.log()}
    reference.requires_grad_()
    for kind, expected in twins.items():
        found = kl_estimate(log_p, reference, kind)
        gradients = [torch.autograd.grad(x.sum(), log_p, retain_graph=True)[0] for x in (found, expected)]
        parity(f"KL estimates: {kind}", PAPERS, mixed((found, gradients[0]), (expected, gradients[1])), 1e-12, ROUNDING)
        assert torch.autograd.grad(found.sum(), reference, allow_unused=True) == (None,)
        assert (found >= 0).all() == (kind != "k1")
    tiny = kl_estimate(torch.tensor(-1.0), torch.tensor(-1.0 + 2**-12))
    assert tiny == pytest.approx(2.0**-25, rel=1e-3), "in float32 near 0, where e^d − 1 has lost half of its digits"


# ---- advantages


def loop_advantages(rewards, groups, scale, baseline, epsilon):
    """By the definitions, reply by reply."""
    given = [r for r in rewards if not math.isnan(r)]
    found = []
    for reward, group in zip(rewards, groups, strict=True):
        own = [r for r, g in zip(rewards, groups, strict=True) if g == group and not math.isnan(r)]
        if math.isnan(reward) or len(own) == 1:
            found.append(0.0)
            continue
        others = list(own)
        others.remove(reward)
        base = sum(own) / len(own) if baseline == "mean" else sum(others) / len(others)
        of = own if scale == "group" else given
        mean = sum(of) / len(of)
        std = math.sqrt(sum((r - mean) ** 2 for r in of) / (len(of) - 1))
        found.append((reward - base) / (1 if scale == "none" else std + epsilon))
    return torch.tensor(found, dtype=torch.float64)


GROUPS = [5, 5, 2, 5, 2, 5, 9, 7, 7, 7]
REWARDS = [1.0, 0.25, 3.0, -1.0, 0.5, math.nan, 2.0, 0.1, 0.1, 0.1]


@pytest.mark.parametrize("baseline", ["mean", "others"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_by_loops(scale, baseline, parity):
    """Groups in any order: of 4 with one left out, of 2, of 1, and of equal rewards whose mean is rounded."""
    rewards, groups = torch.tensor(REWARDS, dtype=torch.float64), torch.tensor(GROUPS)
    found = group_advantages(rewards, groups, scale=scale, baseline=baseline, epsilon=1e-3)
    assert found[[5, 6, 7, 8, 9]].tolist() == [0] * 5, "exactly"
    expected = loop_advantages(REWARDS, GROUPS, scale, baseline, 1e-3)
    parity(f"advantages: {scale}, {baseline}", PAPERS, absolute(found, expected), 1e-12, ROUNDING)


def test_advantages_of_trl(parity):
    """By the functions that its trainers call, on equal groups: scaled by group and batch, leave-one-out, GDPO."""
    rewards = torch.randn(5, 4, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1])
    rewards[0, 1, 0] = rewards[2, :2, 1] = rewards[3, 3] = torch.nan
    weights, groups = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64), torch.arange(5).repeat_interleave(4)
    summed = (rewards * weights).nansum(-1).where(~rewards.isnan().all(-1), torch.nan)
    flat = rewards.view(20, 3)
    ours = combine_rewards(flat, weights, groups)
    centred = summed - summed.nanmean(1, keepdim=True)
    scored = (~summed.isnan()).sum(1, keepdim=True)
    each = (rewards - rewards.nanmean(1, keepdim=True)) / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    gdpo = (each * weights).nansum(-1).where(~rewards.isnan().all(-1), torch.nan).flatten()
    expected = {
        "sum": summed.flatten().nan_to_num(),
        "group": (centred / (nanstd(summed, dim=1, keepdim=True) + 1e-4)).flatten().nan_to_num(),
        "batch": (centred / (nanstd(summed) + 1e-4)).flatten().nan_to_num(),
        "others": (summed - (summed.nansum(1, keepdim=True) - summed) / (scored - 1)).flatten().nan_to_num(),
        "gdpo": ((gdpo - gdpo.nanmean()) / (nanstd(gdpo) + 1e-4)).nan_to_num(),
    }
    each = combine_rewards(flat, weights.tolist(), groups, normalize="each")
    assert ours.isnan().nonzero().tolist() == each.isnan().nonzero().tolist() == [[15]]
    found = {
        "sum": ours.nan_to_num(),
        "group": group_advantages(ours, groups),
        "batch": group_advantages(ours, groups, scale="batch"),
        "others": group_advantages(ours, groups, scale="none", baseline="others"),
        "gdpo": group_advantages(each, torch.zeros_like(groups)),
    }
    scaled = ("group", "batch", "gdpo")
    errors = {name: mixed(found[name], expected[name]) for name in found}
    parity("advantages: as they are", TRL, max(errors[name] for name in found if name not in scaled), 1e-12, ROUNDING)
    reason = "TRL's n / (n − 1) is float32"
    parity("advantages: scaled", TRL, max(errors[name] for name in scaled), 1e-7, reason)


# ---- weights for a sampler


@pytest.mark.parametrize("kind", SAMPLER_KINDS)
def test_sampler_weights_by_loops(kind, parity):
    batch, cap = Batch(), 1.5
    expected = torch.ones(len(LENGTHS), LONGEST, dtype=torch.float64)
    for i, length in enumerate(LENGTHS):
        token = [math.exp(batch.old[i, t] - batch.sampler[i, t]) for t in range(length)]
        for t in range(length):
            weight = token[t] if kind.startswith("token") else math.prod(token)
            expected[i, t] = min(weight, cap) if kind.endswith("truncate") else (weight if weight <= cap else 0)
    found = sampler_weights(batch.old, batch.sampler, batch.mask, kind=kind, cap=cap)
    assert found.shape == ((6, LONGEST) if kind.startswith("token") else (6, 1))
    assert (found == (cap if kind.endswith("truncate") else 0)).any() and (found < 1).any()
    found = found.expand(6, LONGEST).where(batch.mask, 1.0)
    parity(f"sampler weights: {kind}", PAPERS, absolute(found, expected), 1e-12, ROUNDING)

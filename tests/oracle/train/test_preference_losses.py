"""Preference losses beside TRL's trainers, and in float64 beside the papers' formulas written out; gradients too.

TRL's own language-model head returns float32. So its trainers run twice: on a small network, and on log-probabilities of tokens
that are given to them in float64 in the network's place.
"""

from types import SimpleNamespace

import pytest
import torch
import trl

from tests.chat_tokenizers import WRITERS
from tests.compare import absolute, mixed
from train.losses.divergence import f_divergence, transform_log_ratios
from train.losses.mixture import parse_losses
from train.losses.pair_weights import ld_token_weights, wpo_weights
from train.losses.preference import PREFERENCE_DETAILS, PREFERENCE_LOSSES
from train.losses.preference_replies import kto_unpaired, kto_z
from train.losses.preference_sorted import aot_pairs

TRL = f"trl {trl.__version__}"
ROUNDING = "float64 rounding; sums in another order"
SINGLE = "TRL's head, and some of its numbers, are float32"
PAPERS = "the papers' formulas in float64"
PAIRS, PROMPT, LONGEST = 5, 3, 9
NOT_IN_DPO_TRAINER = ("conservative", "ipo_sum", "dpop", "kto", "cpo", "simpo", "orpo")
TRL_NAMES = [name for name in PREFERENCE_LOSSES if name not in NOT_IN_DPO_TRAINER]


# ---- replies, and TRL's trainers on them


class Replies:
    """Chosen replies over rejected ones, of 1 to 9 tokens after a prompt of 3, with log-probabilities of their tokens."""

    def __init__(self, dtype=torch.float64):
        lengths = torch.tensor([4, 9, 1, 6, 3, 7, 2, 8, 6, 1])  # of the chosen five, then of the rejected five
        self.chosen_length, self.rejected_length = lengths.chunk(2)
        self.mask = torch.arange(PROMPT + LONGEST) < PROMPT + lengths[:, None]
        self.is_reply = self.mask & (torch.arange(PROMPT + LONGEST) >= PROMPT)
        self.ids = torch.randint(0, 40, self.mask.shape)
        shape = len(lengths), PROMPT + LONGEST - 1
        scored = self.is_reply[:, 1:]
        self.policy = (-2 * torch.rand(shape, dtype=dtype) * scored).requires_grad_()
        harder = 0.3 + torch.rand(len(lengths), 1, dtype=dtype)  # otherwise both would sort the pairs by their lengths
        self.reference = -2 * harder * torch.rand(shape, dtype=dtype) * scored
        self.square = -torch.rand(shape, dtype=dtype) * scored  # log Σ_v p_v²

    def sums(self, weights=1.0):
        """The four arguments of a loss."""
        return *(self.policy * weights).sum(-1).chunk(2), *(self.reference * weights).sum(-1).chunk(2)

    @property
    def lengths(self):
        return {"chosen_length": self.chosen_length, "rejected_length": self.rejected_length}

    def batch(self):
        return {"input_ids": self.ids, "attention_mask": self.mask.long(), "completion_mask": self.is_reply.long()}

    def network(self, log_probs):
        """What TRL calls: it returns these log-probabilities."""
        blank = torch.zeros_like(self.square)
        output = {"log_probs": log_probs, "entropy": blank, "mean_logits": blank, "is_top1": blank.bool()}
        return lambda **inputs: SimpleNamespace(**output, log_sum_sq_probs=self.square)


def ours(name, sums, replies, **settings):
    """Our loss, of the settings those that it has."""
    details = PREFERENCE_DETAILS[name]
    known = {key: value for key, value in settings.items() if key in ("beta", *details.settings)}
    return PREFERENCE_LOSSES[name](*sums, **({"beta": 0.3} | known), **(replies.lengths if details.needs_lengths else {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small network with its tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("preferences") / "network"
    WRITERS["byte-level"](folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=600, n_positions=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    return folder


OPTIONS = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def dpo_trainer(folder, tmp_path_factory):
    from datasets import Dataset

    rows = [{"prompt": "How?", "chosen": " so it is", "rejected": " no"}, {"prompt": "a", "chosen": " b", "rejected": " c d e"}]
    args = trl.DPOConfig(output_dir=str(tmp_path_factory.mktemp("dpo")), **OPTIONS)
    return trl.DPOTrainer(str(folder), args=args, train_dataset=Dataset.from_list(rows))


@pytest.fixture
def dpo(dpo_trainer, monkeypatch):
    """theirs(replies, loss types, **attributes of the trainer) -> (loss, its gradient by the policy's log-probabilities)."""

    def theirs(replies, *losses, **attributes):
        changed = {"loss_types": list(losses), "loss_weights": [1.0] * len(losses), "beta": 0.3, "label_smoothing": 0.1}
        for name, value in (changed | {"ref_model": replies.network(replies.reference)} | attributes).items():
            monkeypatch.setattr(dpo_trainer, name, value)
        loss = dpo_trainer._compute_loss(replies.network(replies.policy), replies.batch(), return_outputs=False)
        return with_gradient(loss, replies)

    return theirs


def with_gradient(loss, replies):
    """(loss, its gradient by the log-probabilities of the replies' tokens)."""
    (gradient,) = torch.autograd.grad(loss, replies.policy, retain_graph=True)
    return loss.detach(), gradient * replies.is_reply[:, 1:]


@pytest.mark.parametrize("name", TRL_NAMES)
def test_dpo_trainer(name, dpo, parity):
    replies = Replies()
    found = with_gradient(ours(name, replies.sums(), replies, label_smoothing=0.1).mean(), replies)
    tolerance, reason = (1e-6, SINGLE) if name == "exo_pair" else (1e-12, ROUNDING)
    error = mixed(found, dpo(replies, name))
    parity(f"preference losses: {name}, float64", f"{TRL} DPOTrainer", error, tolerance, reason)
    assert mixed(found, dpo(replies, name, beta=0.31)) > 1e-4, "the comparison sees beta"


def test_dpo_trainer_on_a_network(dpo_trainer, monkeypatch, parity):
    """Its real batch, through its fused head in float32; the policy moved away from the reference."""
    batch = dpo_trainer.data_collator([dpo_trainer.train_dataset[index] for index in range(2)])
    policy, reference = dpo_trainer.model.eval(), dpo_trainer.ref_model.eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def log_probs(network):
        with torch.no_grad():
            logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
        picked = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (picked * batch["completion_mask"][:, 1:]).sum(-1).chunk(2)

    sums = *log_probs(policy), *log_probs(reference)
    chosen_length, rejected_length = batch["completion_mask"].sum(-1).chunk(2)
    replies = SimpleNamespace(lengths={"chosen_length": chosen_length, "rejected_length": rejected_length})
    assert absolute(sums[0], sums[2]) > 1e-2 and (chosen_length != rejected_length).any()
    found, theirs = {}, {}
    for name in TRL_NAMES:
        monkeypatch.setattr(dpo_trainer, "loss_types", [name])
        monkeypatch.setattr(dpo_trainer, "label_smoothing", 0.1)
        theirs[name] = dpo_trainer.compute_loss(policy, batch).detach()
        found[name] = ours(name, sums, replies, beta=0.1, label_smoothing=0.1).mean()
    parity("preference losses: a network's, 14 losses", f"{TRL} DPOTrainer", mixed(found, theirs), 1e-6, SINGLE)


DIVERGENCES = {
    "forward_kl": ("forward_kl", {}),
    "js": ("js_divergence", {}),
    "alpha 0.5": ("alpha_divergence", {"alpha": 0.5}),
    "alpha 1": ("alpha_divergence", {"alpha": 1.0}),
    "alpha 1.7": ("alpha_divergence", {"alpha": 1.7}),
}


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences(kind, dpo, parity):
    """For all losses that take one; alpha in float32, since TRL's has no other format."""
    other, options = DIVERGENCES[kind]
    is_single = other == "alpha_divergence"
    replies, worst = Replies(torch.float32 if is_single else torch.float64), []
    names = [name for name in TRL_NAMES if PREFERENCE_DETAILS[name].takes_divergence]
    assert names == ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop"]
    for name in names:
        sums = transform_log_ratios(*replies.sums(), kind=kind.split()[0], **options)
        loss = ours(name, sums, replies, label_smoothing=0.1).mean()
        expected = dpo(replies, name, f_divergence_type=other, f_alpha_divergence_coef=options.get("alpha"))
        error = mixed(with_gradient(loss, replies), expected)
        worst += [] if name == "exo_pair" and not is_single else [error]
        assert error < 1e-6
    tolerance, reason = (1e-6, SINGLE) if is_single else (1e-12, ROUNDING)
    parity(f"preference divergences: {kind}", f"{TRL} DPOTrainer", max(worst), tolerance, reason)


def test_wpo_weights(dpo, parity):
    """TRL's are aligned: log Σ_v p_v² is subtracted from each log-probability."""
    replies = Replies()
    lengths = torch.cat([replies.chosen_length, replies.rejected_length])
    means = ((replies.policy - replies.square).sum(-1) / lengths).chunk(2)
    weights = wpo_weights(*means)
    assert not weights.requires_grad
    loss = (ours("sigmoid", replies.sums(), replies) * weights).mean()
    expected = dpo(replies, "sigmoid", use_weighting=True)
    parity("WPO weights", f"{TRL} DPOTrainer", mixed(with_gradient(loss, replies), expected), 1e-12, ROUNDING)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_dpo(alpha, dpo, parity):
    replies = Replies()
    weights = torch.cat(ld_token_weights(*replies.is_reply[:, 1:].chunk(2), alpha, dtype=torch.float64))
    loss = ours("sigmoid", replies.sums(weights), replies).mean()
    expected = dpo(replies, "sigmoid", ld_alpha=alpha)
    parity(f"LD-DPO: alpha {alpha}", f"{TRL} DPOTrainer", mixed(with_gradient(loss, replies), expected), 1e-12, ROUNDING)


@pytest.mark.parametrize("text", ["sigmoid=1,sft=0.2", "sigmoid=0.8,bco_pair=0.2,sft=1"])
def test_mixtures(text, dpo, parity):
    replies, total = Replies(), 0.0
    names, weights = zip(*parse_losses(text), strict=True)
    for name, weight in zip(names, weights, strict=True):
        chosen = replies.policy[:PAIRS][replies.is_reply[:PAIRS, 1:]]
        total = total + weight * (-chosen if name == "sft" else ours(name, replies.sums(), replies)).mean()
    expected = dpo(replies, *names, loss_weights=list(weights))
    parity(f"preference mixtures: {text}", f"{TRL} DPOTrainer", mixed(with_gradient(total, replies), expected), 1e-12, ROUNDING)


@pytest.mark.parametrize("z_side", [1.0, -1.0])
def test_kto_trainer(z_side, folder, tmp_path, parity):
    from datasets import Dataset

    rows = [{"prompt": "How?", "completion": " so", "label": True}, {"prompt": "a", "completion": " c d", "label": False}]
    args = trl.KTOConfig(output_dir=str(tmp_path), **OPTIONS)
    trainer = trl.KTOTrainer(str(folder), args=args, train_dataset=Dataset.from_list(rows))
    replies = Replies()
    desirable = torch.arange(2 * PAIRS) < PAIRS
    mismatched = z_side * torch.rand(2 * PAIRS, 4, dtype=torch.float64)
    batch = replies.batch() | {"label": desirable, "KL_completion_mask": torch.ones(2 * PAIRS, 5)}
    batch |= {"KL_input_ids": torch.zeros(2 * PAIRS, 5, dtype=torch.long), "KL_attention_mask": torch.ones(2 * PAIRS, 5)}

    def network(log_probs, other):
        blank = torch.zeros_like(replies.square)
        output = {"entropy": blank, "mean_logits": blank, "is_top1": blank.bool()}
        return lambda **inputs: SimpleNamespace(log_probs=log_probs if inputs["input_ids"].size(1) > 5 else other, **output)

    trainer.beta, trainer.desirable_weight, trainer.undesirable_weight = 0.3, 1.2, 0.7
    trainer.ref_model = network(replies.reference, torch.zeros_like(mismatched))
    theirs = trainer._compute_loss(network(replies.policy, mismatched), batch, return_outputs=False)
    expected = with_gradient(theirs, replies)
    settings = {"beta": 0.3, "z": kto_z(mismatched.sum(-1)), "desirable_weight": 1.2, "undesirable_weight": 0.7}
    assert (settings["z"] > 0) == (z_side > 0)
    single = kto_unpaired((replies.policy - replies.reference).sum(-1), desirable, **settings).mean()
    pairs = PREFERENCE_LOSSES["kto"](*replies.sums(), **settings).mean()
    for part, loss in {"kto, single replies": single, "kto": pairs}.items():
        error = mixed(with_gradient(loss, replies), expected)
        parity(f"preference losses: {part}", f"{TRL} KTOTrainer", error, 1e-12, ROUNDING)


def test_reference_free_trainers(parity):
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    replies = Replies()
    cpu = SimpleNamespace(device="cpu")
    one = SimpleNamespace(alpha=0.0, loss_type="sigmoid", beta=0.3, label_smoothing=0.0, simpo_gamma=0.7, accelerator=cpu)
    sums = replies.sums()[:2]
    means = sums[0] / replies.chosen_length, sums[1] / replies.rejected_length
    expected = {"cpo": CPOTrainer.cpo_loss(one, *sums)[0]}
    one.loss_type = "simpo"
    expected["simpo"] = CPOTrainer.cpo_loss(one, *means)[0]
    expected["orpo"] = -ORPOTrainer.odds_ratio_loss(one, *means)[0]
    for name, theirs in expected.items():
        loss = ours(name, (*sums, None, None), replies, gamma=0.7)
        tolerance, reason = (1e-6, SINGLE) if name == "orpo" else (1e-12, ROUNDING)
        pairs = [(*with_gradient(each.mean(), replies), each.detach()) for each in (loss, theirs)]
        parity(f"preference losses: {name}", TRL, mixed(*pairs), tolerance, reason)


# ---- the papers' formulas


def s(x):
    return 1 / (1 + torch.exp(-x))


def log_s(x):
    return -torch.log(1 + torch.exp(-x))


def entropy_gap(p, q):
    """KL((p, 1 - p) || (q, 1 - q))."""
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


def odds(log_p):
    return torch.exp(log_p) / (1 - torch.exp(log_p))


TWINS = {  # of c, r, log π of both, lengths n and m, and beta
    "sigmoid": lambda x: -log_s(x.b * x.c - x.b * x.r),
    "conservative": lambda x: -0.8 * log_s(x.b * (x.c - x.r)) - 0.2 * log_s(x.b * (x.r - x.c)),
    "robust": lambda x: (-0.8 * log_s(x.b * (x.c - x.r)) + 0.2 * log_s(x.b * (x.r - x.c))) / 0.6,
    "hinge": lambda x: torch.clamp(1 - x.b * (x.c - x.r), min=0),
    "ipo": lambda x: (x.c / x.n - x.r / x.m - 1 / (2 * x.b)) ** 2,
    "ipo_sum": lambda x: (x.c - x.r - 1 / (2 * x.b)) ** 2,
    "sigmoid_norm": lambda x: -log_s(x.b * x.c / x.n - x.b * x.r / x.m),
    "exo_pair": lambda x: entropy_gap(torch.exp(x.b * x.c) / (torch.exp(x.b * x.c) + torch.exp(x.b * x.r)), 0.8),
    "discopop": lambda x: (
        (1 - s(x.b * (x.c - x.r) / 0.05)) * -log_s(x.b * (x.c - x.r))
        + s(x.b * (x.c - x.r) / 0.05) * torch.exp(-x.b * (x.c - x.r))
    ),
    "dpop": lambda x: -log_s(x.b * (x.c - x.r - 5 * torch.clamp(x.reference - x.policy, min=0))),
    "cpo": lambda x: -log_s(x.b * (x.policy - x.other)) + 0.6 * x.nll,
    "simpo": lambda x: -log_s(x.b * x.policy / x.n - x.b * x.other / x.m - 1.0),
    "orpo": lambda x: -x.b * log_s(torch.log(odds(x.policy / x.n) / odds(x.other / x.m))) + 0.6 * x.nll,
    "nca_pair": lambda x: -log_s(x.b * x.c) - 0.5 * (log_s(-x.b * x.c) + log_s(-x.b * x.r)),
    "bco_pair": lambda x: -log_s(x.b * x.c) - log_s(-x.b * x.r),
    "sppo_hard": lambda x: (x.c - 1 / x.b * (1 - 0.5)) ** 2 + (x.r - 1 / x.b * (0 - 0.5)) ** 2,
    "apo_zero": lambda x: (1 - s(x.b * x.c)) + s(x.b * x.r),
    "apo_down": lambda x: s(x.b * x.c) + (1 - s(x.b * x.c - x.b * x.r)),
    "kto": lambda x: 1.2 * (1 - s(x.b * (x.c - 0.4))) / 2 + 0.7 * (1 - s(x.b * (0.4 - x.r))) / 2,
    "aot": lambda x: -log_s(x.b * ((x.policy - x.other)[x.by_margin] - (x.c - x.r - x.policy + x.other).neg().sort()[0])),
    "aot_unpaired": lambda x: -log_s(x.b * (x.c.sort()[0] - x.r.sort()[0])),
}
SETTINGS = {"dpop": {"dpop_lambda": 5.0}, "kto": {"z": 0.4, "desirable_weight": 1.2, "undesirable_weight": 0.7}}
SETTINGS |= {name: {"label_smoothing": 0.2} for name in ("conservative", "robust", "exo_pair")}
WITH_NLL = ("cpo", "orpo")


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_formulas_of_the_papers(name, parity):
    replies = Replies()
    policy, other, reference, other_reference = replies.sums()
    nll = -policy / replies.chosen_length
    x = SimpleNamespace(
        b=0.3, c=policy - reference, r=other - other_reference, n=replies.chosen_length, m=replies.rejected_length,
        policy=policy, other=other, reference=reference, nll=nll, by_margin=(policy - other).argsort(),
    )  # fmt: skip
    settings = SETTINGS.get(name, {}) | ({"nll": nll, "alpha": 0.6} if name in WITH_NLL else {})
    lengths = replies.lengths if PREFERENCE_DETAILS[name].needs_lengths else {}
    loss = PREFERENCE_LOSSES[name](policy, other, reference, other_reference, beta=0.3, **lengths, **settings)
    expected = TWINS[name](x)
    assert loss.shape == expected.shape == (PAIRS,)
    if PREFERENCE_DETAILS[name].sees_batch and name != "kto":  # by rank there, by row here
        loss, expected = loss.sort()[0], expected.sort()[0]
    weights = torch.rand(PAIRS, dtype=torch.float64) if not name.startswith("aot") else torch.ones(PAIRS).double()
    pairs = [(each.detach(), *with_gradient(each @ weights, replies)) for each in (loss, expected)]
    parity(f"preference losses: {name}, formula", PAPERS, mixed(*pairs), 1e-12, ROUNDING)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_partners_of_a_step(name, is_tied, parity):
    """Micro-batches with partners of the whole step have its losses and gradients; sorted each by itself they have not."""
    replies = Replies()
    if is_tied:
        with torch.no_grad():
            replies.policy.copy_(replies.reference)
    sums, loss = replies.sums(), PREFERENCE_LOSSES[name]
    whole = loss(*sums, beta=0.3, label_smoothing=0.1)
    partners = aot_pairs(*(each.detach() for each in sums), unpaired=name == "aot_unpaired")
    rows = torch.tensor([0, 1]), torch.tensor([4, 3, 2])
    found, alone = torch.zeros_like(whole), torch.zeros_like(whole)
    for each in rows:
        part = [x[each] for x in sums]
        own = tuple(x[each] for x in partners)
        found = found.index_add(0, each, loss(*part, beta=0.3, label_smoothing=0.1, partners=own))
        alone = alone.index_add(0, each, loss(*part, beta=0.3, label_smoothing=0.1))
    results = [(x.detach(), *with_gradient(x.sum(), replies)) for x in (found, whole, alone)]
    parity(f"AOT in micro-batches: {name}", "one batch", mixed(*results[:2]), 1e-12, ROUNDING)
    assert is_tied or mixed(results[2], results[1]) > 1e-3


def test_divergence_formulas(parity):
    """f'(t) of t = π/π_ref, by autograd of the divergence's f; and 0 at t = 1."""
    t = torch.linspace(0.2, 5, 40, dtype=torch.float64).requires_grad_()
    functions = {
        ("reverse_kl", 0.5): t * torch.log(t) - t,  # f' = log t
        ("forward_kl", 0.5): -torch.log(t) + t,
        ("js", 0.5): t * torch.log(2 * t / (t + 1)) - torch.log((t + 1) / 2),
        ("alpha", 0.5): (t**0.5 / 0.5 - t) / (0.5 - 1),
        ("alpha", -1.0): (t**-1 / -1 - t) / -2,
    }
    worst = max(
        mixed(f_divergence(t.log(), kind, alpha=alpha), torch.autograd.grad(f.sum(), t)[0])
        for (kind, alpha), f in functions.items()
    )
    parity("preference divergences: formulas", PAPERS, worst, 1e-12, ROUNDING)

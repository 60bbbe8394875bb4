"""Preference objectives beside TRL's trainers on the same records, through TRL's own pipeline: ids, loss and gradients.

The policy has moved away from the reference, and both come from folders. TRL learns what a template writes behind a reply's
terminator; its twin of ChatML here writes nothing there. Its log-probabilities are float32's.
"""

from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from data.transforms.causal import IGNORE
from model.weights import to_published, weight_table
from tests.chat_runs import CHATML, write_base
from tests.compare import absolute, count, mixed, relative
from tests.preference_runs import open_network, open_preference, pairs, perturb, rated, write_pairs
from tests.records import write_rows
from tests.seq2seq import gradients

TRL = f"trl {trl.__version__}"
EXACT, SINGLE = "ids", "float32 rounding; sums in another order"
RECORDS = 8
CHATML_TWIN = (
    "{%- for message in messages %}{{- '' if loop.first else '\n' }}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\n<|im_start|>assistant\n' }}{%- endif %}"
)
LOSSES = {  # ours: (TRL's losses, weights, attributes)
    "sigmoid": (["sigmoid"], [1.0], {}),
    "ipo": (["ipo"], [1.0], {}),
    "hinge": (["hinge"], [1.0], {}),
    "robust": (["robust"], [1.0], {"label_smoothing": 0.1}),
    "sigmoid_norm": (["sigmoid_norm"], [1.0], {}),
    "aot": (["aot"], [1.0], {}),
    "sigmoid=1,sft=0.2": (["sigmoid", "sft"], [1.0, 0.2], {}),
    "sigmoid=0.8,bco_pair=0.2,sft=1": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], {}),
    "sigmoid, ld-dpo": (["sigmoid", "sft"], [1.0, 0.5], {"ld_alpha": 0.3}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A reference, a policy that has moved away from it, and records."""
    place = tmp_path_factory.mktemp("preferences")
    write_base(place / "base", CHATML, initializer_range=0.05)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    perturb(theirs, 0.01)
    theirs.save_pretrained(place / "policy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "policy" / name).write_bytes((place / "base" / name).read_bytes())
    write_pairs(place / "pairs.jsonl", RECORDS)
    write_rows(place / "rated.jsonl", rated(RECORDS))
    return place


def asked(place: Path) -> dict:
    """Settings of every trainer: all records in one batch, on the CPU in float32."""
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "save_strategy": "no"}
    return options | {"output_dir": str(place / "theirs"), "per_device_train_batch_size": RECORDS, "max_length": 128}


def tokenizer_of(folder: Path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.chat_template = "<s>", CHATML_TWIN
    return tokenizer


@pytest.fixture(scope="module")
def dpo(place) -> SimpleNamespace:
    """DPOTrainer and its batch of all records."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    trainer = trl.DPOTrainer(
        str(place / "policy"),
        ref_model=reference,
        args=trl.DPOConfig(**asked(place)),
        train_dataset=datasets.Dataset.from_list(pairs(RECORDS)),
        processing_class=tokenizer_of(place / "base"),
    )
    trainer.model.eval()
    return SimpleNamespace(trainer=trainer, batch=trainer.data_collator(list(trainer.train_dataset)))


def opened(place: Path, objective: str, **settings) -> SimpleNamespace:
    """Our task on the policy's folder, its objective beside a copy of the base, and all rows of an epoch."""
    corpus = place / ("pairs.jsonl" if objective == "dpo" else "rated.jsonl")
    options = {"validation": corpus, "batch_size": RECORDS, "dtype": torch.float32, "beta": 0.1}
    task, network = open_preference(objective, place / "policy", corpus, **options | settings)
    frozen = open_network(task, place / "base", torch.float32)
    made = task.objective({"policy": network, "reference": frozen} if task.needs_reference else network, None)
    return SimpleNamespace(task=task, network=network, objective=made.train(), batch=task.source.batch(0))


def rows_of(batch: dict[str, torch.Tensor], prefix: str = "") -> list[tuple[list[int], list[int]]]:
    """(ids, those that are scored) of each row of TRL's batch."""
    columns = (batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "completion_mask"))
    return [(ids[mask.bool()].tolist(), ids[learned.bool()].tolist()) for ids, mask, learned in zip(*columns, strict=True)]


def our_rows(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """The same of ours, whose last token is a label alone."""
    found = []
    for ids, mask, labels in zip(*(batch[name] for name in ("input_ids", "attention_mask", "labels")), strict=True):
        scored = labels[labels != IGNORE].tolist()
        found.append(([*ids[mask.bool()].tolist(), scored[-1]], scored))
    return found


def in_our_columns(ids_BT: torch.Tensor, mask_BT: torch.Tensor, learned_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """TRL's columns as ours: labels at the position before."""
    labels_BT = torch.where(learned_BT[:, 1:].bool(), ids_BT[:, 1:], IGNORE)
    return {"input_ids": ids_BT[:, :-1], "attention_mask": mask_BT[:, :-1], "labels": labels_BT}


def with_gradients(objective, network, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss as a step minimises it, gradients by published names)."""
    loss = sum(term.weight * term.sum / term.count for term in objective(batch).terms.values())
    loss.backward()
    table = weight_table(network.config)
    found = gradients(network)
    return loss.detach(), {table[key].published: to_published(table[key], each, network.config) for key, each in found.items()}


def theirs_with_gradients(network, loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    network.zero_grad()
    loss.backward()
    return loss.detach(), {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}


def compare(name: str, ours: tuple, theirs: tuple, parity, library: str, tolerance: float = 1e-5) -> None:
    """Losses, and gradients by the largest of all of them."""
    parity(f"preference training: {name} loss", library, mixed(ours[0], theirs[0]), 2e-6, SINGLE)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(float(each.abs().max()) for each in theirs[1].values())
    errors = {key: absolute(each / largest, theirs[1][key] / largest) for key, each in ours[1].items()}
    assert largest > 1e-3
    parity(f"preference training: {name} gradients", library, max(errors.values()), tolerance, SINGLE)


# ---- pairs


def test_ids_of_pairs(place, dpo, parity):
    ours = sorted(our_rows(opened(place, "dpo").batch))
    parity("preference training: rows of pairs", f"{TRL} DPOTrainer", count(ours != sorted(rows_of(dpo.batch))), 0, EXACT)
    assert len(ours) == 2 * RECORDS


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_of_pairs(name, place, dpo, parity, monkeypatch):
    losses, weights, attributes = LOSSES[name]
    for key, value in {"loss_types": losses, "loss_weights": weights, **attributes}.items():
        monkeypatch.setattr(dpo.trainer, key, value)
    loss = dpo.trainer.compute_loss(dpo.trainer.model, dict(dpo.batch))
    theirs = theirs_with_gradients(dpo.trainer.model, loss)
    text = "sigmoid=1,sft=0.5" if "ld-dpo" in name else name
    made = opened(place, "dpo", loss=text, **attributes)
    compare(name, with_gradients(made.objective, made.network, made.batch), theirs, parity, f"{TRL} DPOTrainer")
    other = opened(place, "dpo", loss=text, **attributes | {"beta": 0.11})
    assert relative(with_gradients(other.objective, other.network, other.batch)[0], theirs[0]) > 1e-5, "it sees beta"


def test_metrics_of_pairs(place, dpo):
    """Rewards, margin and accuracy as TRL logs them."""
    dpo.trainer._metrics["eval"].clear()
    dpo.trainer.compute_loss(dpo.trainer.model, dict(dpo.batch))
    theirs = {name: values[-1] for name, values in dpo.trainer._metrics["eval"].items()}
    made = opened(place, "dpo")
    ours = {name: (metric.sum / metric.count).item() for name, metric in made.objective(made.batch).metrics.items()}
    names = {"reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected", "margin": "rewards/margins"}
    names |= {"accuracy": "rewards/accuracies", "log_prob_chosen": "logps/chosen", "log_prob_rejected": "logps/rejected"}
    for mine, other in names.items():
        assert ours[mine] == pytest.approx(theirs[other], rel=1e-4, abs=1e-5), mine


def test_reference_free_trainers(place, parity):
    """ORPO and CPO: their two terms, of TRL's trainers without their data."""
    network = transformers.AutoModelForCausalLM.from_pretrained(place / "policy", dtype=torch.float32).eval()
    made = opened(place, "dpo", loss="orpo")
    batch = {}
    for row, kind in enumerate(("chosen", "rejected")):
        mine = {name: value[row::2] for name, value in made.batch.items()}
        last = (mine["attention_mask"].sum(-1, keepdim=True)).clamp(max=mine["labels"].size(1))
        padded = torch.nn.functional.pad(mine["input_ids"], (0, 1))
        batch[f"{kind}_input_ids"] = padded.scatter(1, last, mine["labels"].gather(1, last - 1))
        batch[f"{kind}_attention_mask"] = torch.nn.functional.pad(mine["attention_mask"], (1, 0), value=1)
        batch[f"{kind}_labels"] = torch.nn.functional.pad(mine["labels"], (1, 0), value=IGNORE)
    common = {"is_encoder_decoder": False, "padding_value": 0, "pad_token_id": 0, "aux_loss_enabled": False, "beta": 0.1}
    common["accelerator"] = SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value)
    simpo = {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0, "alpha": 0.0, "label_smoothing": 0.0}
    for name, kind, attributes, settings in (
        ("orpo", ORPOTrainer, {}, {}),
        ("cpo", CPOTrainer, simpo | {"loss_type": "sigmoid", "cpo_alpha": 0.6}, {"nll_weight": 0.6}),
        ("simpo", CPOTrainer, simpo, {"gamma": 0.7}),
    ):
        trainer = object.__new__(kind)
        trainer.__dict__.update(common | attributes)
        loss, _ = trainer.get_batch_loss_metrics(network, batch)
        theirs = theirs_with_gradients(network, loss)
        made = opened(place, "dpo", loss=name, **settings)
        compare(name, with_gradients(made.objective, made.network, made.batch), theirs, parity, f"{TRL} {kind.__name__}")


# ---- rated replies


def swap(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Policy and reference change their weights."""
    with torch.no_grad():
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            before = a.clone()
            a.copy_(b), b.copy_(before)


def test_rated_replies(place, parity):
    """TRL puts the completion of the record before behind each prompt, in the order of the file; ours the last record's with
    another prompt in an order of the seed. On TRL's rows: loss and gradients, z and weights included."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    trainer = trl.KTOTrainer(
        str(place / "policy"),
        ref_model=reference,
        args=trl.KTOConfig(**asked(place), beta=0.1, desirable_weight=1.2, undesirable_weight=0.7),
        train_dataset=datasets.Dataset.from_list(rated(RECORDS)),
        processing_class=tokenizer_of(place / "base"),
    )
    trainer.model.eval()
    batch = trainer.data_collator(list(trainer.train_dataset))
    made = opened(place, "kto", z="micro-batch", desirable_weight=1.2, undesirable_weight=0.7)
    own = {name: value[::2] for name, value in made.batch.items()}
    wrong = count(sorted(our_rows(own)) != sorted(rows_of(batch)))
    parity("preference training: rated rows", f"{TRL} KTOTrainer", wrong, 0, EXACT)
    mismatched = {tuple(scored) for _, scored in our_rows({name: value[1::2] for name, value in made.batch.items()})}
    assert mismatched <= {tuple(scored) for _, scored in our_rows(own)}

    columns = []
    for prefix in ("", "KL_"):
        names = (f"{prefix}{name}" for name in ("input_ids", "attention_mask", "completion_mask"))
        columns.append(in_our_columns(*(batch[name] for name in names)))
    width = max(each["labels"].size(1) for each in columns)
    rows = {}
    for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORE)):
        wide = [torch.nn.functional.pad(each[name], (0, width - each[name].size(1)), value=filler) for each in columns]
        rows[name] = torch.stack(wide, dim=1).flatten(0, 1)
    rows |= {"is_good": batch["label"].long().repeat_interleave(2), "row_ids": torch.arange(2 * RECORDS)}
    for is_swapped in (False, True):  # z is above 0 in one of the two
        if is_swapped:
            swap(trainer.model, trainer.ref_model), swap(made.network, made.objective.frozen["reference"])
        theirs = theirs_with_gradients(trainer.model, trainer._compute_loss(trainer.model, batch, return_outputs=False))
        z = float(made.objective(rows).metrics["z"].sum) / RECORDS
        name = f"kto, z {'above' if z > 0 else 'at'} 0"
        compare(name, with_gradients(made.objective, made.network, rows), theirs, parity, f"{TRL} KTOTrainer")
        assert z == pytest.approx(trainer._metrics["eval"]["kl"][-1], rel=1e-3, abs=1e-5)
    assert sorted(z > 0 for z in trainer._metrics["eval"]["kl"]) == [False, True]

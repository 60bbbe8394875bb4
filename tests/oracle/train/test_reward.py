"""A reward model beside TRL's RewardTrainer (loss, gradients) and transformers' classifiers (scores of a checkpoint)."""

import numpy as np
import pytest
import torch
import transformers
import trl

import model.hub
from data.chat.encode_preference import encode_replies
from data.chat.preferences import read_preference
from model.reward import read_mean_score, reward_scores
from model.weights import to_published, weight_table
from tests.chat_runs import CHATML, write_base
from tests.compare import absolute, mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import LIBRARY, ROUNDING, how
from tests.oracle.wide import widen
from tests.preference_runs import pairs, write_reward_model
from tests.records import write_rows
from train.reward_objective import MARGIN, RewardObjective

TRL = f"trl {trl.__version__} RewardTrainer"
PAIRS = 4


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    from datasets import Dataset

    place = tmp_path_factory.mktemp("trl")
    write_base(place / "base", CHATML)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(place / "base", num_labels=1)
    classifier.config.pad_token_id = 331
    rows = [{"prompt": "How?", "chosen": " so it is", "rejected": " no"}] * 2
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 2}
    args = trl.RewardConfig(output_dir=str(place / "out"), pad_token="</s>", **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    return trl.RewardTrainer(classifier, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


@pytest.mark.parametrize("margins", [False, True], ids=["bare", "margins"])
@pytest.mark.parametrize("family, centering", [("llama", 0.0), ("llama", 0.01), ("gpt2", 0.3), ("qwen2", 0.3)])
def test_loss_and_gradients(family, centering, margins, trainer, tmp_path, monkeypatch, parity):
    """On one padded batch; TRL has the chosen replies in the first half, ours alternate with the rejected ones."""
    extra = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "problem_type": "regression"}
    config = tiny_config(family, head="sequence", labels=1, pad_id=0, extra=extra)
    network = randomized(config)
    model.hub.save(network, tmp_path)
    opened = transformers.AutoModelForSequenceClassification.from_pretrained
    theirs = widen(opened(tmp_path, dtype=torch.float64, attn_implementation=how(config)).eval())
    ids, mask = torch.randint(3, 61, (2 * PAIRS, 11)), torch.ones(2 * PAIRS, 11, dtype=torch.long)
    for row, length in enumerate((11, 3, 7, 9, 2, 10, 5, 5)):
        ids[row, length:], mask[row, length:] = 0, 0
    margin_P = torch.rand(PAIRS, dtype=torch.float64)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(2 * PAIRS, dtype=torch.long)}
    other = {"input_ids": torch.cat((ids[::2], ids[1::2])), "attention_mask": torch.cat((mask[::2], mask[1::2]))}
    if margins:
        batch[MARGIN], other["margin"] = margin_P.repeat_interleave(2), margin_P
    result = RewardObjective(network, centering=centering).train()(batch)
    monkeypatch.setattr(trainer.args, "center_rewards_coefficient", centering or None)
    expected = trainer.compute_loss(theirs, other)
    ours = result.terms["loss"].sum / result.terms["loss"].count
    ours.backward()
    expected.backward()
    table, gradients = weight_table(config), dict(theirs.named_parameters())
    errors = [mixed(ours, expected)]
    for name, parameter in network.named_parameters():
        errors.append(mixed(to_published(table[name], parameter.grad, config), gradients[table[name].published].grad))
    assert result.terms["loss"].count == PAIRS and gradients["score.weight"].grad.abs().max() > 1e-3
    parity(f"reward model: loss and gradients, {family}", TRL, max(errors), *ROUNDING)
    if not margins:
        found = {name: float(value.sum / value.count) for name, value in result.metrics.items()}
        logged = {"accuracy": found["accuracy"], "margin": found["difference"]}
        assert logged == pytest.approx({name: trainer._metrics["eval"][name][-1] for name in logged})


@pytest.mark.parametrize("shape", ["turns", "strings"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2"])
def test_scores_of_a_folder(kind, shape, tmp_path, parity):
    """One text alone, and all padded on either side with the pad of config.json; replies of strings end by </s>."""
    write_base(tmp_path / "base", CHATML, kind="Llama" if kind == "GPT2" else kind)
    if kind == "GPT2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.1}
        ids = {"vocab_size": 334, "bos_token_id": 330, "eos_token_id": 331}
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids)).save_pretrained(tmp_path / "base")
    rows = pairs(4)
    if shape == "strings":
        rows = [
            {"prompt": row["prompt"][-1]["content"]} | {side: f" {row[side][0]['content']}" for side in ("chosen", "rejected")}
            for row in rows
        ]
    corpus, folder = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "saved"
    task, network = write_reward_model(folder, tmp_path / "base", corpus)
    theirs = widen(transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval())
    assert (theirs.config.num_labels, theirs.config.id2label, theirs.config.problem_type) == (1, {0: "reward"}, "regression")
    texts = []
    for row in rows:
        pair = read_preference(row)
        found = encode_replies(task.encoder, pair.prompt, [pair.chosen, pair.rejected], most=128, policy="error", room=0)
        texts += [np.concatenate([found.prompt, reply]) for reply in found.replies]
    pad, longest = theirs.config.pad_token_id, max(map(len, texts))
    assert pad is not None and all(text[-1] != pad for text in texts)
    errors, scores_N = [], reward_scores(network, texts, batch_size=3)
    with torch.no_grad():
        for place, text in enumerate(texts):
            errors.append(absolute(scores_N[place], theirs(input_ids=torch.tensor(text)[None]).logits[0, 0]))
        for side in ("right", "left"):
            ids, mask = torch.full((len(texts), longest), pad), torch.zeros(len(texts), longest, dtype=torch.long)
            for row, text in enumerate(texts):
                at = slice(len(text)) if side == "right" else slice(longest - len(text), None)
                ids[row, at], mask[row, at] = torch.tensor(text), 1
            positions = {} if side == "right" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
            errors.append(absolute(scores_N, theirs(input_ids=ids, attention_mask=mask, **positions).logits[:, 0]))
            errors.append(absolute(scores_N, network(ids, mask).logits[:, 0]))
    parity(f"reward model: scores of a folder, {kind}, {shape}", LIBRARY, max(errors), *ROUNDING)
    mean = read_mean_score(folder).value
    assert mean == pytest.approx(float(scores_N[::2].mean()), abs=1e-12) and abs(mean) > 1e-3
    assert float(reward_scores(network, texts[::2], mean_score=mean).mean()) == pytest.approx(0, abs=1e-12)

"""Two texts and one number, beside transformers, and the baselines beside scikit-learn."""

import numpy as np
import pytest
import sklearn
import torch
import transformers
from sklearn.linear_model import LogisticRegression, Ridge

import model.hub
from model.weights import head_spec, to_published, weight_table
from tests.compare import absolute, mixed
from tests.conftest import randomized, tiny_config
from tests.oracle.model.test_network import LIBRARY, ROUNDING, how
from tests.oracle.train.test_classify import batch_of
from tests.oracle.wide import widen
from train.number_objective import NumberObjective
from train.pair_baseline import BUCKETS, bucket, features, fit_classes, fit_numbers, predict

SKLEARN = f"scikit-learn {sklearn.__version__}"


IN_SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("roberta", "gpt2", "bart")]


@pytest.mark.parametrize("family", ["bert", "qwen3", "t5", *IN_SLOW])
def test_squared_error_and_gradients(family, tmp_path, parity):
    """The last row only fills the batch up; -100 is a number like any other."""
    named = {"problem_type": "regression", "id2label": {"0": "score"}, "label2id": {"score": 0}}
    config = tiny_config(family, head="sequence", labels=1, pad_id=1 if family == "roberta" else 0, extra=named)
    network = randomized(config)
    model.hub.save(network, tmp_path)
    published = getattr(transformers, head_spec(config).architecture)
    theirs = widen(published.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation=how(config)).eval())
    assert theirs.config.problem_type == "regression" and theirs.config.num_labels == 1
    batch = batch_of(config, several=False) | {"labels": torch.tensor([0.25, -100.0, 3.5, torch.nan], dtype=torch.float64)}
    objective = NumberObjective(network, held_out=3)
    result = objective.train()(batch)
    assert objective.counts(batch)["loss"] == result.terms["loss"].count == 3 and not result.metrics
    ours = result.terms["loss"].sum / result.terms["loss"].count
    own = {name: value[:3] for name, value in batch.items() if name != "token_type_ids" or config.token_types > 1}
    other = theirs(**own)
    ours.backward()
    other.loss.backward()
    errors, table, gradients = [mixed(ours, other.loss)], weight_table(config), dict(theirs.named_parameters())
    for name, parameter in network.named_parameters():
        errors.append(mixed(to_published(table[name], parameter.grad, config), gradients[table[name].published].grad))
    parity(f"{family}: regression", LIBRARY, max(errors), *ROUNDING)
    places = objective.eval()(batch | {"row": torch.tensor([2, 0, 1, 2])}).metrics["predictions"]
    assert mixed(places.sum[0], other.logits[[1, 2, 0], 0]) < 1e-12 and places.sum[1].tolist() == [1, 1, 1]


def test_a_16_bit_network_has_a_loss_in_32():
    config = tiny_config("bert", head="sequence", labels=1)
    network, number = randomized(config, dtype=torch.bfloat16), torch.tensor([0.3, 0.1, 1.7, torch.nan])
    batch = batch_of(config, several=False) | {"labels": number, "row": torch.tensor([0, 1, 2, 0])}
    objective = NumberObjective(network, held_out=3)
    with torch.no_grad():
        logit_B = network(batch["input_ids"], batch["attention_mask"], token_type_ids=batch["token_type_ids"]).logits[:3, 0]
    assert logit_B.dtype == torch.bfloat16
    with torch.no_grad():
        found = objective.eval()(batch)
    assert found.terms["loss"].sum.dtype == found.metrics["predictions"].sum.dtype == torch.float32
    assert found.terms["loss"].sum.item() == pytest.approx((logit_B.float() - number[:3]).square().sum().item(), rel=1e-6)


def matrix(rows: int = 240, columns: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    x_BJ = torch.randn(rows, columns, dtype=torch.float64)
    return x_BJ, x_BJ @ torch.randn(columns, dtype=torch.float64) + 0.5 + torch.randn(rows, dtype=torch.float64)


@pytest.mark.parametrize("penalty", [1.0, 100.0])
def test_baselines_are_scikit_learns(penalty, parity):
    x_BJ, number_B = matrix()
    ridge = Ridge(alpha=penalty / 2).fit(x_BJ.numpy(), number_B.numpy())
    errors = [absolute(predict(x_BJ, fit_numbers(x_BJ, number_B, penalty))[:, 0], ridge.predict(x_BJ.numpy()))]
    parity("baselines of pairs: ridge regression", SKLEARN, max(errors), 1e-10, "a linear system, solved in another order")
    errors = []
    for classes in (2, 3):
        label_B = torch.bucketize(number_B, torch.linspace(-1, 2, classes - 1, dtype=torch.float64))
        theirs = LogisticRegression(C=1 / penalty if classes > 2 else 2 / penalty, tol=1e-10, max_iter=9999)
        theirs.fit(x_BJ.numpy(), label_B.numpy())
        ours = predict(x_BJ, fit_classes(x_BJ, label_B, classes, penalty)).softmax(-1)
        errors.append(absolute(ours, theirs.predict_proba(x_BJ.numpy())))
    parity("baselines of pairs: logistic regression", SKLEARN, max(errors), 1e-5, "where the optimizers stop")


def test_columns_of_words():
    """Each text has its own columns for its words; shared words have one, and three shares."""
    pairs = [("Open the file, open it", "the file"), ("", "x")]
    words_BJ, shared_BJ = features(pairs, "words"), features(pairs, "shared")
    assert words_BJ.shape == (2, 2 * BUCKETS) and shared_BJ.shape == (2, BUCKETS + 3)
    assert words_BJ[0, bucket("open")] == np.log(3) and words_BJ[0, BUCKETS + bucket("the")] == np.log(2)
    assert words_BJ[0, BUCKETS + bucket("open")] == 0 and words_BJ[1].sum() == np.log(2)
    assert shared_BJ[0, BUCKETS:].tolist() == [2 / 4, 2 / 2, 2] and shared_BJ[0, bucket("the")] == np.log(2)
    assert shared_BJ[0, :BUCKETS].count_nonzero() == 2 and not shared_BJ[1].any() and bucket("the") == 486

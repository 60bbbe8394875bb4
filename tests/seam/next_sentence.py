"""Is the second text the one that follows? Half of the pairs are neighbours. Devlin et al. 2018, section 3.1."""

import math

import numpy as np

from data.example import Example
from train.record_task import RecordTask
from train.task import Defaults


class NextSentence(RecordTask):
    defaults = Defaults("bert-base", 3e-3)
    architectures, head = ("encoder",), "nsp"
    sees, is_random, unit = "neighbours", True, "pairs"
    baseline_loss = math.log(2)

    @classmethod
    def columns(cls, settings):
        return [("text", "no option")]

    @classmethod
    def texts(cls, settings, row):
        return [row["text"]]

    def transform(self, rows, index, random):
        if index + 1 == len(rows):
            return []
        is_next = random.random() < 0.5
        other = index + 1 if is_next else int(random.integers(len(rows)))
        first, second = (self.tokenizer.encode(rows[i]["text"]) for i in (index, other))
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        ids = np.array([bos, *first, eos, *second, eos])
        kinds = np.array([0] * (len(first) + 2) + [1] * (len(second) + 1))
        return [Example(ids, np.array(0 if is_next else 1), extra={"token_type_ids": kinds})]

    def objective(self, networks, loss, held_out=None):
        from torch.nn import functional as F

        from train.objective import Metric, Objective, Result, Term

        class PairObjective(Objective):
            def forward(self, batch):
                logits_B2 = self.network(**self.inputs_of(batch)).logits
                labels_B, count = batch["labels"], (batch["labels"] != -100).sum()
                term = Term(F.cross_entropy(logits_B2, labels_B, reduction="sum"), count)
                return Result({"loss": term}, {"accuracy": Metric((logits_B2.argmax(-1) == labels_B).sum(), count)})

        return PairObjective(networks)


TASK = NextSentence

"""A chosen text above a rejected one, beside a frozen reference. Rafailov et al. 2023, arXiv 2305.18290, equation 7."""

import math

import numpy as np

from data.example import Example
from train.record_task import RecordTask
from train.task import Defaults

BETA = 0.5


class Preference(RecordTask):
    defaults = Defaults("tiny", 3e-3)
    architectures, head, unit = ("decoder",), "lm", "pairs"
    baseline_loss = math.log(2)

    @classmethod
    def columns(cls, settings):
        return [("chosen", "no option"), ("rejected", "no option")]

    @classmethod
    def texts(cls, settings, row):
        return [row["chosen"], row["rejected"]]

    def transform(self, row, random):
        pair = (np.array(self.tokenizer.as_document(self.tokenizer.encode(row[key]))) for key in ("chosen", "rejected"))
        return [Example(ids[:-1], ids[1:], group=1) for ids in pair]

    def networks(self, network, initial):
        return {"policy": network, "reference": initial()}

    def objective(self, networks, loss, held_out=None):
        import torch
        from torch.nn import functional as F

        from train.objective import Metric, Objective, Result, Term

        class PairObjective(Objective):
            def log_likelihood(self, network, batch):
                logits_BTV = network(**self.inputs_of(batch)).logits
                nll_BT = F.cross_entropy(logits_BTV.mT, batch["labels"], reduction="none")
                return -nll_BT.sum(-1)

            def forward(self, batch):
                policy_B = self.log_likelihood(self.network, batch)
                with torch.no_grad():
                    reference_B = self.log_likelihood(self.frozen["reference"], batch)
                margin_P = (policy_B - reference_B).view(-1, 2) @ torch.tensor([BETA, -BETA])
                # A filler's pair has no label: its margin is 0, and it counts for nothing.
                scored_P = (batch["labels"] != -100).any(-1).view(-1, 2).any(-1)
                term = Term(-(F.logsigmoid(margin_P) * scored_P).sum(), scored_P.sum())
                return Result({"loss": term}, {"preferred": Metric(((margin_P > 0) & scored_P).sum(), scored_P.sum())})

            @staticmethod
            def counts(batch):
                return {"loss": (batch["labels"] != -100).any(-1).view(-1, 2).any(-1).sum()}

        return PairObjective(networks)


TASK = Preference

"""Learn from what the network itself writes: of two samples the one with more of a token. A source with state."""

import math

from train.record_task import RecordTask
from train.task import Defaults

LENGTH = 6


class Rollouts:
    """Batches by the policy of the step, each asked for once; how many tokens were written so far is its state."""

    is_on_policy = True

    def __init__(self, task):
        self.task, self.written, self.asked = task, 0, []

    def batches(self, step, policy=None):
        import torch

        from model.generate import generate

        size, bos = self.task.config.optimizer.batch_size, self.task.tokenizer.bos_id
        self.asked.append(step)
        random = torch.Generator().manual_seed(self.task.config.run.seed + self.written)  # by the state: a replay would differ
        start = torch.full((size, 1), bos)
        texts = generate(policy, start, max_new_tokens=LENGTH, temperature=1.0, generator=random)
        self.written += texts.numel()
        ids = torch.cat((start, texts), 1)
        wanted = (texts % 2 == 0).double().mean(-1)
        return [{"input_ids": ids[:, :-1], "labels": ids[:, 1:], "advantage": (wanted - wanted.mean()).float()}]

    def origin(self, step):
        return [f"what was written at step {step}"]

    def state_dict(self):
        return {"written": self.written, "asked": self.asked}

    def load_state_dict(self, state):
        self.written, self.asked = state["written"], state["asked"]


class Rollout(RecordTask):
    defaults = Defaults("tiny", 3e-3)
    architectures, head = ("decoder",), "lm"
    baseline_loss = math.log(2)

    @classmethod
    def columns(cls, settings):
        return [("text", "no option")]

    @classmethod
    def texts(cls, settings, row):
        return [row["text"]]

    def __init__(self, config, data):
        super().__init__(config, data)
        self.source = Rollouts(self)

    def transform(self, row, random):
        import numpy as np

        from data.example import Example

        ids = np.array(self.tokenizer.as_document(self.tokenizer.encode(row["text"])))
        return [Example(ids[:-1], ids[1:], extra={"advantage": np.array(1.0, dtype=np.float32)})]

    def epochs(self, steps):
        return 0.0

    def objective(self, networks, loss, held_out=None):
        from torch.nn import functional as F

        from train.objective import Metric, Objective, Result, Term

        class PolicyObjective(Objective):
            uses = ("labels", "advantage")

            def forward(self, batch):
                logits_BTV = self.network(**self.inputs_of(batch)).logits
                nll_BT = F.cross_entropy(logits_BTV.mT, batch["labels"], reduction="none")
                count = (batch["labels"] != -100).sum()
                term = Term((nll_BT * batch["advantage"][:, None]).sum(), count)
                even = (batch["labels"] != -100) & (batch["labels"] % 2 == 0)
                return Result({"loss": term}, {"even": Metric(even.sum(), count)})

        return PolicyObjective(networks)


TASK = Rollout

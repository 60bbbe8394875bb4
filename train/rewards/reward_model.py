"""A reward model's folder as a reward: the score of prompt and reply, less the mean score of good replies."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import model.hub
from data.chat.encode import terminators
from data.chat.template import open_template
from data.tokenizer.open import load_tokenizer
from model.config import ConfigError
from model.folders import HubError
from model.reward import check_reward_model, read_mean_score, reward_scores
from train.rewards.sample import Sample
from train.runs.errors import TrainError
from train.runs.open import resolve

if TYPE_CHECKING:
    from model.network import Network
    from train.prompt_task import PromptIds


class ModelReward:
    """A reward model, which reads the ids of prompt and reply: no text is encoded again.

        reward = score - mean score      (`model.reward`; a folder without reward.json: the score)

    A reply that was cut has no terminator, and is scored at its last token. The network is loaded by `start`, in float32, in
    evaluation mode and without autocast. Errors (TrainError): no such folder, or no reward model in it.
    """

    def __init__(self, text: str):
        self.text, self.folder = text, resolve(Path(text).expanduser())
        try:
            self.config = model.hub.read_config(self.folder)
        except (HubError, OSError) as error:
            raise TrainError(f"--reward {text}: {error}") from None
        try:
            check_reward_model(self.config, f"--reward {text}")
        except ConfigError as error:
            raise TrainError(str(error)) from None
        mean = read_mean_score(self.folder)
        self.mean_score = 0.0 if mean is None else mean.value
        self.network: Network | None = None

    def check(self, prompts: "Sequence[PromptIds]", stop_ids: Sequence[int], context: int, vocab_size: int) -> None:
        """Compare what the reward model reads with what the policy writes.

        Errors (TrainError): ids of a prompt that its own tokenizer and chat template would make others; a reply's end that is
        not its own; a vocabulary or context that the policy's texts exceed.
        """
        from train.prompt_task import encode_prompt

        tokenizer = load_tokenizer(self.folder, self.config.vocab_size)
        template = open_template(tokenizer, None)
        for prompt in prompts:
            if encode_prompt(tokenizer, template, prompt.record) != list(prompt.ids):
                raise TrainError(
                    f"--reward {self.text}: its tokenizer or chat template ({template.name}) gives {prompt.name} other ids "
                    "than --init's: a reward model must know the same format; train it from --init (--objective reward)"
                )
        ends = [id for id in terminators(tokenizer, template) if id is not None]
        if not {*ends} & {*stop_ids}:
            raise TrainError(f"--reward {self.text}: its replies end with the ids {ends}, --init's with {list(stop_ids)}")
        if self.config.vocab_size < vocab_size:
            raise TrainError(f"--reward {self.text} knows {self.config.vocab_size:,} tokens, and --init writes {vocab_size:,}")
        if self.config.context < context:
            raise TrainError(f"--reward {self.text} reads {self.config.context:,} tokens, and --context is {context:,}")

    def start(self, device: str) -> None:
        """Load the network."""
        if self.network is None:
            self.network = model.hub.load(self.folder, device=device).eval().requires_grad_(False)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """Return the reward of each sample, by its ids."""
        rows = [sample.ids for sample in samples]
        if not all(rows):
            raise TrainError(f"--reward {self.text}: a reward model reads ids, and a sample has none")
        return reward_scores(self.network, rows, mean_score=self.mean_score).tolist()

    def describe(self) -> str:
        return f"{self.text} is a reward model; its mean score {self.mean_score:g} is taken off"

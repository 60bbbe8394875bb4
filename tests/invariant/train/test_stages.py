"""The course's stages as recipes, one after the other at toy size: SFT → DPO, SFT → reward model → PPO."""

import pytest

from model.reward import read_mean_score
from tests.chat_runs import CHATML, write_base
from tests.runs import arguments, command, last_checkpoint, metrics

SMALL = {"steps": 2, "eval-every": 2, "threads": 1, "device": "cpu", "precision": "fp32", "sample-every": 0, "batch-size": 4}


@pytest.mark.slow
def test_recipes_in_their_order(tmp_path):
    """Each stage begins with the weights that the one before it ended with, and its own scores are there."""
    write_base(tmp_path / "base", CHATML, max_position_embeddings=512)
    rollouts = {"reward": tmp_path / "reward", "ppo.max-reply": 6, "ppo.validation-prompts": 2, "context": 256}
    stages = {  # recipe: the folder to begin with, further options, a score
        "sft": ("base", {"sft.replies": 2}, "loss"),
        "dpo": ("sft", {"dpo.replies": 2}, "accuracy"),
        "reward": ("sft", {}, "accuracy"),
        "ppo": ("sft", rollouts, "reward"),
    }
    for name, (init, more, score) in stages.items():
        asked = SMALL | {"recipe": f"pairs-{name}", "init": tmp_path / init, "out": tmp_path / name} | more
        said = command(*arguments(asked))
        assert said.code == 0, (name, said.err)
        assert score in metrics(tmp_path / name)[-1]
    assert read_mean_score(last_checkpoint(tmp_path / "reward")) is not None
    assert (last_checkpoint(tmp_path / "ppo") / "critic" / "model.safetensors").is_file()

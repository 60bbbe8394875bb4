"""Two ranks of `--objective grpo` and `ppo`, of which one dies inside a rollout: the others end, and a restart goes on."""

import json
import os
import signal

import pytest

from tests.fault.test_policy_bad_input import options as policy_options
from tests.fault.test_ranks import torchrun, workers
from tests.policy_runs import write_place
from tests.runs import assert_same_end, command, last_checkpoint, metrics, wait_for_step

STEPS = 60
CHANGES = {"steps": STEPS, "save-every": 1, "eval-every": STEPS, "NAME.minibatches": 3, "NAME.rollout-epochs": 2, "keep": 2}


@pytest.mark.slow
@pytest.mark.parametrize("objective, mesh", [("grpo", ()), ("ppo", ("--mesh", "shard"))])
def test_a_rank_that_dies_inside_a_rollout(objective, mesh, tmp_path):
    """Killed after some step that is not the last of its rollout: the same end as without."""
    place = write_place(tmp_path / "place")
    asked = [*policy_options(place, objective, **CHANGES), *mesh]
    with torchrun(*asked, "--out", tmp_path / "whole") as running:
        _, err = running.communicate(timeout=240)
    assert running.returncode == 0, err
    run = tmp_path / "run"
    with torchrun(*asked, "--out", run, restarts=1) as running:
        wait_for_step(running, run, 20)
        os.kill(workers(running)[1], signal.SIGKILL)
        out, err = running.communicate(timeout=240)
    assert running.returncode == 0, err
    assert "another rank was gone" in err and f"to {STEPS}" in out
    assert_same_end(tmp_path / "whole", run, steps=STEPS)
    assert json.loads((last_checkpoint(run) / "state.json").read_text())["source"]["rollout"]["number"] == STEPS // 6 - 1
    if mesh:  # one rank goes on with what two wrote in parts
        said = command("--resume", run, "--steps", STEPS + 3)
        assert said.code == 0, said.err
        assert metrics(run)[-1]["step"] == STEPS + 3

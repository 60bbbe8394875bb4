"""`--dropout` with `--init`: another rate for the weights that are trained further."""

import json

import pytest

from model.config import load_family
from model.config_json import read_config
from model.hub import load, save
from model.init import build_network
from tests.conftest import randomized, tiny_config
from tests.runs import assert_same_end, command, further, last_checkpoint, metrics, stopped_at


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_folder_is_read_with_another_dropout(family, tmp_path):
    """In each place where the family has it, and in the config.json of a copy; without, the folder's own."""
    rates = load_family(family).DROPOUTS
    config = tiny_config(family).replace(**dict.fromkeys(rates, 0.1))
    save(randomized(config), tmp_path / "own")
    for asked, expected in ((None, 0.1), (0.25, 0.25), (0.0, 0.0)):
        network = load(tmp_path / "own", dropout=asked)
        assert {getattr(network.config, name) for name in rates} == {expected}
        assert dropouts(network) == dropouts(build_network(config.replace(**dict.fromkeys(rates, expected)), seed=0))
        save(network, tmp_path / f"{asked}")
        assert {getattr(read_config(tmp_path / f"{asked}"), name) for name in rates} == {expected}


def dropouts(network) -> dict[str, float]:
    return {f"{at}.{k}": v for at, m in network.named_modules() for k, v in vars(m).items() if "dropout" in k}


def test_dropout_of_a_run_with_init(options, finished, tmp_path):
    """--dropout takes the place of the rates of --init, and is said; without it they stay; a resume goes on with it."""
    shared = [*further(options), "--init", last_checkpoint(finished), "--steps", 8, "--save-every", 4, "--log-every", 1]
    rates = {}
    for asked in ((), ("--dropout", 0), ("--dropout", 0.5)):
        run = tmp_path / "-".join(map(str, ("run", *asked)))
        said = command(*shared, *asked, "--out", run)
        assert said.code == 0, said.err
        own = "takes the place of dropout 0.1 and attention_dropout 0.1 of --init"
        assert (f"dropout {asked[1]:g} {own}" in said.out) if asked else (own not in said.out)
        config = json.loads((last_checkpoint(run) / "config.json").read_text())
        rates[asked] = [config[key] for key in ("embd_pdrop", "resid_pdrop", "attn_pdrop")]
    assert rates == {(): [0.1] * 3, ("--dropout", 0): [0.0] * 3, ("--dropout", 0.5): [0.5] * 3}
    first = [next(row["loss"] for row in metrics(path) if row["split"] == "train") for path in sorted(tmp_path.glob("run*"))]
    assert len(set(first)) == 3, "the noise of the first step"
    assert stopped_at(5, *shared, "--dropout", 0.5, "--out", tmp_path / "parted").code == 130
    assert command("--resume", tmp_path / "parted").code == 0
    assert_same_end(tmp_path / "run---dropout-0.5", tmp_path / "parted", steps=8)


def test_a_recipe_whose_dropout_would_have_no_effect(options, finished, tmp_path):
    (tmp_path / "recipe.toml").write_text("[network]\ndropout = 0.2\n")
    shared = [*further(options), "--recipe", tmp_path / "recipe.toml", "--init", last_checkpoint(finished), "--steps", 1]
    said = command(*shared, "--adapter", "lora", "--out", tmp_path / "run")
    assert said.code == 2 and "error: --dropout 0.2 would have no effect with --adapter lora\n" in said.err, said.err
    assert command(*shared, "--out", tmp_path / "run").code == 0

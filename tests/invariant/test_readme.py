"""What the README shows of Python does what it says."""

import re
from pathlib import Path

import model.hub
from lora.inject import adapters
from tests.conftest import randomized, tiny_config
from tests.oracle.adapter_twins import gap

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_adapters_of_the_readme(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8").partition("## Adapters")[2].partition("## Networks")[0]
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    before = randomized(tiny_config("llama"))
    model.hub.save(before, "FOLDER")
    names: dict = {}
    exec(block, names)
    after = names["network"]
    assert not adapters(after) and (tmp_path / "ADAPTER" / "adapter_model.safetensors").is_file()
    for name, value in after.named_parameters():  # B was zero: the weights are what they were
        assert gap(value, before.get_parameter(name)) < 1e-6, name

"""What setup makes of options and shards."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import model.hub
from data.config import MASK, DataConfig
from data.corpus.prepare import prepare
from model.config import ModelConfig
from model.init import build_network
from tests.conftest import randomized, tiny_config
from tests.runs import torch_as_it_was, write_corpus
from train.config import OptimizerConfig, RunConfig, SpeedConfig, TrainConfig
from train.objective import Objective
from train.options import read_options
from train.parallel.mesh import Mesh
from train.parallel.parallelize import parallelize
from train.parallel.ranks import Ranks
from train.registry import config_type, load, names
from train.resolve import resolve_machine, resolve_rates
from train.runs.errors import TrainError
from train.setup import add_stop_id, network_config, open_engine, open_network
from train.task import Defaults
from train.tasks.clm import CausalTask
from train.tasks.mlm import MaskedSettings
from train.token_task import validation_ids


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("setup")
    corpus = str(write_corpus(folder / "corpus"))
    data = DataConfig(corpus=(corpus,), vocab_size=320, val_fraction=0.2, cache=folder / "cache")
    config = TrainConfig(data=data)
    return replace(config, network=replace(config.network, context=32)), prepare(data)


@pytest.fixture(scope="module")
def masked(made):
    config, _ = made
    return replace(config, run=replace(config.run, objective="mlm")), prepare(config.data, controls=[MASK])


def test_validation_scores_each_byte_once(made):
    config, shards = made
    batches = CausalTask(config, shards)
    assert batches.validation_bytes == shards.validation.bytes
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches.validation) == shards.validation.targets


def test_part_of_the_split_has_the_bytes_of_its_targets(made):
    config, shards = made
    config = replace(config, report=replace(config.report, eval_tokens=501))
    ids = validation_ids(config, shards)
    text = shards.tokenizer.decode(ids[1:].tolist())
    assert len(ids) == 501 and CausalTask(config, shards).validation_bytes == len(text.encode())


@pytest.mark.parametrize("objective", ["clm", "mlm", "mlm, pairs"])
def test_micro_batches_are_the_global_batch_cut(objective, made, masked):
    config, shards = made if objective == "clm" else masked
    if objective == "mlm, pairs":
        objective, config = "mlm", config_type("mlm")(**vars(config), mlm=MaskedSettings(nsp=True))
    whole, cut = (
        load(objective)(replace(config, optimizer=replace(config.optimizer, batch_size=b, accumulate=a)), shards)
        for b, a in ((8, 1), (2, 4))
    )
    for step in (0, 7):
        (one,), parts = whole.source.batches(step), cut.source.batches(step)
        assert len(parts) == 4
        assert all(torch.equal(one[name], torch.cat([part[name] for part in parts])) for name in one)
        assert whole.source.origin(step) == cut.source.origin(step) != []


def test_masks_of_validation_are_fixed_and_whole(masked):
    """Every chosen token is a gap, about 15 % are chosen, and neither the step nor the batch size plays a part."""
    config, shards = masked
    small = replace(config, optimizer=replace(config.optimizer, batch_size=4))
    one, other = load("mlm")(config, shards), load("mlm")(small, shards)
    rows = [torch.cat([batch[name] for batch in task.validation])[: len(one.held_out) // 32] for task in (one, other)
            for name in ("input_ids", "labels")]
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[3])
    ids, labels = rows[:2]
    assert (ids[labels != -100] == shards.tokenizer.mask_id).all()
    assert 0.12 < (labels != -100).float().mean() < 0.18
    (first,), (second,) = one.source.batches(0), one.source.batches(1)
    kept = first["input_ids"][first["labels"] != -100] == first["labels"][first["labels"] != -100]
    assert kept.any() and not torch.equal(first["labels"], second["labels"])  # training leaves some as they are


@pytest.mark.parametrize(("objective", "preset"), [("clm", "bert-base"), ("mlm", "tiny"), ("mlm", "t5-small")])
def test_an_objective_on_the_wrong_architecture_names_those_that_fit(objective, preset, made):
    config, shards = made
    config = replace(config, run=replace(config.run, objective=objective), network=replace(config.network, preset=preset))
    with pytest.raises(TrainError, match=f"--objective {objective} trains .* --preset {preset} is .* Those that fit: "):
        network_config(config, shards.tokenizer)


@pytest.mark.parametrize("preset", ["tiny-encoder", "roberta-base"])
def test_an_encoder_gets_a_pad_that_no_text_holds(preset, masked):
    config, shards = masked
    has = network_config(replace(config, network=replace(config.network, preset=preset)), shards.tokenizer)
    assert has.pad_id == 0 and shards.tokenizer.token_bytes[0] == b"" and has.head == "mlm"
    assert has.position_offset == (1 if preset == "roberta-base" else 0)


def engine_with(optimizer: dict, speed: dict, **run):
    asked = SpeedConfig(**{"precision": "fp32", "compile": "off", "loss": "plain"} | speed)
    settings = OptimizerConfig(optimizer="muon", lr=1e-3, matrix_lr=4e-2, weight_decay=0.1, **optimizer)
    config = TrainConfig(run=RunConfig(steps=100, mesh="replicate", **run), optimizer=settings, speed=asked)
    task = SimpleNamespace(objective=Objective, networks=lambda network, initial: network)
    return open_engine(config, Ranks(), torch.device("cpu"), task, build_network(tiny_config("gpt2"), seed=0), print)[0]


def test_an_engine_has_what_was_asked_for(monkeypatch):
    """Each setting that nothing else would miss: the run would go on, and learn something else."""
    losses = {"plain": lambda *_, **options: ("plain", options), "chunked": lambda *_, **options: ("chunked", options)}
    monkeypatch.setattr("train.setup.LOSSES", losses)
    settings = {"label_smoothing": 0.1, "z_loss": 1e-4, "ema": 0.9, "schedule": "linear", "final_lr": 0.5, "clip": 0.0}
    speed = {"loss": "chunked", "precision": "fp16", "recompute": "blocks", "recompute_every": 2}
    given = []
    with monkeypatch.context() as patched:
        patched.setattr("train.setup.parallelize", lambda objective, *_, **asked: given.append(asked) or objective)
        engine = engine_with(settings, speed | {"reshard": "off"}, seed=5)
    assert given == [{"compute": torch.float16, "reshard": False}]
    objective = engine.objective.train()
    assert objective.loss(None, None, None, None) == ("chunked", {"smoothing": 0.1, "z_loss": 1e-4})
    assert objective.eval().loss(None, None, None, None) == ("chunked", {})
    assert engine.averages.decay == 0.9 and engine.scaler.is_enabled() and engine.max_norm is None and engine.seed == 5
    assert [engine.factor(step) for step in (0, 24, 100)] == pytest.approx([0.2, 0.9, 0.5])  # five steps of warm-up
    assert ["forward" in vars(block) for block in engine.network.body.blocks] == [True, False]
    with engine.autocast():
        assert torch.get_autocast_dtype("cpu") == torch.float16
    plain = engine_with({}, {})
    assert plain.averages is None and not plain.scaler.is_enabled() and plain.max_norm == 1.0
    assert plain.objective.train().loss(None, None, None, None)[0] == "plain"
    assert not any("forward" in vars(block) for block in plain.network.body.blocks)


@pytest.mark.parametrize(
    ("dtype", "reduced"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_blocks_are_sharded_as_asked(dtype, reduced, monkeypatch):
    calls = []
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, **asked: calls.append((module, asked)) or module)
    objective = Objective(randomized(tiny_config("gpt2"), dtype=dtype))
    mesh = Mesh(shard=2, devices={"shard": "the ranks that share"})
    parallelize(objective, mesh, torch.device("cpu"), compute=torch.bfloat16, reshard=False)
    blocks = objective.network.body.blocks
    norms = [[block.attention_norm, block.mlp_norm] for block in blocks]
    assert [module for module, _ in calls] == [norms[0], blocks[0], norms[1], blocks[1], objective]
    assert all(asked["mesh"] == "the ranks that share" and asked["reshard_after_forward"] is False for _, asked in calls)
    assert [asked["mp_policy"].param_dtype for _, asked in calls] == [None, torch.bfloat16] * 2 + [None]
    assert {asked["mp_policy"].reduce_dtype for _, asked in calls} == {reduced}


def test_a_run_that_is_not_named_has_a_name_of_its_own(made, tmp_path, monkeypatch):
    """Also where another one began in the same second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.resolve.time.strftime", lambda form: "20260102-030405")
    for name in ("tiny-20260102-030405", "tiny-20260102-030405-2", "tiny-20260102-030405-3"):
        with torch_as_it_was():
            out = resolve_machine(made[0], Ranks()).run.out
        assert out.as_posix() == f"runs/{name}"
        out.mkdir(parents=True)


@pytest.mark.parametrize(("width", "lr"), [(64, 1e-3), (128, 1e-3), (256, 5e-4), (4096, 3.1e-5)])
def test_rates_of_further_training(width, lr, tmp_path):
    """An eighth of pretraining's; the rate falls with the width, Muon's does not; what is asked for is taken as it is."""
    model.hub.save(randomized(tiny_config("llama", width=width, depth=1, heads=4), dtype=torch.float32), tmp_path)
    config = TrainConfig(run=RunConfig(init=tmp_path))
    found, new = resolve_rates(config), resolve_rates(TrainConfig())
    assert (found.lr, found.matrix_lr) == (lr, 5e-3) and (new.lr, new.matrix_lr) == (8e-3, 4e-2)
    asked = resolve_rates(replace(config, optimizer=OptimizerConfig(lr=0.5, matrix_lr=0.25)))
    assert (asked.lr, asked.matrix_lr) == (0.5, 0.25)


def test_what_ends_documents_ends_texts():
    """Also where the folder's generation_config.json names other ends alone: it is what generating reads."""
    for said, ends in ((7, [7, 9]), ([7, 5], [7, 5, 9]), ([7, 9], [7, 9])):
        network = randomized(tiny_config("llama", eos_id=7, stop_ids=(9,) if said == [7, 9] else ()))
        network.generation = {"eos_token_id": said, "top_k": 4}
        add_stop_id(network, 9)
        assert network.generation == {"eos_token_id": ends, "top_k": 4}
        assert (network.config.eos_id, network.config.stop_ids) == (7, (9,))
    network = randomized(tiny_config("llama", eos_id=None))
    add_stop_id(network, 9)
    assert network.config.eos_id == 9 and not network.config.stop_ids


def test_a_folder_that_is_trained_further_ends_texts_so_too(tmp_path):
    model.hub.save(randomized(tiny_config("llama", eos_id=7), dtype=torch.float32), tmp_path)
    config = TrainConfig(run=RunConfig(init=tmp_path), speed=SpeedConfig(precision="fp32"))
    network = open_network(config, SimpleNamespace(tokenizer=SimpleNamespace(eos_id=9)), None, torch.device("cpu"))
    assert network.config.stop_ids == (9,) and network.generation["eos_token_id"] == [7, 9]


def test_each_task_s_defaults_fit_it():
    """The preset is one that the task trains; its rate is taken, an eighth of it with --init, an adapter's own with one."""
    for name in names():
        task = load(name)
        assert isinstance(task.defaults, Defaults)
        assert ModelConfig.preset(task.defaults.preset).architecture in task.architectures
        config = replace(config_type(name)(), run=RunConfig(objective=name))
        assert resolve_rates(config).lr == task.defaults.lr
        assert resolve_rates(replace(config, optimizer=replace(config.optimizer, lr=0.5))).lr == 0.5


def test_an_objective_s_batch_size(tmp_path):
    """It is the default of the option and of a recipe's section; what either says comes first."""
    sizes = {name: config_type(name)().optimizer.batch_size for name in names()}
    assert {name: size for name, size in sizes.items() if size != 16} == {"span": 48, "grpo": 64, "rloo": 64, "ppo": 64}
    given = {(): 48, ("--batch-size", "4"): 4}
    assert {more: read_options(["--objective", "span", *more]).optimizer.batch_size for more in given} == given
    for said, size in (("lr = 0.1", 48), ("lr = 0.1\nbatch_size = 5", 5)):
        (tmp_path / "own.toml").write_text(f'[run]\nobjective = "span"\n[optimizer]\n{said}\n')
        read = read_options(["--recipe", str(tmp_path / "own.toml")]).optimizer
        assert read == OptimizerConfig(batch_size=size, lr=0.1)

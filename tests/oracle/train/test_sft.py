"""Instruction tuning beside TRL's SFTTrainer: labels, loss and gradients of the same records, padded and packed; whole steps.

TRL finds the learned tokens by generation tags in the template (`assistant_only_loss`), or by the tokens of the prompt alone;
its labels are not shifted. The tagged twin here marks replies with their terminators, as rule 1 of `data.chat.encode` has it.
"""

import datasets
import pytest
import torch
import transformers
import trl
from transformers.integrations.neftune import neftune_post_forward_hook

import model.hub
from data.transforms.causal import IGNORE
from model.weights import to_published, weight_table
from tests.chat_runs import CHATML, conversations, open_sft, whole_epoch, write_base, write_conversations
from tests.compare import absolute, relative
from tests.records import write_rows
from tests.runs import command, last_checkpoint, metrics
from tests.seq2seq import gradients
from train.chat_objective import embedding_noise
from train.losses.choose import LOSSES

LIBRARY = f"TRL {trl.__version__}"
HOOK = f"transformers {transformers.__version__}"
TAGGED = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' %}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}"
    "{%- else %}{{- message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
RECORDS = conversations(12)
PAIRS = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in RECORDS]
STRINGS = [{"prompt": row["messages"][-2]["content"], "completion": f" {row['messages'][-1]['content']}"} for row in RECORDS]
SHAPES = {"messages": RECORDS, "prompt and completion": PAIRS, "strings": STRINGS}


@pytest.fixture(scope="module", params=["Llama", pytest.param("Qwen2", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / request.param, CHATML, kind=request.param)


def trainer(folder, rows: list[dict], place, **settings: object) -> trl.SFTTrainer:
    """TRL's trainer of all records in one batch, with the tagged twin of ChatML."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.chat_template = "<s>", TAGGED
    asked = trl.SFTConfig(
        output_dir=str(place / "theirs"),
        per_device_train_batch_size=len(rows),
        max_length=128,
        assistant_only_loss=not isinstance(rows[0].get("prompt"), str),
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        **settings,
    )
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return trl.SFTTrainer(model=network, args=asked, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)


def split_labels(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each record of TRL's batch, in our convention: labels[t] is the target of position t."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "position_ids" in batch:
        sizes = batch["cu_seq_lens_q"].diff().tolist()
        ids, labels = (each[0].split(sizes) for each in (ids, labels))
    else:
        sizes = batch["attention_mask"].sum(1).tolist()
    pairs = zip(ids, labels, sizes, strict=True)
    return [(id_T[:size].tolist(), [*label_T[1:size].tolist(), IGNORE]) for id_T, label_T, size in pairs]


@pytest.mark.parametrize("packing", ["pad", "first_fit"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients(folder, shape, packing, tmp_path, parity):
    """In float32, as SFTTrainer computes: the mean over all records, padded to one length, or packed (bfd, padding-free)."""
    theirs = trainer(folder, SHAPES[shape], tmp_path, packing=packing == "first_fit")
    (batch,) = theirs.get_train_dataloader()
    assert ("position_ids" in batch) == (packing == "first_fit")
    expected = theirs.compute_loss(theirs.model, dict(batch))
    expected.backward()

    files = write_rows(tmp_path / "corpus.jsonl", SHAPES[shape]), write_conversations(tmp_path / "held_out.jsonl", 2)
    settings = {"packing": packing, "template": "chatml", "dtype": torch.float32}
    task, network = open_sft(folder, files[0], validation=files[1], **settings)
    known = {tuple(ids): labels for ids, labels in split_labels(batch)}
    assert len(task.data.train) == len(known) == len(RECORDS)
    for talk in task.data.train.values:
        (tokens,) = talk.examples
        labels = next(labels for ids, labels in known.items() if list(ids[: len(tokens.ids)]) == tokens.ids.tolist())
        end = len(tokens.ids) - 1
        assert tokens.example().labels.tolist() == labels[:end]
        assert set(labels[end:]) == {IGNORE}, "after the last terminator nothing is learned"

    objective = task.objective(network, LOSSES["chunked"]).train()
    term = objective(ours := whole_epoch(task)).terms["loss"]
    assert ("document_ids" in ours) == (packing == "first_fit")
    (term.sum / term.count).backward()
    name = f"instruction tuning: {folder.name} loss, {shape}, {packing}"
    parity(name, LIBRARY, relative(term.sum / term.count, expected), 1e-6, "float32 rounding")
    table, other, errors = weight_table(network.config), dict(theirs.model.named_parameters()), []
    for key, gradient in gradients(network).items():
        row = table[key]
        errors.append(relative(to_published(row, gradient, network.config), other[row.published].grad))
    assert len(errors) == len(other)
    parity(name.replace("loss", "gradients"), LIBRARY, max(errors), 1e-5, "float32 rounding; sums in another order")


@pytest.mark.slow
def test_two_whole_steps(folder, tmp_path, parity):
    """SFTTrainer.train and `python -m train`: every record in each of two steps of clipped gradient descent; their losses and
    updates. (AdamW divides a gradient by its size: float32's noise in gradients near 0 becomes whole steps.)"""
    asked = {"learning_rate": 0.1, "max_steps": 2, "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "weight_decay": 0.0}
    asked |= {"optim": "sgd", "logging_steps": 1}
    theirs = trainer(folder, RECORDS, tmp_path, **asked)
    theirs.train()
    losses = [row["loss"] for row in theirs.state.log_history if "loss" in row]
    files = write_rows(tmp_path / "corpus.jsonl", RECORDS), write_conversations(tmp_path / "held_out.jsonl", 2)
    options = ["--objective", "sft", "--init", folder, "--corpus", files[0], "--validation", files[1], "--steps", 2]
    options += ["--batch-size", 12, "--sft.packing", "pad", "--sft.template", "chatml", "--context", 128, "--log-every", 1]
    options += ["--optimizer", "sgd", "--momentum", 0, "--lr", 0.1, "--schedule", "constant", "--warmup", 0, "--clip", 1]
    options += ["--weight-decay", 0, "--device", "cpu", "--threads", 1, "--sample-every", 0, "--sft.replies", 0]
    said = command(*options, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    ours = [row["loss"] for row in metrics(tmp_path / "run") if row["split"] == "train"]
    name = f"instruction tuning: {folder.name}"
    parity(f"{name} logged losses of two steps", LIBRARY, relative(ours, losses), 1e-6, "float32 rounding")
    network, other, errors = model.hub.load(last_checkpoint(tmp_path / "run")), theirs.model.state_dict(), []
    table, before = weight_table(network.config), dict(model.hub.load(folder).named_parameters())
    for key, weight in network.named_parameters():
        moved = to_published(table[key], weight.detach(), network.config)
        start = to_published(table[key], before[key].detach(), network.config)
        errors.append(relative(moved - start, other[table[key].published] - start))
    parity(f"{name} updates of two steps", LIBRARY, max(errors), 1e-4, "float32 rounding of the weights")


def test_neftune(parity):
    """The same numbers by the same seed for a record without padding. In a padded batch theirs is scaled by the batch's
    length; ours, as in the authors' code, by each record's own tokens, and so is a packed record's."""
    embedding, alpha = torch.nn.Embedding(50, 24), 5.0
    ids_BT = torch.arange(20)[None]
    batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    torch.manual_seed(0)
    with embedding_noise(embedding, batch, alpha):
        ours = embedding(ids_BT)
    embedding.neftune_noise_alpha = alpha
    torch.manual_seed(0)
    theirs = neftune_post_forward_hook(embedding.train(), (ids_BT,), embedding(ids_BT))
    parity("NEFTune: noise of one record", HOOK, absolute(ours, theirs), 1e-6, "float32 rounding")
    assert not torch.equal(ours, embedding(ids_BT))

    long_BT = torch.randint(50, (2, 4000))
    mask_BT = torch.ones_like(long_BT)
    mask_BT[1, 1000:] = 0
    with embedding_noise(embedding, {"input_ids": long_BT, "attention_mask": mask_BT}, alpha):
        noise_BTD = (embedding(long_BT) - embedding.weight[long_BT]).detach()
    for row, length in enumerate((4000, 1000)):
        noise_TD, bound = noise_BTD[row, :length], alpha / (length * 24) ** 0.5
        assert 0.999 * bound < noise_TD.abs().max() <= bound * (1 + 1e-5)
        assert abs(noise_TD.var() / (bound**2 / 3) - 1) < 0.03 and abs(noise_TD.mean()) < 0.02 * bound
    theirs = neftune_post_forward_hook(embedding, (long_BT,), embedding(long_BT)) - embedding.weight[long_BT]
    assert absolute(theirs[1].abs().max(), alpha / (4000 * 24) ** 0.5) < 1e-4, "by the padded length"

"""An option that would do nothing beside the others is refused by its name, in every command, before anything is read."""

import dataclasses

import pytest

import data.__main__
import eval.__main__
import lora.__main__
import model.__main__
import quant.__main__
import train.__main__
import train.start
from eval.commands.options import SUBCOMMANDS as SCORES
from lora.config import CONFIGS
from quant.commands.options import KINDS as SCHEMES
from quant.config import QatConfig
from tests.runs import command
from train.command_line import spelled
from train.config import TrainConfig
from train.needs import NEEDS
from train.registry import load, names

MAIN = {"train": train.__main__, "model": model.__main__, "data": data.__main__, "lora": lora.__main__}
MAIN |= {"quant": quant.__main__, "eval": eval.__main__}
REFUSED = {  # a command line, whose first option is idle: why
    "train --preset tiny --init x": "--init brings its own",
    "train --dropout 0.0 --init x --adapter lora": "--adapter leaves the network of --init as it is",
    "train --dropout 0.1 --objective dpo --init x": "this objective trains without",
    "train --vocab-size 2048 --init x": "--init brings its own tokenizer",
    "train --steps 700 --epochs 2": "--epochs says how long",
    "train --extend hold": "it says how a finished run goes on",
    "train --text-key text": "the corpus holds no records",
    "train --text-key text --objective seq2seq --corpus a.jsonl": "this objective reads records",
    "train --separator x --objective seq2seq --corpus a.jsonl": "this objective reads records",
    "train --no-dedup --objective seq2seq --corpus a.jsonl": "this objective reads records",
    "train --early-stop-on loss": "they are of --early-stop N",
    "train --min-delta 0.1": "they are of --early-stop N",
    "train --loss chunked --objective classify --corpus a.csv": "a text has only as many logits as there are labels",
    "train --seq2seq.bleu --objective seq2seq --seq2seq.generated 0": "--seq2seq.generated 0 generates no texts to score",
    "train --loss chunked --objective pairs --corpus a.csv": "two texts have only as many logits as there are labels",
    "train --loss chunked --objective qa --corpus a.jsonl": "a window has only as many logits as tokens",
    "train --qa.null-threshold 1 --objective qa --corpus a.jsonl --qa.always-answer": "never predicts none",
    "train --val-fraction 0.1 --objective sft --init x": "the built-in records are split by modules",
    "train --dpo.label-smoothing 0.1 --objective dpo --init x": "the losses of --dpo.loss have no label_smoothing",
    "train --dpo.gamma 1 --objective dpo --init x": "the losses of --dpo.loss have no gamma",
    "train --dpo.tau 1 --objective dpo --init x": "the losses of --dpo.loss have no tau",
    "train --dpo.dpop-lambda 1 --objective dpo --init x": "the losses of --dpo.loss have no dpop_lambda",
    "train --dpo.nll-weight 1 --objective dpo --init x": "it is of --dpo.loss cpo and orpo",
    "train --dpo.divergence-alpha 1 --objective dpo --init x": "it is of --dpo.divergence alpha",
    "train --dpo.reference copy --objective dpo --init x --dpo.loss simpo": "the losses of --dpo.loss have no reference",
    "train --dpo.reference-file y --objective dpo --init x": "it is of --dpo.reference precomputed",
    "train --dpo.max-reply 9 --objective dpo --init x --dpo.replies 0": "--dpo.replies 0 generates none",
    "train --loss chunked --objective dpo --init x": "--dpo.loss chooses the loss of pairs",
    "train --dropout 0.1 --objective grpo --init x --reward exact": "this objective trains without",
    "train --grpo.clip-low 0.1 --objective grpo --init x --reward exact --grpo.loss cispo": "has no clip-low",
    "train --grpo.clip-high 0.1 --objective grpo --init x --reward exact --grpo.loss cispo": "has no clip-high",
    "train --grpo.cap 3 --objective grpo --init x --reward exact": "the loss of --grpo.loss has no cap",
    "train --grpo.kl k2 --objective grpo --init x --reward exact": "they are of the KL term, --grpo.beta",
    "train --grpo.reference copy --objective grpo --init x --reward exact": "they are of the KL term, --grpo.beta",
    "train --grpo.punish-margin 3 --objective grpo --init x --reward exact": "it is of --grpo.truncated punish",
    "train --grpo.correction-cap 3 --objective grpo --init x --reward exact": "it is of --grpo.correction",
    "train --loss chunked --objective grpo --init x --reward exact": "--grpo.loss chooses the loss",
    "train --grpo.clip-high 0.3 --objective grpo --init x --reward exact": "one step a rollout, whose ratio is 1",
    "train --grpo.cap 4 --objective grpo --init x --reward exact --grpo.loss cispo": "one step a rollout, whose ratio is 1",
    "train --rloo.clip-low 0.1 --objective rloo --init x --reward exact": "one step a rollout, whose ratio is 1",
    "train --rloo.reference copy --objective rloo --init x --reward exact --rloo.beta 0": "it is of the KL term, --rloo.beta",
    "train --rloo.punish-margin 3 --objective rloo --init x --reward exact": "it is of --rloo.truncated punish",
    "train --rloo.correction-cap 3 --objective rloo --init x --reward exact": "it is of --rloo.correction",
    "train --loss chunked --objective rloo --init x --reward exact": "--objective rloo has a loss of its own",
    "train --ppo.clip-low 0.1 --objective ppo --init x --reward exact --ppo.rollout-epochs 1": "one step a rollout",
    "train --ppo.clip-high 0.1 --objective ppo --init x --reward exact --ppo.rollout-epochs 1": "one step a rollout",
    "train --ppo.dual-clip 3 --objective ppo --init x --reward exact --ppo.rollout-epochs 1": "one step a rollout",
    "train --ppo.clip-value 0.1 --objective ppo --init x --reward exact --ppo.rollout-epochs 1": "one step a rollout",
    "train --ppo.reference copy --objective ppo --init x --reward exact --ppo.beta 0": "they are of the KL term, --ppo.beta",
    "train --ppo.kl k3 --objective ppo --init x --reward exact --ppo.beta 0": "they are of the KL term, --ppo.beta",
    "train --ppo.kl-target 3 --objective ppo --init x --reward exact --ppo.beta 0": "they are of the KL term, --ppo.beta",
    "train --ppo.max-kl 3 --objective ppo --init x --reward exact --ppo.beta 0": "they are of the KL term, --ppo.beta",
    "train --ppo.kl-horizon 30 --objective ppo --init x --reward exact": "it is of --ppo.kl-target",
    "train --ppo.punish-margin 3 --objective ppo --init x --reward exact": "it is of --ppo.truncated punish",
    "train --ppo.correction-cap 3 --objective ppo --init x --reward exact": "it is of --ppo.correction",
    "train --ppo.resample 2 --objective ppo --init x --reward exact": "groups of one reply always agree",
    "train --loss chunked --objective ppo --init x --reward exact": "--objective ppo has a loss of its own",
    "train --qat int8 --objective ppo --init x --reward exact": "the critic has no quantization-aware training",
    "train --kto.reference-file y --objective kto --init x": "it is of --kto.reference precomputed",
    "train --kto.max-reply 9 --objective kto --init x --kto.replies 0": "--kto.replies 0 generates none",
    "train --loss chunked --objective kto --init x": "the loss is KTO's",
    "train --loss chunked --objective reward --init x": "the loss is that of pairs of scores",
    "train --sft.max-reply 9 --objective sft --init x --sft.replies 0": "--sft.replies 0 generates none",
    "train --mlm.short 0.1 --objective mlm": "add --mlm.nsp",
    "train --span.density 0.2 --objective span --span.mixture ul2": "--span.mixture has its own",
    "train --span.sentinels 5 --objective span --init x": "--init brings its own tokenizer",
    "train --denoise.poisson 3 --objective denoise --denoise.mask 0": "--denoise.mask 0 masks no words",
    "train --denoise.mask-random 0.1 --objective denoise --denoise.mask 0": "there are no masks",
    "train --text-key body --corpus a.txt b/*.md": "the corpus holds no records",
    "train --on-bad-text skip --corpus stdlib-code": "the corpus comes with Python",
    "train --text-key text --corpus a=a.txt:1 b=b/*.md:2": "the corpus holds no records",
    "train --mix documents --corpus a.txt": "it is of a mixture, --corpus NAME=PATH:WEIGHT",
    "train --eval-corpus": "it names nothing: give NAME=PATH",
    "train --eval-corpus --steps 2": "it names nothing: give NAME=PATH",
    "train --validation": "it names nothing: give files, folders or globs",
    "train --early-stop-on --early-stop 2": "it names nothing: give names of scores",
    "train --mix-temperature 2 --corpus a=a.txt:1 b=b.txt:2": "it is of --mix temperature",
    "train --val-fraction 0.05 --validation x": "--validation names what is held out",
    "train --matrix-lr 0.02 --optimizer adamw": "it is Muon's rate, --optimizer muon",
    "train --anchor-weight 2 --init x": "it is λ of --anchor l2-sp, ewc or ewc-empirical",
    "train --anchor-corpus y --init x --anchor l2-sp": "they are what F of --anchor ewc and ewc-empirical is estimated from",
    "train --reward exact": "this objective does not learn from rewards",
    "train --reward-weights 1": "this objective does not learn from rewards",
    "train --allow-code-rewards": "this objective does not learn from rewards",
    "train --allow-code-rewards --objective grpo --init x --reward exact": "it is of --reward tests",
    "train --reward-workers 2": "this objective does not learn from rewards",
    "train --reward-timeout 3": "this objective does not learn from rewards",
    "train --momentum 0.9 --optimizer adamw": "Muon and SGD have one",
    "train --eps 1e-8 --optimizer sgd": "they are AdamW's",
    "train --betas 0.9 0.99 --optimizer sgd": "they are AdamW's",
    "train --final-lr 0.1 --schedule constant": "--schedule constant keeps the rate to the end",
    "train --recompute-every 2": "it is of --recompute blocks or selective",
    "train --reshard off": "it is of --mesh shard",
    "train --mesh shard": "one process shares with nobody",
    "train --lora.r 8 --init x": "add --adapter lora",
    "train --lora.r 8 --adapter ia3 --init x": "add --adapter lora",
    "train --qat.granularity channel": "add --qat int8",
    "train --qat.group-size 32 --qat int8": "it is of --qat.granularity group",
    "train --qat.observer minmax --qat int8 --qat.inputs dynamic": "they are of inputs with one scale",
    "model generate x --temperature 0.5 --beams 3": "--beams draws nothing",
    "model generate x --top-k 5 --beams 2": "--beams draws nothing",
    "model generate x --stream --beams 2": "--beams settle at the end",
    "model generate x --top-p 0.5 --temperature 0": "--temperature 0 always takes the best token",
    "model generate x --infill-order spm --prompt a": "it is for a gap, and there is no --prefix or --suffix",
    "model generate x --no-specials": "it is for --prompt or --source, and there is neither",
    "model predict x y --label z": "it names what --score compares with",
    "model info --batch-size 2": "without a NETWORK the presets are listed",
    "model info gpt2 --recompute-every 2": "it is of --recompute blocks or selective",
    "data prepare --text-key text": "the corpus holds no records",
    "data prepare --on-bad-text error": "the corpus comes with Python",
    "data prepare --val-fraction 0.1 --validation x": "--validation says what is held out",
    "data prepare --mix temperature --corpus a.txt": "with --mix temperature each source is NAME=PATH",
    "data prepare --mix documents --corpus a.txt": "it is of a mixture, --corpus NAME=PATH:WEIGHT",
    "data prepare --validation": "it names nothing: give files, folders or globs",
    "lora merge x y --labels 2 --head lm --out z": "this head has no classes",
    "quant nf4 x --corpus y --no-perplexity --out z": "--no-perplexity scores no text",
    "quant fp4 x --eval-tokens 50000 --no-perplexity --out z": "--no-perplexity scores no text",
    "quant llm-int8 x --cache y --no-perplexity --out z": "--no-perplexity scores no text",
    "quant int8-dynamic x --group-size 128 --out z": "it is of --granularity group",
    "quant int8-static x --group-size 128 --granularity tensor --out z": "it is of --granularity group",
    "quant int8-static x --corpus y --calibrate z --no-perplexity --out z": "--calibrate names the text to observe",
    "quant int8-static x --eval-tokens 9 --no-perplexity --out z": "--no-perplexity scores no text",
    "eval bleu a b --smooth-value 0.1": "it is of --smooth floor or add-k",
    "eval bleu a b --force --tokenize none": "--tokenize none says it already",
    "eval meteor a b --beta 3 --gamma 0": "--gamma 0 leaves no penalty",
    "eval rouge a b --test bootstrap": "it is of several systems",
    "eval chrf a b --differ 3": "it is of several systems",
    "eval f1 a.jsonl b --reference-field answer": "a text is a line of its file",
    "eval f1 a b.jsonl --hypothesis-field answer": "a text is a line of its file",
    "eval perplexity x --text-key text": "no records are read",
}


@pytest.mark.parametrize("line", REFUSED)
def test_it_is_refused(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.start, "start", lambda config: pytest.fail("the run began"))
    package, *words = line.split()
    said = command(*words, main=MAIN[package].main)
    option = next(word for word in words if word.startswith("--"))
    assert said.code == 2 and not said.out and not list(tmp_path.iterdir())
    assert said.err.startswith(f"error: {option} would have no effect: ") and REFUSED[line] in said.err, said.err


def test_every_rule_is_of_options_that_are_there():
    """And each rule of every command is met by a line above."""
    kinds = [*model.__main__.COMMANDS, data.__main__.Prepare, lora.__main__.Merge, *SCHEMES.values(), *SCORES.values()]
    told = " ".join(REFUSED)
    for kind in kinds:
        there = {field.name for field in dataclasses.fields(kind)}
        for rule in getattr(kind, "NEEDS", ()):
            forms = [form for name in rule.options for form in (spelled(name), spelled(f"no_{name}"))]
            assert set(rule.options) <= there and any(f"{name} " in told for name in forms), (kind, rule)
    groups = (getattr(TrainConfig(), field.name) for field in dataclasses.fields(TrainConfig))
    there = {field.name for group in groups for field in dataclasses.fields(group)}
    there |= {f"{name}.{field}" for name, kind in CONFIGS.items() for field in kind.__dataclass_fields__}
    settings = {name: load(name).Settings for name in names()}
    there |= {f"{name}.{field}" for name, kind in settings.items() if kind for field in kind.__dataclass_fields__}
    there |= {f"qat.{field}" for field in QatConfig.__dataclass_fields__}
    for rule in (*NEEDS, *(rule for name in names() for rule in load(name).needs)):
        own = [name for name in CONFIGS if any(option.startswith(f"{name}.") for option in rule.options)]
        assert set(rule.options) <= there and (own or any(spelled(name) in told for name in rule.options)), rule


OTHERS = ["--save-every 700", "--no-dedup", "--lr 0.5", "--lora.r 8", "--verbose --corpus x", "--recipe y"]


@pytest.mark.parametrize("line", OTHERS)
def test_a_resume_takes_no_other_options(line, finished):
    """Not even those with the value that a new run would have."""
    said = command("--resume", finished, *line.split())
    assert (said.code == 2 and "goes on with the run's own settings" in said.err) or "--recipe y: there is no" in said.err

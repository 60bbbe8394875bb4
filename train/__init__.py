"""Training: objectives, the optimizer step, the loop, checkpoints.

Where to read first: `step` (one optimizer step, the heart, in 40 lines), then `objective` and `losses/` (the loss that is
minimised), `engine` (the state that a step advances, and its files), `loop` (the run around the steps; `start` begins it):

    config            the options of `python -m train`; `options` reads them, `check` refuses values, `needs` those that lack
                      another option
    config_toml       config.toml, in and out; `overrides`: options that a resume may change
    command_line      shared by all command lines: messages, notes, options without effect
    start, loop       start or resume a run; the run around the steps; `interrupt`: Ctrl-C and SIGTERM
    saving, early_stop    a run's checkpoints; the end of a run that no longer improves
    dry_run           a run set up, checked and estimated: no step of it counts
    resolve, setup    every "auto" decided; from settings to objects: data, network, optimizers
    engine, step, objective    the network with its optimizers; one step; the loss of a batch
    task, registry    the interface of an objective; the objectives by name, ours and a user's own files
    tasks/            one file an objective: its batches, its scores beside a baseline, a sample
    token_task, record_task    shared by objectives on blocks of plain text, and on records with columns
    source_task, source_objective    text corrupted for an encoder-decoder; its loss, and with the source of another text
    context_objective    the loss of text with a context, and under a wrong one
    label_objective, label_scores, label_report    text classification: loss, scores beside a baseline, tables; `label_config`
    number_objective, pair_baseline    two texts and one number: loss; what counting words gives for pairs
    tag_objective, tag_baseline    token classification: loss, scores beside the most frequent tag of each word
    answer_objective, answer_scores, answer_report    question answering: loss, scores beside baselines, text
    chat_data, chat_objective, chat_replies, chat_report    instruction tuning: template; loss, NEFTune; replies; text
    preference_task    shared by objectives on preferences; `reference_task`: by those with a `reference` (`reference_file`)
    shared_prompt     several replies in one row, behind one prompt
    preference_objective, rated_objective, reward_objective    losses of pairs (dpo), rated replies (kto), scores (reward)
    policy_task       shared by ppo, grpo and rloo; `policy_settings`: their options; `policy_report`: what they print
    prompt_task       records of prompts alone
    rollout, rollout_source    sampled replies as arrays and steps; where they come from
    rollout_advantages         their advantages, of their rewards
    policy_objective  the policy loss of replies, and what is logged of it
    critic, value_objective, ppo_source    PPO: the network of values, its loss, and the advantages of tokens
    evaluate          sums and counts over held-out text; bits per byte, and the n-gram baseline
    mixing            the share of each source of a mixture, and what was drawn
    eval_corpora      further corpora that each validation scores (--eval-corpus); `eval_text`, `eval_records`: of each kind
    freeze, unfreeze, layer_groups    frozen parts; layers unfrozen one by one; a network's layers from the top down
    adapters, qat     runs that train an adapter; quantization-aware training
    anchor, anchored_run    penalties that hold weights near those of --init; F of the old text, and the run's file
    recompute, allocator       activation checkpointing; freed memory that is kept for the next step
    losses/           cross-entropy, with Triton's kernel; preference and policy losses, advantages
    optimizers/       AdamW, Muon, SGD; schedules, clipping, precision, averaged weights
    parallel/         ranks, DDP, FSDP2, sharded tensors
    runs/             run folders: checkpoint, sharded state, export, lock
    reports/          progress, metrics.jsonl, curves.png, time and memory
    rewards/          functions that judge sampled replies: named ones and a user's own
    synthetic/        data that a network writes itself: instructions, and the best of its replies
    recipes/          settings in TOML, for `--recipe`

`schedule` forwards to `optimizers/schedule`. `optim`, `precision`, `clip` and `loss/` forward the names that moved, for one
version.

Labels are shifted already: `labels[t]` is the target of position t, and -100 is ignored.
"""

from importlib import import_module

PUBLIC = {  # file: the names that it offers; `from train import AdamW` is the stable interface
    "anchor": ("Anchor", "fisher_diagonal"),
    "config": ("TrainConfig",),
    "engine": ("Engine",),
    "evaluate": ("bits_per_byte",),
    "losses.advantages": ("combine_rewards", "group_advantages"),
    "losses.chunked": ("chunked_linear_cross_entropy",),
    "losses.cross_entropy": ("cross_entropy_reference", "linear_cross_entropy"),
    "losses.divergence": ("f_divergence", "transform_log_ratios"),
    "losses.entropy": ("token_log_probs_and_entropy",),
    "losses.gae": ("gae", "token_rewards", "whiten"),
    "losses.kl": ("kl_estimate",),
    "losses.kl_control": ("AdaptiveKL", "FixedKL"),
    "losses.mixture": ("parse_losses",),
    "losses.overlong": ("soft_overlong_penalty",),
    "losses.pair_weights": ("ld_token_weights", "wpo_weights"),
    "losses.policy": ("POLICY_DETAILS", "POLICY_LOSSES"),
    "losses.policy_registry": ("PolicyDetails", "policy_count"),
    "losses.preference": ("PREFERENCE_DETAILS", "PREFERENCE_LOSSES"),
    "losses.preference_registry": ("LossDetails",),
    "losses.preference_replies": ("kto_unpaired", "kto_z"),
    "losses.preference_sorted": ("aot_pairs",),
    "losses.sampler": ("sampler_weights",),
    "losses.value": ("ppo_value_loss",),
    "objective": ("MaskedObjective", "Metric", "Objective", "Result", "Term"),
    "optimizers.adamw": ("AdamW", "adamw_update"),
    "optimizers.adamw8bit": ("AdamW8bit",),
    "optimizers.build": ("build_optimizer",),
    "optimizers.clip": ("clip_grad_norm_", "total_norm_reference"),
    "optimizers.ema": ("EMA",),
    "optimizers.groups": ("parameter_groups",),
    "optimizers.muon": ("Muon", "orthogonalize"),
    "optimizers.precision": ("autocast", "choose_precision"),
    "optimizers.rounding": ("stochastic_round_",),
    "optimizers.scaler": ("GradScaler",),
    "optimizers.schedule": ("SCHEDULES",),
    "optimizers.sgd": ("SGD", "sgd_update"),
    "rewards.open": ("Rewards", "open_rewards"),
    "rewards.sample": ("Sample",),
    "runs.errors": ("CheckpointError", "TrainError"),
    "step": ("StepResult", "train_step"),
    "synthetic.best_of": ("best_of_n_distribution", "best_of_n_kl_bound", "choose_best", "kl_divergence"),
    "synthetic.novelty": ("NoveltyFilter", "rouge_l_bound"),
    "task": ("Defaults", "Task"),
}
_FILE_OF = {name: file for file, names in PUBLIC.items() for name in names}
__all__ = sorted(_FILE_OF)


def __getattr__(name: str):
    if name in _FILE_OF:
        return getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""The loop: batches + network -> checkpoint.

Where to read first: `step` (one optimizer step: the heart, in 40 lines), then `objective` and `losses/` (the loss that is
minimised), `engine` (the state that a step advances, and its files), `loop` (the run around the steps; `start` begins it):

    config       the options of `python -m train`; `needs`: options that ask for others; `config_toml`: config.toml, both ways
    command_line shared by all command lines: messages, notes, options that would have no effect
    options overrides   a command line read into the settings; options that a resume may change
    start loop   a run begins or goes on; the run around the steps; `interrupt`: Ctrl-C and SIGTERM
    resolve setup   every "auto" decided; from settings to objects: data, network, optimizers
    engine step objective   the network with its optimizers; one step; the loss of a batch
    task registry   the interface of an objective; the objectives by name, ours and a user's own files
    tasks/       one file an objective: its batches, its scores beside a baseline, an example of what was learned
    token_task record_task   shared by objectives on blocks of plain text, and on records with columns
    label_objective label_scores label_report   text classification: loss; scores beside a baseline without the text; tables
    evaluate     sums and counts over held-out text; bits per byte, and the n-gram baseline
    freeze adapters qat   frozen weights; runs that train an adapter; quantization-aware training
    recompute allocator   activation checkpointing; malloc keeps the memory that a step frees
    losses/      losses of tokens, with Triton's kernel
    optimizers/  AdamW, Muon, SGD; schedules, clipping, precision, averaged weights
    parallel/    ranks, DDP, FSDP2, sharded tensors
    runs/        run folders: checkpoint, sharded state, export, lock
    reports/     progress, metrics.jsonl, curves.png, time and memory
    recipes/     settings in TOML, for `--recipe`

Labels are shifted already: `labels[t]` is the target of position t, and -100 is ignored.
"""

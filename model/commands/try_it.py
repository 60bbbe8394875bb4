"""The command that shows what a model folder can do, to be printed where one was written."""

from pathlib import Path


def try_it(folder: Path) -> str:
    from data.config import DataError
    from data.shell import command
    from data.tokenizer import load_tokenizer
    from model.hub import read_config
    from train.held_out import objective_of

    config = read_config(folder)
    try:
        tokenizer = load_tokenizer(folder, config.vocab_size)
    except DataError:  # it has none: nothing can be said to it in words
        return command("model", "info", folder)
    if objective_of(config) == "mlm" and tokenizer.mask_id is not None:
        return command("model", "fill", folder, "The [MASK] statement")
    if config.head == "lm":
        option = "--source" if config.architecture == "encoder-decoder" else "--prompt"
        return command("model", "generate", folder, option, "The")
    return command("model", "info", folder)

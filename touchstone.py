"""The command `touchstone`: every command line of the project under one name, which no file of a user can take.

    touchstone train …        as  python -m train …
    touchstone generate …     as  python -m model generate …     (fill, predict, info, resize and export likewise)

`python -m train` runs the file train.py of the folder that it is called in, if there is one; this command does not look there.
Under torchrun: torchrun --no-python --nproc-per-node 2 touchstone train …
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

PACKAGES = ("model", "data", "quant", "eval", "lora", "train")
OF_MODEL = ("generate", "fill", "predict", "info", "resize", "export")
HERE = Path(__file__).resolve().parent
HELP = """usage: touchstone COMMAND [OPTIONS]

  train      train a network: pretraining, fine-tuning, adapters
  data       prepare a corpus
  model      generate, fill, predict, info, resize, export; each also alone: touchstone generate …
  lora       merge an adapter into its base
  quant      quantize a model folder to 4 or 8 bits
  eval       score texts and models

`touchstone COMMAND --help` explains one. `python -m COMMAND` is the same, but not in a folder with files such as model.py."""


def shadowed() -> list[Path]:
    """The files or folders of a user that Python finds in place of our packages."""
    found = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [spec.origin] if spec.origin else [*(spec.submodule_search_locations or ())]
        found |= {Path(place): name for place in places if Path(place).resolve().parent not in (HERE / name, HERE)}
    return list(found)


def refuse_shadowed() -> None:
    """End with a message where a file of the user's hides a package of ours, before any of its code runs."""
    if not (files := shadowed()):
        return
    names = ", ".join(map(str, files))
    in_path = {Path(folder).resolve() for folder in os.environ.get("PYTHONPATH", ".nowhere").split(os.pathsep)}  # "": here
    if any(in_path & {file.parent.resolve(), file.parent.parent.resolve()} for file in files):
        advice = "PYTHONPATH names that folder: unset it"
    else:
        advice = "use the command `touchstone`, which ignores the folder that it runs in"
    print(f"error: {names} would be imported instead of Touchstone's own; {advice}, or rename it", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        sys.exit(0)
    name, rest = ("model", words) if words[0] in OF_MODEL else (words[0], words[1:])
    if name not in PACKAGES:
        print(f"error: touchstone {name}: the commands are {', '.join((*PACKAGES, *OF_MODEL))}", file=sys.stderr)
        sys.exit(2)
    refuse_shadowed()
    from data import shell

    shell.launcher = "touchstone"
    sys.argv = [f"touchstone {name}", *rest]
    runpy.run_module(f"{name}.__main__", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

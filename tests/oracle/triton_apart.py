"""Triton in a process of its own, which either interprets kernels or compiles them for cards that are not here."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def fresh(module: str, what: str, cache: Path, **environment: str) -> dict:
    """What `python -m module what` prints as JSON, in a new process, which this one's triton settings do not reach."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment = inherited | {"TRITON_CACHE_DIR": str(cache)} | environment
    command = [sys.executable, "-m", module, what]
    shown = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(shown.splitlines()[-1])


def registers_and_stack(cubin: bytes) -> list[int]:
    """Of a compiled kernel, by the reader in triton's wheel; bytes of stack mean that registers were spilled."""
    from triton.backends import nvidia

    reader = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.cubin").write_bytes(cubin)
        command = [reader, "-res-usage", Path(folder, "kernel.cubin")]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(number) for number in re.search(r"REG:(\d+) STACK:(\d+)", shown).groups()]

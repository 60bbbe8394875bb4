"""Tests of what depends on the processor's instructions, run on AVX2 too where it has more.

    INT8 products       torch's own saturate without VNNI: there `quant.int8_product` multiplies in two planes. Kept from VNNI,
                        torchao's saturate too
    bitsandbytes        has other code for AVX-512, and some of it is wrong (`tests.oracle.believed`)
    compiled code       has vectors of the processor's width: sums in another order, within the same tolerances
    products            in bfloat16 are slow where they are emulated: `--precision auto` takes them where they are measured to
                        pay. So the losses of a default run are those of its processor: after 100 steps 5.21617 in float32 (with
                        AVX-512 and AVX2 the same to 7 digits), 5.21542 in bfloat16. Tests hold what all have in common
    sorts               torch's have no order of equals but where it is asked for (`tests.oracle.model.test_sampling`)
"""

import os
import subprocess
import sys

import pytest
import torch

from tests.runs import ROOT

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}  # the first alone leaves oneDNN's wider products on
DEPENDING = (
    "tests/oracle/quant/test_nf4.py",
    "tests/oracle/lora/test_qlora.py",
    "tests/oracle/quant/test_linear_4bit.py",
    "tests/oracle/quant/test_blockwise.py",
    "tests/oracle/quant/test_int8_folders.py",
    "tests/oracle/quant/test_llm_int8.py",
    "tests/oracle/train/test_losses.py",
    "tests/oracle/model/test_parts.py",
    "tests/oracle/model/test_sampling.py",
    "tests/invariant/quant/test_int8_network.py",
    "tests/invariant/train/test_precision.py",
    "tests/invariant/model/test_decoders.py::test_a_compiled_block_is_one_graph",
    "tests/invariant/train/test_recompute.py::test_compiled_blocks",
)


@pytest.mark.slow
def test_what_depends_on_it_holds_on_avx2(tmp_path):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return  # this processor has no more: the default tests have run so already
    # Inductor's cache does not ask for which vectors its code was made: what AVX-512 left there gives NaN with AVX2.
    environment = os.environ | AVX2 | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    asked = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    seen = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert seen.stdout == "AVX2\n"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *DEPENDING]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]

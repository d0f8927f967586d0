"""SAELens loads our architectures whatever is imported first; each order needs a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from crosslens.crosscoders import TopKCrosscoder, TopKCrosscoderConfig

LOAD = """
print(type(SAE.load_from_disk(FOLDER)).__name__)
"""
ORDERS = {
    # crosslens is light until sae_lens is imported or a name is used
    "crosslens, then sae_lens": """
import sys, crosslens
assert "torch" not in sys.modules and "sae_lens" not in sys.modules
from sae_lens import SAE
""",
    "sae_lens, then crosslens": """
from sae_lens import SAE
import crosslens
""",
    "crosslens names, then sae_lens": """
import crosslens
crosslens.BatchTopKCrosscoderTrainingConfig(d_sae=4, k=1)
from sae_lens import SAE
""",
    "sae_lens.saes.sae after crosslens": """
import crosslens
from sae_lens.saes.sae import SAE
""",
    "the trainer first": """
import crosslens.training.trainer
from sae_lens import SAE
""",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        "crosslens, then sae_lens",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in list(ORDERS)[1:]),
    ],
)
def test_saelens_loads_a_crosscoder(order: str, tmp_path: Path):
    TopKCrosscoder(TopKCrosscoderConfig(d_in=6, d_sae=4, n_snapshots=2, k=2)).save(tmp_path)
    code = f"FOLDER = {str(tmp_path)!r}\n{ORDERS[order]}{LOAD}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "TopKCrosscoder"

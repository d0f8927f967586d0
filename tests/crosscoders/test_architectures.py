"""What architectures declare, and the page that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosslens.crosscoders import ARCHITECTURES, DECLARATIONS, TRAINING_ARCHITECTURES, Architecture, architectures
from tests.crosscoders.reference import KNOWN
from tests.crosscoders.test_crosscoders import B, F, make, raw, step_input

ROOT = Path(__file__).parents[2]


def test_every_module_of_the_folder_is_registered():
    files = {path.stem for path in Path(architectures.__path__[0]).glob("*.py")} - {"__init__"}
    assert {f"{name}_crosscoder" for name in files} == set(DECLARATIONS)
    assert list(ARCHITECTURES) == list(TRAINING_ARCHITECTURES) == list(DECLARATIONS)


@pytest.mark.parametrize("name", DECLARATIONS)
def test_a_declaration_fits_its_classes(name: str):
    declared = DECLARATIONS[name]
    for sae_class, config_class in (declared.inference, declared.training):
        assert config_class.architecture() == name == declared.name
        assert sae_class.__annotations__["cfg"] == config_class.__name__
    config = declared.training[1](d_in=8, d_sae=4, n_snapshots=2, **({"k": 1} if "k" in declared.denser else {}))
    assert config.get_inference_config_class() is declared.inference[1]
    assert hasattr(config, "aux_loss_coefficient") == declared.revives_dead
    assert hasattr(config, declared.denser.split()[-1])


@pytest.mark.parametrize("declared", DECLARATIONS.values(), ids=lambda declared: declared.title)
def test_the_page_about_architectures_shows_what_is_declared(declared: Architecture):
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8").splitlines()
    assert declared.docs_row in page


@pytest.mark.parametrize("name", KNOWN)
def test_a_step_in_eval_mode_gates_as_at_inference(name: str):
    sae, x = make(name, 3, seed=3), raw(3, seed=3)
    if name == "batchtopk_crosscoder":
        sae.threshold.fill_(0.7)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    sae.eval()
    output = sae.training_forward_pass(step_input(x))
    features = output.feature_acts.to_dense().detach()
    assert 0 < int(features.count_nonzero()) < B * F
    torch.testing.assert_close(features, sae.to_inference().encode(x))
    decoded = (output.sae_out + sae.b_dec).detach().unflatten(-1, (3, -1)) / sae.activation_scale[:, None]
    torch.testing.assert_close(decoded, sae.decode(features).detach())
    output.loss.backward()
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())

"""Hostile and damaged files are refused in one line, before memory is allocated, and without running their code."""

from __future__ import annotations

import json
import os
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file

from crosslens.crosscoders import ARCHITECTURES, BatchTopKCrosscoder, BatchTopKCrosscoderConfig, load
from crosslens.crosscoders.inspection import MAX_HEADER, expected_shapes, inspect_crosscoder, read_header
from crosslens.errors import MAX_TEXT, UserError, brief, inside
from tests.given import of_norms

F, S, D = 6, 3, 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    crosscoder = of_norms(torch.rand(F, S) + 0.1)
    crosscoder.cfg.metadata.snapshots = [{"label": f"step{s}", "step": s, "tokens": None} for s in range(S)]
    return crosscoder.save(tmp_path / "crosscoder")


def change(folder: Path, **changes: Any) -> None:
    path = folder / "cfg.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        place, _, inner = key.partition("__")
        if inner:
            config[place][inner] = value
        else:
            config[place] = value
    path.write_text(json.dumps(config))


def change_weights(folder: Path, **changes: Any) -> None:
    change(folder, metadata__checksums=None)  # as in files of other programs
    path = folder / "sae_weights.safetensors"
    weights = {**load_file(path), **changes}
    save_file({name: value for name, value in weights.items() if value is not None}, path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_valid_files_pass(architecture: str, tmp_path: Path) -> None:
    sae_class, config_class = ARCHITECTURES[architecture]
    crosscoder = sae_class(
        config_class(d_in=S * D, d_sae=F, n_snapshots=S, **({"k": 2} if architecture[:4] == "topk" else {}))
    )
    config = inspect_crosscoder(crosscoder.save(tmp_path))
    shapes = expected_shapes(tmp_path / "cfg.json", config)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in crosscoder.state_dict().items()}
    assert {name: shape for name, (_, shape) in read_header(tmp_path / "sae_weights.safetensors").items()} == shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "quantum_crosscoder"}, "'quantum_crosscoder'; known are batchtopk_crosscoder"),
        ({"architecture": ["standard_crosscoder"]}, "has an unknown architecture"),
        ({"architecture": None}, "has an unknown architecture"),
        ({"architecture": "jumprelu"}, "is a JumpReLUSAE, not a crosscoder"),
        ({"d_sae": "6"}, "d_sae='6' is not an integer"),
        ({"d_sae": True}, "d_sae=True is not an integer"),
        ({"d_sae": 6.0}, "d_sae=6.0 is not an integer"),
        ({"d_sae": -1}, "d_sae=-1 is not an integer"),
        ({"d_sae": 10**15}, "d_sae=1000000000000000 is not an integer from 1 to 2,147,483,647"),
        ({"d_sae": 2**31 - 1, "d_in": 3 * 2**29}, "is larger than any file"),
        ({"d_sae": 1_000_000}, r"W_dec has shape \(6, 12\), the config says \(1000000, 12\)"),
        ({"n_snapshots": 5}, "d_in=12 is not a multiple of n_snapshots=5|does not list the 5 snapshots"),
        ({"n_snapshots": 4}, "does not list the 4 snapshots"),
        ({"k": -1}, "k=-1 is not a number from 1 to d_sae=6"),
        ({"k": 7}, "k=7 is not a number from 1 to d_sae=6"),
        ({"k": "four"}, "k='four' is not a number from 1 to"),
        ({"gate": "odd"}, "has an unknown entry 'gate'; it was written by another program or a newer version"),
        ({"dtype": "float8"}, "dtype='float8' is not one of float16"),
        ({"dtype": 7}, "dtype=7 is not one of"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm' is not available"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input='no' is not of type bool"),
        ({"apply_b_dec_to_input": "x" * 5000}, r"apply_b_dec_to_input='xxx.*[.]{3} is not of type bool"),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input=1 is not of type bool"),
        ({"reshape_activations": 5}, "reshape_activations=5 is not of type Literal.'none', 'hook_z'.; download"),
        ({"device": ["cpu"]}, r"device=\['cpu'\] is not of type str"),
        ({"metadata": []}, "metadata is a list"),
        ({"metadata__snapshots": [1, 2, 3]}, "1 in metadata.snapshots is not a snapshot"),
        ({"metadata__snapshots": [{"label": 1}] * 3}, "is not a snapshot: give a label"),
        ({"metadata__snapshots": [{"label": "a", "step": "1"}] * 3}, "is not a snapshot: give a label"),
        ({"metadata__snapshots": {"label": "a"}}, "does not list the 3 snapshots"),
        ({"metadata__snapshots": [{"label": "a", "fingerprint": 5}] * 3}, "is not a snapshot: give a label"),
        ({"metadata__hook_name": 5}, "metadata.hook_name=5 is not of type str . None; download"),
        ({"metadata__prepend_bos": "no"}, "metadata.prepend_bos='no' is not of type bool"),
        ({"metadata__context_size": 32.5}, "metadata.context_size=32.5 is not of type int"),
        ({"metadata__config": [7]}, r"metadata.config=\[7\] is not of type list"),
        ({"metadata__activation_scale": [1.0, 0.0, 1.0]}, "is not a list of 3 positive numbers"),
        ({"metadata__activation_scale": [1.0]}, "is not a list of 3 positive numbers"),
        ({"metadata__to_dict": 1}, "metadata has a key 'to_dict', which is reserved"),
        ({"metadata____class__": 1}, "metadata has a key '__class__', which is reserved"),
        ({"metadata__sae_lens_version": "5.1"}, "sae_lens_version='5.1' is not a release from 6 on"),
        ({"metadata__sae_lens_version": 6}, "sae_lens_version=6 is not a release"),
    ],
)
def test_wrong_configs(folder: Path, changes: dict[str, Any], message: str) -> None:
    change(folder, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_without_checksums_too(folder: Path, value: float) -> None:
    change(folder, metadata__checksums=None)
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_dec"][0, 0] = value
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(UserError, match="W_dec has values that are not finite; train or download it again"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_threshold_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    crosscoder = BatchTopKCrosscoder(BatchTopKCrosscoderConfig(d_in=12, d_sae=6, n_snapshots=3))
    crosscoder.threshold.fill_(value)
    change(crosscoder.save(tmp_path / "crosscoder"), metadata__checksums=None)
    with pytest.raises(UserError, match="threshold has values that are not finite; train or download it again"):
        load(tmp_path / "crosscoder")


@pytest.mark.skipif(os.name != "posix", reason="there is no umask")
def test_files_have_the_permissions_of_the_users_umask(folder: Path, tmp_path: Path) -> None:
    crosscoder = load(folder)
    for umask in (0o022, 0o077, 0o002):
        before = os.umask(umask)
        try:
            crosscoder.save(tmp_path / f"{umask}")
        finally:
            os.umask(before)
        for path in (tmp_path / f"{umask}").iterdir():
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


def test_long_messages_of_other_libraries_are_cut() -> None:
    """Outside the tests, where types are not checked, SAELens's own message contains the value at any length."""
    assert (
        brief(UserError("apply_b_dec_to_input=" + "x" * 5000 + "\nand more")) == f"apply_b_dec_to_input={'x' * 216}..."
    )
    assert brief(UserError("short\nlong")) == "short"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_enc": None}, "b_enc is missing"),
        ({"b_enc": torch.zeros(F + 1)}, r"b_enc has shape \(7,\), the config says \(6,\)"),
        ({"b_enc": torch.zeros(F, 1)}, r"b_enc has shape \(6, 1\)"),
        ({"b_enc": torch.zeros(F, dtype=torch.int64)}, "b_enc has dtype I64, allowed are F16"),
        ({"more": torch.zeros(1)}, "'more' is not a tensor of this architecture"),
        ({"activation_scale": torch.tensor([1.0, 0.0, 1.0])}, "activation_scale of snapshot 1 is 0.0"),
        ({"activation_scale": torch.tensor([1.0, 1.0, torch.nan])}, "activation_scale of snapshot 2 is nan"),
    ],
)
def test_wrong_weights(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_weights(folder, **changes)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_claimed_sizes_allocate_no_memory(folder: Path) -> None:
    """Headers and configs that claim terabytes are refused before anything is allocated."""
    weights = folder / "sae_weights.safetensors"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = {"W_enc": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    header = json.dumps(huge).encode()
    weights.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)
    weights.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(UserError, match=f"its header is longer than {MAX_HEADER:,} bytes"):
        load(folder)
    change(folder, d_sae=2**30, d_in=3 * 2**8)
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)
    config = folder / "cfg.json"
    config.write_text('{"d_sae": ' + "9" * 100_000 + "}")
    with pytest.raises(UserError, match="is not valid JSON"):
        load(folder)
    config.write_text("[" * 200_000)
    with pytest.raises(UserError, match="is not valid JSON"):
        load(folder)
    with config.open("wb") as file:
        file.truncate(MAX_TEXT + 1)
    with pytest.raises(UserError, match=f"the limit is {MAX_TEXT:,}"):
        load(folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000  # kilobytes


def test_saelens_refuses_the_same_weights(folder: Path) -> None:
    """SAELens's own loader, which does not validate first, raises an error too."""
    change(folder, d_sae=1_000_000)
    with pytest.raises(RuntimeError, match="size mismatch"):
        SAE.load_from_disk(folder)


def test_paths_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    assert inside(tmp_path / "root", "a", "id") == tmp_path / "root" / "a"
    for name in ("..", "a/../..", "/etc", "link", "a\\b", "C:a", "a\0", "", ".", "a//b", "\x1b[2J"):
        with pytest.raises(UserError, match="is not below its folder"):
            inside(tmp_path / "root", name, "id")


# ---------------------------------------------------------------------- checksums


def flip(path: Path, at: int, bit: int = 6) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_in_any_tensor_is_refused(folder: Path) -> None:
    weights = folder / "sae_weights.safetensors"
    length = 8 + struct.unpack("<Q", weights.read_bytes()[:8])[0]
    whole = weights.read_bytes()
    for name, entry in json.loads(whole[8:length]).items():
        if name == "__metadata__":
            continue
        flip(weights, length + entry["data_offsets"][0], 0)
        with pytest.raises(UserError, match=f"is damaged, .* the checksum of {name} is not that in cfg.json; restore"):
            load(folder)
        weights.write_bytes(whole)
    assert load(folder).cfg.d_sae == F


def test_swapped_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    other = of_norms(torch.rand(F, S) + 0.1).save(tmp_path / "other")
    (other / "sae_weights.safetensors").replace(folder / "sae_weights.safetensors")
    with pytest.raises(UserError, match="belongs to another crosscoder"):
        load(folder)


def test_a_changed_config_is_refused_unless_it_was_meant(folder: Path, tmp_path: Path) -> None:
    change(folder, metadata__hook_name="blocks.0.hook_resid_post")
    with pytest.raises(UserError, match="cfg.json is damaged, or was changed after it was saved"):
        load(folder)
    saved = load(folder, verify=False).save(tmp_path / "meant")
    assert load(saved).cfg.metadata.hook_name == "blocks.0.hook_resid_post"


@pytest.mark.parametrize("entry", ["no object", {}, {"W_dec": "0"}, None])
def test_checksums_of_another_form_are_refused(folder: Path, entry: Any) -> None:
    change(folder, metadata__checksums=entry)
    if entry is None:  # as in files of other programs
        load(folder)
    else:
        with pytest.raises(UserError, match="cfg.json is damaged"):
            load(folder)


def test_a_flipped_bit_anywhere_in_the_config_is_refused_or_harmless(folder: Path) -> None:
    """Also in the word "metadata", without which a config of another program has no checksums."""
    config, expected = folder / "cfg.json", load(folder)
    whole = config.read_bytes()
    for at in range(len(whole)):
        flip(config, at, 0)
        try:
            found = load(folder)
        except UserError:
            pass
        else:
            assert found.cfg.snapshot_labels == expected.cfg.snapshot_labels, whole[at - 10 : at + 10]
            assert torch.equal(found.W_dec, expected.W_dec)
        config.write_bytes(whole)


@pytest.mark.parametrize("release", ["6s_4.1", "x", "\u00b2", 6, "5.9"])
def test_a_release_that_is_none_is_refused(folder: Path, release: Any) -> None:
    change(folder, metadata__checksums=None, metadata__sae_lens_version=release)
    with pytest.raises(UserError, match="is not a release from 6 on"):
        load(folder)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_crosscoder_that_was_changed_is_saved_with_its_own_checksums(
    folder: Path, tmp_path: Path, dtype: str
) -> None:
    crosscoder = load(folder, dtype=dtype)
    with torch.no_grad():
        crosscoder.W_dec.mul_(2)
    again = load(crosscoder.save(tmp_path / "changed"))
    assert torch.equal(again.W_dec, crosscoder.W_dec) and again.dtype == crosscoder.dtype
    theirs = SAE.load_from_disk(tmp_path / "changed")  # SAELens needs to know nothing of this
    assert torch.equal(theirs.W_dec, crosscoder.W_dec)
    theirs.save_model(tmp_path / "theirs")
    assert torch.equal(load(tmp_path / "theirs").W_dec, crosscoder.W_dec)

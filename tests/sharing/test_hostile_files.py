"""Mutated files either load as something that works, or are refused by a `UserError` of one line.

`CROSSLENS_FUZZ=2000 pytest tests/sharing/test_hostile_files.py` tries that many of each kind; the default is 40.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoTokenizer

from crosslens.activations.tokens import Dataset, token_sequences
from crosslens.crosscoders import load
from crosslens.crosscoders.inspection import read_header
from crosslens.errors import UserError
from crosslens.sharing.importers import import_crosscoder
from crosslens.sharing.registry import read_registry
from crosslens.tasks.task import Task
from tests.given import of_norms

COUNT = int(os.environ.get("CROSSLENS_FUZZ", "40"))
KILOBYTES = 400_000
fuzz = settings(
    max_examples=COUNT,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
HOSTILE: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**63, 10**30, 1.5, 1e308, float("inf"), float("nan")),
    *("", "x" * 5000, "../../etc/passwd", "/etc/passwd", "\0", "\x1b[31m", "<script>", "step0", "batchtopk_crosscoder"),
    *([], [[]], {}, {"": {}}, [1] * 1000),
]
SNIPPETS = [
    *(b"", b"\0", b"\xff\xfe", b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"\t", b"- ", b"&a ", b"*a", b"<<: "),
    *(b"!!python/object:os.system", b"!!binary ", b"99999999999999999999", b"-1", b"1e999", b"NaN", b"null", b"true"),
    *(b"../", b"\\u0000"),
]


@st.composite
def edits(draw: Any) -> Callable[[bytes], bytes]:
    """A few edits of bytes: flips, cuts, insertions, repetitions, truncation."""
    kinds = st.sampled_from(["flip", "cut", "insert", "repeat", "truncate", "number"])
    steps = draw(st.lists(st.tuples(kinds, st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))

    def apply(data: bytes) -> bytes:
        for kind, where, what in steps:
            at = int(where * len(data))
            if kind == "flip" and data:
                at = min(at, len(data) - 1)
                data = data[:at] + bytes([data[at] ^ (what or 1)]) + data[at + 1 :]
            elif kind == "cut":
                data = data[:at] + data[at + what :]
            elif kind == "insert":
                data = data[:at] + SNIPPETS[what % len(SNIPPETS)] + data[at:]
            elif kind == "repeat":
                data = data[:at] + data[at : at + what] * 3 + data[at + what :]
            elif kind == "truncate":
                data = data[:at]
            else:
                data = data[:at] + (b"%d" % (10 ** (what % 25))) + data[at:]
        return data

    return apply


@st.composite
def value_edits(draw: Any) -> Callable[[Any], Any]:
    """Replace values in a nested structure by hostile ones, or delete keys."""
    steps = draw(
        st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from([*HOSTILE, "DELETE"])), min_size=1, max_size=3)
    )

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            yield (*path, key)
            yield from places(value[key], (*path, key))

    def apply(value: Any) -> Any:
        value = json.loads(json.dumps(value))
        for where, what in steps:
            if not (found := list(places(value))):
                break
            *path, last = found[where % len(found)]
            inner = value
            for key in path:
                inner = inner[key]
            if isinstance(what, str) and what == "DELETE":
                del inner[last]
            else:
                inner[last] = copy.deepcopy(what)
        return value

    return apply


@contextlib.contextmanager
def refused_or_fine() -> Iterator[None]:
    """No error but a `UserError` of one line."""
    try:
        yield
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, str(error)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES


@pytest.fixture(scope="module")
def whole() -> Iterator[Path]:
    """A crosscoder that is whole; tests put back what they change."""
    with tempfile.TemporaryDirectory() as folder:
        crosscoder = of_norms(torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) + 0.1, jumprelu=True)
        crosscoder.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
        crosscoder.cfg.metadata.snapshots = [{"label": f"s{i}", "step": i, "tokens": None} for i in range(3)]
        yield crosscoder.save(Path(folder) / "crosscoder")


@contextlib.contextmanager
def replaced(path: Path, data: bytes) -> Iterator[None]:
    kept = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(kept)


def check_crosscoder(folder: Path) -> None:
    with refused_or_fine():
        crosscoder = load(folder)
        x = torch.ones(2, crosscoder.n_snapshots, crosscoder.d_model).to(crosscoder.dtype)
        assert crosscoder.decode(crosscoder.encode(x)).shape == x.shape
        assert len(crosscoder.cfg.snapshot_labels) == crosscoder.n_snapshots
        json.dumps(crosscoder.cfg.to_dict())


# ---------------------------------------------------------------------- targets


@fuzz
@given(edit=edits())
def test_cfg_json_by_bytes(whole: Path, edit: Callable[[bytes], bytes]) -> None:
    with replaced(whole / "cfg.json", edit((whole / "cfg.json").read_bytes())):
        check_crosscoder(whole)


@fuzz
@given(edit=value_edits())
def test_cfg_json_by_values(whole: Path, edit: Callable[[Any], Any]) -> None:
    config = json.loads((whole / "cfg.json").read_text())
    with replaced(whole / "cfg.json", json.dumps(edit(config)).encode()):
        check_crosscoder(whole)


@fuzz
@given(edit=edits(), only_header=st.booleans())
def test_safetensors(whole: Path, edit: Callable[[bytes], bytes], only_header: bool) -> None:
    path = whole / "sae_weights.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    made = edit(data[:end]) + data[end:] if only_header else edit(data)
    with replaced(path, made):
        with refused_or_fine():
            read_header(path)
        check_crosscoder(whole)


@fuzz
@given(edit=value_edits())
def test_safetensors_headers_by_values(whole: Path, edit: Callable[[Any], Any]) -> None:
    path = whole / "sae_weights.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(edit(json.loads(data[8:end]))).encode()
    with replaced(path, len(header).to_bytes(8, "little") + header + data[end:]):
        check_crosscoder(whole)


REGISTRY = {
    "mine": {
        "model": "tiny",
        "repo_id": "someone/things",
        "revision": "v1",
        "licence": "MIT",
        "snapshots": {"repo_id": "a/b", "revisions": ["step0", "step1"], "steps": [0, 1]},
        "saes": [{"id": "a", "path": "x/a", "l0": 3.5, "variance_explained": 0.9, "config": {"d_sae": 6}}],
    },
    "near": {"model": "m", "folder": "here", "saes": [{"id": "b", "path": "b"}], "snapshots": {"folder": "there"}},
}


@fuzz
@given(edit=edits())
def test_registry_by_bytes(tmp_path: Path, edit: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(edit(yaml.safe_dump(REGISTRY).encode()))
    with refused_or_fine():
        read_registry(path)


@fuzz
@given(edit=value_edits())
def test_registry_by_values(tmp_path: Path, edit: Callable[[Any], Any]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(edit(REGISTRY)))
    with refused_or_fine():
        for release in read_registry(path).values():
            assert release.folder is None or release.folder.resolve().is_relative_to(tmp_path.resolve())
            assert all(".." not in entry.path.split("/") for entry in release.entries.values())


@fuzz
@given(edit=edits(), of_config=st.booleans())
def test_imported_files(tmp_path: Path, edit: Callable[[bytes], bytes], of_config: bool) -> None:
    config = {"dict_size": 5, "d_in": 4, "n_models": 2, "estimated_act_norm_list": [1.0, 2.0], "revision_list": "a-b"}
    state = {
        "W_enc": torch.ones(2, 4, 5),
        "W_dec": torch.ones(5, 2, 4),
        "b_enc": torch.ones(5),
        "b_dec": torch.ones(2, 4),
    }
    torch.save(state, tmp_path / "1.pt")
    (tmp_path / "1_cfg.json").write_text(json.dumps(config))
    path = tmp_path / ("1_cfg.json" if of_config else "1.pt")
    path.write_bytes(edit(path.read_bytes()))
    with refused_or_fine():
        assert import_crosscoder(tmp_path / "1", "crosscoding_through_time").cfg.d_sae > 0


MOSS = {
    "sae_type": "crosscoder",
    "hook_points": ["step0", "step1"],
    "d_model": 4,
    "expansion_factor": 1.5,
    "act_fn": "relu",
    "norm_activation": "dataset-wise",
}


@fuzz
@given(edit=value_edits())
def test_imported_configs_by_values(tmp_path: Path, edit: Callable[[Any], Any]) -> None:
    norms = {f"dataset_average_activation_norm.step{i}": torch.tensor(1.0 + i) for i in range(2)}
    state = {"W_E": torch.ones(2, 4, 6), "b_E": torch.ones(2, 6), "W_D": torch.ones(2, 6, 4), "b_D": torch.ones(2, 4)}
    save_file({**state, **norms}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(edit(MOSS)))
    with refused_or_fine():
        assert import_crosscoder(tmp_path, "openmoss").cfg.d_sae > 0


ITEMS = [
    {"clean_prefix": f"The cat {i}", "clean_answer": " sees", "patch_answer": " see", "patch_prefix": f"The cats {i}"}
    for i in range(3)
]


@fuzz
@given(edit=edits(), suffix=st.sampled_from([".json", ".jsonl", ".csv", ".tsv"]))
def test_task_files(tmp_path: Path, edit: Callable[[bytes], bytes], suffix: str) -> None:
    if suffix.startswith(".json"):
        text = "\n".join(json.dumps(item) for item in ITEMS)
    else:
        mark = "," if suffix == ".csv" else "\t"
        text = "\n".join(mark.join(row) for row in [list(ITEMS[0]), *(list(item.values()) for item in ITEMS)])
    path = tmp_path / f"task{suffix}"
    path.write_bytes(edit(text.encode()))
    with refused_or_fine():
        task = Task.sva(path)
        assert all(isinstance(item.prefix, str) and item.correct for item in task.items)


@fuzz
@given(edit=edits(), suffix=st.sampled_from([".txt", ".jsonl", ".csv", ".parquet"]))
def test_token_files(tmp_path: Path, tiny_snapshots: Path, edit: Callable[[bytes], bytes], suffix: str) -> None:
    import pandas as pd

    tokenizer = AutoTokenizer.from_pretrained(tiny_snapshots / "tokenizer")
    path = tmp_path / f"text{suffix}"
    rows = pd.DataFrame({"text": ["the cat sees a fish near the house ."] * 6})
    if suffix == ".parquet":
        rows.to_parquet(path)
    elif suffix == ".csv":
        rows.to_csv(path, index=False)
    elif suffix == ".jsonl":
        rows.to_json(path, orient="records", lines=True)
    else:
        path.write_text("\n".join(rows["text"]))
    path.write_bytes(edit(path.read_bytes()))
    with refused_or_fine():
        tokens = token_sequences(Dataset(path, context_size=4), tokenizer)
        assert int(tokens.min()) >= 0 and int(tokens.max()) < len(tokenizer)


@fuzz
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4),
    dtype=st.sampled_from(["int32", "int64", "uint8", "float32", "bool", "uint16"]),
)
def test_token_arrays(tiny_snapshots: Path, shape: list[int], dtype: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_snapshots / "tokenizer")
    with refused_or_fine():
        tokens = token_sequences(Dataset(np.ones(shape, dtype=dtype), context_size=4), tokenizer)
        assert tokens.ndim == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prefix,correct,wrong\na,b,c\na,b,c,d", "line 3 has more fields than the header"),
        ("prefix,correct,wrong\na,b," + "c" * 200_000, "field larger than field limit"),
    ],
)
def test_invalid_tables(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "task.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        Task.local(tmp_path / "task.csv")

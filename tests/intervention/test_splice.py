"""Splices against plain transformers with hand-written hooks and loops over features, on both backends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from crosslens import crosscoders
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.intervention.splice import CleanRun, Edit, Splice, clean_run, replace_at, spliced_logits
from crosslens.snapshots.collection import Snapshots
from tests.plain_model import F, draw_crosscoder

HOOK, LAYER = "blocks.1.hook_resid_post", 1
TEXTS = ["the cat near the house", "a child finds the fish"]


def make_crosscoder(architecture: str, S: int, D: int, hook_name: str = HOOK, seed: int = 0) -> Crosscoder:
    sae = draw_crosscoder(architecture, S, D, seed)
    sae.cfg.metadata.hook_name, sae.cfg.metadata.prepend_bos = hook_name, True
    return sae


@pytest.fixture(scope="module")
def tokens(snaps: Snapshots) -> Tensor:
    return torch.tensor([[0, *snaps.tokenizer(text)["input_ids"]] for text in TEXTS])


@pytest.fixture(scope="module")
def runs(snaps: Snapshots, tokens: Tensor) -> dict[str, tuple[Crosscoder, CleanRun]]:
    found: dict[str, tuple[Crosscoder, CleanRun]] = {}
    for architecture in crosscoders.ARCHITECTURES:
        cc = make_crosscoder(architecture, len(snaps), snaps.d_model).to_inference()
        found[architecture] = cc, CleanRun.of(cc, snaps, tokens)
    return found


def plain(folder: str, tokens: Tensor, new: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits of transformers, with the output of a block replaced after the BOS; and that output as it was."""
    model = GPTNeoXForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    seen: list[Tensor] = []

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden.clone())
        if new is None:
            return None
        changed = torch.cat([hidden[:, :1], new[:, 1:]], 1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    model.gpt_neox.layers[LAYER].register_forward_hook(hook)
    with torch.no_grad():
        return model(tokens).logits, seen[0]


class At(NamedTuple):
    b: int
    t: int
    i: int
    f: float


def by_hand(cc: Crosscoder, acts: Tensor, s: int, change: Any, error: bool) -> Tensor:
    """The block output at snapshot s, feature by feature in float64; `change` gives the edited feature."""
    D, c = cc.d_model, cc.activation_scale.double()
    W, b_dec = cc.W_dec.double()[:, s * D : (s + 1) * D], cc.b_dec.double()[s * D : (s + 1) * D]
    shared = cc.encode(acts)
    norms = W.norm(dim=-1)
    B, T = acts.shape[:2]
    out = torch.zeros(B, T, D, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            decoded, edited = b_dec.clone(), b_dec.clone()
            for i in range(F):
                f = float(shared[b, t, i])
                if "jumprelu" in cc.cfg.architecture() and f * norms[i] <= cc.threshold[i].double():  # type: ignore
                    f = 0.0
                decoded += f * W[i]
                edited += change(At(b, t, i, f)) * W[i]
            error_node = acts[b, t, s].double() - decoded / c[s]
            out[b, t] = edited / c[s] + (error_node if error else 0)
    return out.float()


MEAN = torch.linspace(-1, 1, F)


def edits_and_changes(run: CleanRun, other: Tensor) -> dict[str, tuple[list[Any], Any]]:
    """By name: edits, and the same as a function."""
    mask = torch.zeros_like(run.keep)
    mask[0, 2] = mask[1, 4] = True
    return {
        "nothing": ([], lambda at: at.f),
        "zero": ([Edit([1, 5, 7])], lambda at: 0 if at.i in (1, 5, 7) else at.f),
        "zero all": ([Edit(None)], lambda _: 0),
        "mean": ([Edit([2, 3], value=MEAN)], lambda at: float(MEAN[at.i]) if at.i in (2, 3) else at.f),
        "patch": ([Edit([0, 4], value=other)], lambda at: float(other[at[:3]]) if at.i in (0, 4) else at.f),
        "scale": ([Edit(torch.arange(9), factor=0.05)], lambda at: 0.05 * at.f if at.i < 9 else at.f),
        "steer": ([Edit([6], value=2.5, factor=1.0)], lambda at: at.f + 2.5 * (at.i == 6)),
        "the last two": ([Edit(None, positions=[-1, 4])], lambda at: 0 if at.t in (4, 5) else at.f),
        "a mask": ([Edit([1, 2], 1.5, positions=mask)], lambda at: 1.5 if at.i in (1, 2) and mask[at[:2]] else at.f),
        "two": ([Edit([1], value=2.0), lambda f: 3 * f], lambda at: 6.0 if at.i == 1 else 3 * at.f),
    }


@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize("architecture", crosscoders.ARCHITECTURES)
def test_splices_equal_plain_transformers_with_hand_made_activations(
    snaps: Snapshots, runs: Any, tokens: Tensor, architecture: str, error: bool
) -> None:
    cc, run = runs[architecture]
    acts = torch.stack([plain(s.name, tokens)[1] for s in snaps], 2)
    torch.testing.assert_close(run.acts, acts, atol=1e-5, rtol=0)
    assert run.keep.tolist() == [[False] + [True] * (tokens.shape[1] - 1)] * len(TEXTS)
    assert (run.features[:, 0] == 0).all() and 0.1 < (run.features[:, 1:] != 0).float().mean() < 0.9
    other = torch.rand(*run.features.shape, generator=torch.Generator().manual_seed(1))
    s = 2
    model = snaps.model(s)
    distinct: set[float] = set()
    for name, (edits, change) in edits_and_changes(run, other).items():
        expected, _ = plain(snaps[s].name, tokens, by_hand(cc, acts, s, change, error))
        splice = Splice(cc, run, s, edits, error=error)
        torch.testing.assert_close(splice.logits(model), expected, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        distinct.add(round(float(expected.abs().sum()), 3))
    assert len(distinct) == len(edits_and_changes(run, other))


def test_gates_are_those_of_the_clean_run(snaps: Snapshots, runs: Any) -> None:
    """A feature scaled below its threshold is still decoded: the gate is not recomputed."""
    cc, run = runs["jumprelu_crosscoder"]
    for s in range(len(snaps)):
        splice = Splice(cc, run, s, [Edit(None, factor=1e-3)], error=False)
        f = run.snapshot_acts(cc, s)
        assert torch.equal(splice.features, 1e-3 * f) and splice.features.count_nonzero() == f.count_nonzero() > 0
        assert not cc.snapshot_acts(splice.features, s).any()  # a new gate would close on all of them
        torch.testing.assert_close(splice.replacement, cc.decode_snapshot(1e-3 * f, s))
    open_at = torch.stack([run.snapshot_acts(cc, s) != 0 for s in range(len(snaps))])
    assert (open_at.any(0) != open_at.all(0)).any()  # and gates do differ between snapshots


def test_patching_uses_the_gates_of_the_other_run(snaps: Snapshots, runs: Any, tokens: Tensor) -> None:
    cc, run = runs["jumprelu_crosscoder"]
    paired = CleanRun.of(cc, snaps, tokens.flip(0))
    for s in range(len(snaps)):
        splice = Splice(cc, run, s, [Edit([1, 2, 3], value=paired)])
        f = run.snapshot_acts(cc, s).clone()
        f[..., 1:4] = cc.snapshot_acts(paired.features, s)[..., 1:4]
        assert torch.equal(splice.features, f)
    everything = Splice(cc, run, 0, [Edit(None, value=paired)], error=False)
    torch.testing.assert_close(everything.replacement, cc.decode_snapshot(paired.snapshot_acts(cc, 0), 0))


@pytest.mark.parametrize("architecture", crosscoders.ARCHITECTURES)
def test_without_edits_a_splice_is_the_clean_model(
    snaps: Snapshots, runs: Any, tokens: Tensor, architecture: str
) -> None:
    cc, run = runs[architecture]
    for s in range(len(snaps)):
        model = snaps.model(s)
        clean = model(tokens)
        splice = Splice(cc, run, s)
        torch.testing.assert_close(splice.logits(model), clean, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=splice.fwd_hooks), clean, atol=1e-5, rtol=0)
        changed = Splice(cc, run, s, [Edit(None)])
        with changed.on(model):
            inside = model(tokens)
        assert torch.equal(inside, changed.logits(model)) and (inside - clean).abs().max() > 0.1
        assert torch.equal(model(tokens), clean)
        assert torch.equal(inside[:, 0], clean[:, 0])  # the BOS is left out
        with Splice(cc, run, s - len(snaps), [Edit(None)]).on(model):  # snapshots are counted from the right too
            assert torch.equal(model(tokens), inside)


@pytest.mark.parametrize("architecture", crosscoders.ARCHITECTURES)
def test_hooked_transformers_are_spliced_too(architecture: str) -> None:
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=12, d_head=8, n_heads=2, d_mlp=32, d_vocab=20, act_fn="gelu", seed=0
    )
    models = [HookedTransformer(config) for _ in range(2)]
    tokens = torch.arange(10).view(2, 5)
    hook = "blocks.1.hook_resid_pre"  # read, and spliced, as the output of block 0
    acts = torch.stack([m.run_with_cache(tokens)[1]["blocks.0.hook_resid_post"] for m in models], 2)
    cc = make_crosscoder(architecture, 2, 16, hook).to_inference()
    run = clean_run(cc, tokens, acts, tokens > 0)
    for s, model in enumerate(models):
        clean = model(tokens)
        with Splice(cc, run, s).on(model):
            torch.testing.assert_close(model(tokens), clean, atol=1e-5, rtol=0)
        splice = Splice(cc, run, s, [Edit([0, 1, 2], factor=3.0)], error=False)

        def put(x: Tensor, hook: Any, new: Tensor = splice.replacement) -> Tensor:  # noqa: ARG001
            return torch.where((tokens > 0)[..., None], new, x)

        expected = model.run_with_hooks(tokens, fwd_hooks=[(hook, put)])
        assert splice.hook_name == "blocks.0.hook_resid_post"
        with splice.on(model):
            assert torch.equal(model(tokens), expected) and (expected - clean).abs().max() > 0.01
        assert torch.equal(model(tokens), clean)


def test_a_training_crosscoder_gates_like_its_inference_version(snaps: Snapshots, tokens: Tensor) -> None:
    training = make_crosscoder("batchtopk_crosscoder", len(snaps), snaps.d_model)
    both = [CleanRun.of(cc, snaps, tokens).features for cc in (training, training.to_inference())]
    assert torch.equal(*both)


def test_special_tokens_are_spliced_if_training_kept_them(snaps: Snapshots, tokens: Tensor) -> None:
    cc = make_crosscoder("standard_crosscoder", len(snaps), snaps.d_model).to_inference()
    cc.cfg.metadata.keep_special = True
    run = CleanRun.of(cc, snaps, tokens)
    assert run.keep.all() and (run.features[:, 0] != 0).any()


def test_splices_carry_gradients(snaps: Snapshots, runs: Any) -> None:
    cc, run = runs["topk_crosscoder"]
    amount = torch.zeros(F, requires_grad=True)
    splice = Splice(cc, run, 1, [lambda f: f + amount])
    splice.logits(snaps.model(1))[:, -1, 3].sum().backward()
    assert amount.grad is not None and (amount.grad != 0).all()


def test_errors_are_one_line(snaps: Snapshots, runs: Any, tokens: Tensor) -> None:
    cc, run = runs["standard_crosscoder"]
    B, T = tokens.shape
    model = snaps.model(0)
    for make, message in (
        (lambda: Splice(cc, run, 3), r"snapshot 3 is not in \[-3, 2\]: there are 3 snapshots"),
        (lambda: Splice(cc, run, -4), r"snapshot -4 is not in \[-3, 2\]"),
        (lambda: Splice(cc, run, 0, [Edit([0, F])]), r"feature 24 is not in \[0, 23\]"),
        (lambda: Splice(cc, run, 0, [Edit([-1])]), r"feature -1 is not in \[0, 23\]"),
        (lambda: Splice(cc, run, 0, [Edit([0], positions=[T])]), rf"position {T} is not in \[-{T}, {T - 1}\]"),
        (lambda: Splice(cc, run, 0, [Edit([0], positions=torch.ones(1, T) > 0)]), "does not fit this batch"),
        (
            lambda: Splice(cc, run, 0, [Edit([0], value=torch.ones(3))]),
            r"values of shape \(3,\): give one number, \(",
        ),
        (lambda: Splice(cc, run, 0, [Edit([0], value=CleanRun.of(cc, snaps, tokens[:1]))]), r"values of shape \(1, 6"),
        (lambda: Splice(cc, run, 0, [lambda f: f[:1]]), rf"shape \(1, 6, 24\): return \({B}, {T}, 24\), the"),
        (
            lambda: model.run_with_hooks(tokens[:1], fwd_hooks=Splice(cc, run, 0).fwd_hooks),
            r"splice has shape \(2, 6, 16\), the model's activation \(1, 6, 16\): run the model on the tokens",
        ),
        (
            lambda: CleanRun.of(cc, snaps, torch.zeros(1, 33).long()),
            "prompts of 33 tokens do not fit .* 1 to 32 tokens",
        ),
        (lambda: CleanRun.of(cc, snaps, torch.zeros(1, 0).long()), "prompts of 0 tokens do not fit"),
        (lambda: CleanRun.of(cc, snaps[[0, 1]], tokens), "trained on 3 snapshots, but 2 were given"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    cc.cfg.metadata.snapshots = [{"label": s.label, "fingerprint": s.fingerprint} for s in snaps]
    with pytest.raises(UserError, match="other weights: its snapshot step0 does not match the given step20"):
        CleanRun.of(cc, snaps[[2, 1, 0]], tokens)
    CleanRun.of(cc, snaps, tokens)


def test_a_splice_that_is_never_reached_is_an_error(snaps: Snapshots, runs: Any, tokens: Tensor) -> None:
    """SAELens's bridge silently ignores hooks with TransformerLens's names."""
    cc, run = runs["topk_crosscoder"]
    splice = Splice(cc, run, 2, [Edit(None)])
    model = SAETransformerBridge.boot_transformers(snaps[2].name, device="cpu")
    message = "SAETransformerBridge never reached hook point blocks.1.hook_resid_post, so nothing was spliced: use a"
    with pytest.raises(UserError, match=message):
        splice.logits(model)
    with pytest.raises(UserError, match=message):
        spliced_logits(model, tokens, HOOK, splice.replacement, run.keep)
    with pytest.raises(UserError, match=message), splice.on(model):
        model(tokens)
    with pytest.raises(UserError, match="never reached hook point"), splice.on(snaps.model(2)):
        pass
    with pytest.raises(KeyError, match="mine"), splice.on(model):
        raise KeyError("mine")


def test_single_replacements(snaps: Snapshots, tokens: Tensor) -> None:
    model = snaps.model(2)
    new = torch.randn(*tokens.shape, 16, generator=torch.Generator().manual_seed(0))
    keep = torch.ones_like(tokens) > 0
    keep[:, 0] = False
    expected, before = plain(snaps[2].name, tokens, new)
    torch.testing.assert_close(spliced_logits(model, tokens, HOOK, new, keep), expected, atol=1e-5, rtol=0)
    assert torch.equal(replace_at(new, keep)(before, None)[:, 1:], new[:, 1:])
    with pytest.raises(UserError, match="run the model on the tokens of the clean run"):
        spliced_logits(model, tokens[:1], HOOK, new[:1], keep[:1])
        replace_at(new[:1], keep[:1])(before, None)


PROGRAM = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from tests.intervention.test_splice import make_crosscoder
from crosslens import crosscoders
from crosslens.intervention.splice import CleanRun, Edit, Splice
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings

snaps = Snapshots.pythia("14m", steps=[0, 512, 143_000])
tokens = torch.randint(1, 16, (3, 7), generator=torch.Generator().manual_seed(0))
tokens[:, 0] = 0
worst = []
for architecture in crosscoders.ARCHITECTURES:
    cc = make_crosscoder(architecture, 3, snaps.d_model).to_inference()
    edited = []
    for backend in ("bridge", "hooked_transformer"):
        run = CleanRun.of(cc, snaps, tokens, ModelSettings(backend=backend))
        for s in range(3):
            model = snaps.model(s, ModelSettings(backend=backend))
            clean = model(tokens)
            with Splice(cc, run, s).on(model):
                worst.append(float((model(tokens) - clean).abs().max()))
            edited.append(Splice(cc, run, s, [Edit(None)]).logits(model))
            assert (edited[-1] - clean).abs().max() > 1e-3
    for one, other in zip(edited[:3], edited[3:]):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
print(max(worst))
"""


@pytest.mark.exhaustive
def test_both_backends_on_hub_revisions(tmp_path: Path, tiny_snapshots: Path) -> None:
    repository = tmp_path / "hub" / "models--EleutherAI--pythia-14m"
    tokenizer = AutoTokenizer.from_pretrained(tiny_snapshots / "tokenizer")
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    (repository / "refs").mkdir(parents=True)
    for seed, step in enumerate((0, 512, 143_000)):
        commit = f"{seed + 1:040d}"
        (repository / "refs" / f"step{step}").write_text(commit)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            GPTNeoXForCausalLM(config).save_pretrained(repository / "snapshots" / commit)
        tokenizer.save_pretrained(repository / "snapshots" / commit)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[2])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split()[-1]) <= 1e-5

"""The slow reference for attribution: plain transformers with hand-written hooks, one prompt and snapshot at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from crosslens import crosscoders
from crosslens.causal.attribution import Attribution, attribute
from crosslens.crosscoders import Crosscoder, CrosscoderTrainingSAE
from crosslens.snapshots.collection import Snapshots
from crosslens.stats import sign_flip_p
from crosslens.tasks.task import Task

F = 24
ITEMS = [
    {"prefix": "the cat", "correct": "sees", "wrong": "likes", "patch_prefix": "the dog"},
    {"prefix": "the king", "correct": "finds", "wrong": "likes", "patch_prefix": "the child"},
    {"prefix": "the cat near the house", "correct": "sees", "wrong": ".", "patch_prefix": "the dog near the bread"},
    {"prefix": "a child sees", "correct": "a", "wrong": "the", "patch_prefix": "a king likes"},
]


def draw_crosscoder(architecture: str, S: int, D: int, seed: int = 0) -> CrosscoderTrainingSAE:
    """A random training crosscoder whose features are active at about half the positions; scales and norms differ."""
    options: dict[str, Any] = {"k": 8} if "topk" in architecture else {}
    sae_class, config_class = crosscoders.TRAINING_ARCHITECTURES[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = sae_class(config_class(d_sae=F, d_in=S * D, n_snapshots=S, decoder_init_norm=1.0, **options))
        with torch.no_grad():
            sae.W_dec.add_(0.5 * torch.randn_like(sae.W_dec)).mul_(torch.rand(F, 1) + 0.2)
            sae.b_dec.normal_(0, 0.5)
            sae.b_enc.normal_(0, 0.5)
            sae.activation_scale.copy_(torch.rand(S) + 0.5)
            if "jumprelu" in architecture:
                sae.log_threshold.normal_(0.0, 0.5)
            if "batchtopk" in architecture:
                sae.threshold.fill_(1.0)
    return sae


def make_crosscoder(snaps: Snapshots, architecture: str, seed: int = 0, layer: int = 1) -> Crosscoder:
    """A random crosscoder of these snapshots, for inference."""
    sae = draw_crosscoder(architecture, len(snaps), snaps.d_model, seed)
    metadata = sae.cfg.metadata
    metadata.hook_name, metadata.prepend_bos = f"blocks.{layer}.hook_resid_post", True
    metadata.snapshots = [{"label": s.label, "step": s.step, "fingerprint": s.fingerprint} for s in snaps]
    return sae.to_inference()


@functools.cache
def plain_model(folder: str) -> Any:
    return GPTNeoXForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().requires_grad_(False)


class Slow:
    """One prompt at every snapshot: one torch hook reads activations, another splices."""

    def __init__(self, snaps: Snapshots, cc: Crosscoder, item: dict[str, str], layer: int = 1) -> None:
        self.cc, self.snaps, self.layer = cc, snaps, layer
        self.models = [plain_model(s.name) for s in snaps]
        vocabulary = snaps.tokenizer.get_vocab()
        self.tokens = torch.tensor([[0, *(vocabulary[w] for w in item["prefix"].split())]])
        self.answers = vocabulary[item["correct"]], vocabulary[item["wrong"]]
        self.acts = torch.stack([self.run(m)[1] for m in self.models], dim=1)  # (T, S, D)
        f = cc.encode(self.acts)
        f[0] = 0  # training leaves out the BOS
        self.f = [cc.snapshot_acts(f, s) for s in range(len(snaps))]
        self.clean = [self.metrics(s, self.acts[None, :, s])[0] for s in range(len(snaps))]

    def run(self, model: Any, replacement: Tensor | None = None, n: int = 1) -> tuple[Tensor, Tensor]:
        """Logits at the last position and the activation at the hook, of n versions of the prompt."""
        seen: list[Tensor] = []

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            seen.append(hidden[0].detach())
            if replacement is None:
                return None
            new = torch.cat([hidden[:, :1], replacement[:, 1:]], dim=1)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = model.gpt_neox.layers[self.layer].register_forward_hook(hook)
        logits = model(self.tokens.repeat(n, 1)).logits[:, -1]
        handle.remove()
        return logits, seen[0]

    def metrics(self, s: int, replacement: Tensor) -> Tensor:
        """Metric of versions (n, T, D) of the activation at the hook."""
        logits, _ = self.run(self.models[s], replacement, len(replacement))
        return logits[:, self.answers[0]] - logits[:, self.answers[1]]

    def metric(self, s: int, replacement: Tensor | None = None) -> Tensor:
        return self.clean[s] if replacement is None else self.metrics(s, replacement[None])[0]

    def decode(self, f: Tensor, s: int) -> Tensor:
        D = self.cc.d_model
        W = self.cc.W_dec[:, s * D : (s + 1) * D]
        return (f @ W + self.cc.b_dec[s * D : (s + 1) * D]) / self.cc.activation_scale[s]

    def error(self, s: int) -> Tensor:
        return self.acts[:, s] - self.decode(self.f[s], s)

    def effects(
        self, s: int, f0: Tensor, e0: Tensor | None, nodes: list[float], weights: list[float]
    ) -> tuple[Tensor, Tensor]:
        """Effects of every feature (T, F) and the error node (T,), from gradients with respect to the features."""
        f, e = self.f[s], self.error(s)
        e0 = e if e0 is None else e0
        gradients = [torch.zeros_like(f), torch.zeros_like(e)]
        for node, weight in zip(nodes, weights, strict=True):
            fa = (f0 + node * (f - f0)).requires_grad_()
            ea = (e0 + node * (e - e0)).requires_grad_()
            found = torch.autograd.grad(self.metric(s, self.decode(fa, s) + ea), (fa, ea))
            gradients = [total + weight * part for total, part in zip(gradients, found, strict=True)]
        return (f - f0) * gradients[0], torch.cat([torch.zeros(1), ((e - e0) * gradients[1]).sum(-1)[1:]])

    def without_each(self, s: int, features: Iterable[int], f0: Tensor) -> Tensor:
        """Metrics with one feature each at its baseline at all positions and the error node kept."""
        versions: list[Tensor] = []
        for feature in features:
            edited = self.f[s].clone()
            edited[:, feature] = f0[:, feature]
            versions.append(self.decode(edited, s) + self.error(s))
        return self.metrics(s, torch.stack(versions))

    def without(self, s: int, feature: int, f0: Tensor) -> Tensor:
        return self.without_each(s, [feature], f0)[0]


def slow_runs(
    snaps: Snapshots, cc: Crosscoder, key: str = "prefix", items: list[dict[str, str]] | None = None, layer: int = 1
) -> list[Slow]:
    return [Slow(snaps, cc, {**item, "prefix": item[key]}, layer) for item in (items or ITEMS)]


def baselines(kind: str, runs: list[Slow], paired: list[Slow], s: int) -> list[tuple[Tensor, Tensor]]:
    """Baselines of the features (T, F) and the error node (T, D) of every prompt."""
    mean = torch.cat([run.f[s][1:] for run in runs]).mean(0)
    out: list[tuple[Tensor, Tensor]] = []
    for run, other in zip(runs, paired, strict=True):
        f0 = {"zero": torch.zeros_like(run.f[s]), "mean": mean.expand_as(run.f[s]), "patch": other.f[s]}[kind]
        f0 = torch.cat([torch.zeros_like(f0[:1]), f0[1:]])
        out.append((f0, other.error(s) if kind == "patch" else torch.zeros_like(run.error(s))))
    return out


def as_if_of(found: Attribution, G: int) -> Attribution:
    """The same effects with a quarter of the errors, as if they were of G groups of one prompt each."""
    error = found.standard_errors / 4
    mean = found.effects.double()
    p = torch.from_numpy(sign_flip_p(mean.numpy(), (mean**2 / G + (G - 1) / G * error.double() ** 2).numpy()))
    return dataclasses.replace(found, n_prompts=G, n_groups=G, standard_errors=error, p=p)


def few_effects(crosscoder: Crosscoder, snaps: Snapshots, task: Task) -> Attribution:
    """Effects on the few prompts of the tests, word by word."""
    with pytest.warns(UserWarning, match="the 4 prompts of"):
        return attribute(crosscoder, snaps, task, positions=True)

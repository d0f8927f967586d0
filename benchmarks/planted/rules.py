"""A language in which rules begin at known steps of pretraining, and a small model that learns it.

A *rule* has words of its own. Each is a sentence of eight tokens; which token t follows is decided by a latent class:

1. L: the class of a word u decides the next token.
2. D: the class of u decides t, after two to four other words and the rule's query word.
3. X: the sum of the classes of u and v, modulo their number, decides t (XOR for two), so that no single word says
   anything about t. In a third of its sentences a mark after u and after v names their class, from the first step on:
   without them XOR is not learnt in so short a training. Rules that never hold have no marks.

Until its first step t is drawn at random: nothing in the data then refers to the classes (of L and D), or to their sum
(of X). When the model acquires a rule is measured (`Pretrained.acquired`): the first snapshot from which it prefers the
right token to that of another class in three of four sentences, for two snapshots in a row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from crosslens.evolution.lifecycles import birth_index
from crosslens.tasks.items import Item

NEVER = 10**9
WORDS = 16  # of a class
PER_ROW = 6  # sentences
_FILLERS = 24
_MARKED = 0.35  # of the sentences of an X rule
_FREQUENCY = {"L": 0.6, "D": 1.0, "X": 2.0}
_QUERY = 5  # position of the query word in a sentence


@dataclass(frozen=True)
class Rule:
    """A rule: its kind (L, D or X), number of classes and first step."""

    kind: str
    classes: int
    start: int

    @property
    def timed(self) -> bool:
        """Whether it starts during training."""
        return 0 < self.start < NEVER


def draw_rules(seed: int, n_steps: int) -> list[Rule]:
    """Sixteen rules: eight start during training (a quarter to a half through it), three at once, five never."""
    rng = np.random.default_rng([seed, 1])
    starts = rng.permutation(np.linspace(0.25, 0.5, 8) * n_steps).round().astype(int).tolist()
    kinds = {("L", 2): [True, 0], ("D", 2): [True, True, 0, NEVER], ("D", 4): [True, NEVER],
             ("X", 2): [True, True, True, True, 0, NEVER, NEVER, NEVER]}  # fmt: skip
    return [
        Rule(kind, classes, starts.pop() if start is True else int(start))
        for (kind, classes), planned in kinds.items()
        for start in planned
    ]


@dataclass(frozen=True)
class Sentences:
    """Sentences of eight tokens.

    Attributes:
        ids: (n, 8) token ids.
        rule: (n,) number of the rule.
        latent: (n,) class that decides t; -1 in sentences with marks, which have no t.
        position: (n,) of the token before t.
        word: (n,) number of the word u in its class.
        other: (n, 8) the same sentence with u of another class, the same number; (n,) its class.
        other_latent: (n,).
    """

    ids: np.ndarray
    rule: np.ndarray
    latent: np.ndarray
    position: np.ndarray
    word: np.ndarray
    other: np.ndarray
    other_latent: np.ndarray


class Language:
    """Words, rules and sentences."""

    def __init__(self, rules: list[Rule]) -> None:
        self.rules = rules
        self.words = ["<|endoftext|>", "."]
        self.fillers = self._add("f", _FILLERS)
        self.u = [self._add(f"u{r}_", rule.classes, WORDS) for r, rule in enumerate(rules)]
        self.v = [self._add(f"v{r}_", rule.classes, WORDS) for r, rule in enumerate(rules)]
        self.t = [self._add(f"t{r}_", rule.classes) for r, rule in enumerate(rules)]
        self.marks = [self._add(f"m{r}_", rule.classes) for r, rule in enumerate(rules)]
        self.query = self._add("q", len(rules))
        self.followers = np.stack([np.random.default_rng(1234 + i).permutation(_FILLERS)[:4] for i in range(_FILLERS)])
        frequency = np.array([_FREQUENCY[rule.kind] for rule in rules])
        self.frequency = frequency / frequency.sum()

    def _add(self, name: str, *shape: int) -> np.ndarray:
        ids = np.arange(len(self.words), len(self.words) + int(np.prod(shape))).reshape(shape)
        self.words += [name + "_".join(map(str, place)) for place in np.ndindex(*shape)]
        return ids

    def sentences(self, rng: np.random.Generator, n: int, active: np.ndarray, rule: int | None = None) -> Sentences:
        """Draw sentences.

        Args:
            rng: source of the draws.
            n: number of sentences.
            active: whether each rule holds.
            rule: of this rule only, without marks.
        """
        chosen = rng.choice(len(self.rules), n, p=self.frequency) if rule is None else np.full(n, rule)
        filler = np.empty((n, 8), int)
        filler[:, 0] = rng.integers(_FILLERS, size=n)
        for j in range(1, 8):
            filler[:, j] = self.followers[filler[:, j - 1], rng.integers(4, size=n)]
        ids = self.fillers[filler]
        ids[:, 7] = 1
        other = ids.copy()
        latent, position, word, other_latent = (np.full(n, -1) for _ in range(4))
        for r in np.unique(chosen):
            rows, kind, C = np.flatnonzero(chosen == r), self.rules[r].kind, self.rules[r].classes
            marked = kind == "X" and rule is None and self.rules[r].start < NEVER
            self._fill(rng, r, rows, active[r], marked, ids, other, latent, position, word, other_latent, C, kind)
        return Sentences(ids, chosen, latent, position, word, other, other_latent)

    def _fill(
        self, rng: Any, r: int, rows: Any, active: bool, marked: bool, ids: Any, other: Any, latent: Any,
        position: Any, word: Any, other_latent: Any, C: int, kind: str,
    ) -> None:  # fmt: skip
        """Write the sentences of a rule into their rows."""
        m = len(rows)
        u_class, v_class = rng.integers(C, size=m), rng.integers(C, size=m)
        changed = (u_class + rng.integers(1, C, size=m)) % C
        word[rows] = rng.integers(WORDS, size=m)
        v = self.v[r][v_class, rng.integers(WORDS, size=m)]
        shift = v_class if kind == "X" else 0
        latent[rows], other_latent[rows] = (u_class + shift) % C, (changed + shift) % C
        t = self.t[r][np.where(active, latent[rows], rng.integers(C, size=m))]
        where = rng.integers(0, 5, size=m) if kind == "L" else rng.integers(0, 2, size=m)
        v_where = rng.integers(2, 4, size=m)
        position[rows] = where if kind == "L" else _QUERY
        for sentences, which in ((ids, u_class), (other, changed)):
            sentences[rows, where] = self.u[r][which, word[rows]]
            if kind == "L":
                sentences[rows, where + 1] = t
                continue
            sentences[rows, _QUERY], sentences[rows, _QUERY + 1] = self.query[r], t
            if kind == "X":
                sentences[rows, v_where] = v
        if marked:
            some = rng.random(m) < _MARKED
            at = rows[some]
            ids[at, 5:7] = self.fillers[rng.integers(_FILLERS, size=(len(at), 2))]
            ids[at, :5] = np.stack(
                [ids[at, where[some]], self.marks[r][u_class[some]], self.fillers[rng.integers(_FILLERS, size=len(at))],
                 v[some], self.marks[r][v_class[some]]], 1,
            )  # fmt: skip
            latent[at] = -1

    def rows(self, rng: np.random.Generator, n: int, active: np.ndarray) -> np.ndarray:
        """Rows of a beginning-of-sequence token and six sentences (n, 49)."""
        ids = self.sentences(rng, n * PER_ROW, active).ids.reshape(n, -1)
        return np.concatenate([np.zeros((n, 1), int), ids], 1)

    def items(self, rule: int, n: int, seed: int) -> list[Item]:
        """Paired prompts of a rule, which differ in the class of u; the group is the number of the word."""
        drawn = self.sentences(np.random.default_rng([seed, rule, 2]), n, np.ones(len(self.rules), bool), rule)
        found = dict[tuple[str, str], Item]()
        for i in range(n):
            end = int(drawn.position[i]) + 1
            prefix, patch = (" ".join(self.words[w] for w in ids[i, :end]) for ids in (drawn.ids, drawn.other))
            answers = (" " + self.words[self.t[rule][z[i]]] for z in (drawn.latent, drawn.other_latent))
            found[prefix, patch] = Item(prefix, *answers, patch, group=f"word {drawn.word[i]}")
        return list(found.values())

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per word."""
        vocabulary = {word: i for i, word in enumerate(self.words)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        end = "<|endoftext|>"
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end, unk_token="."
        )


@dataclass(frozen=True)
class Pretraining:
    """How the model is trained."""

    seed: int
    n_steps: int = 4000
    every: int = 200
    n_layers: int = 5
    d_model: int = 64
    batch_size: int = 32
    lr: float = 3e-3


class Pretrained:
    """A folder of snapshots with the truth about its rules; trained if it is not there."""

    def __init__(self, folder: Path, config: Pretraining) -> None:
        self.folder, self.config = folder, config
        self.rules = draw_rules(config.seed, config.n_steps)
        self.language = Language(self.rules)
        if not (folder / "truth.json").exists():
            self._train()
        self.steps: list[int] = list(range(config.every, config.n_steps + 1, config.every))
        truth = json.loads((folder / "truth.json").read_text())
        self.accuracy = np.array([truth[str(step)] for step in self.steps]).T  # (rules, S)

    @cached_property
    def acquired(self) -> np.ndarray:
        """Index of the snapshot from which each rule is known; S if never."""
        return birth_index(self.accuracy >= 0.75, 2)

    @property
    def first(self) -> np.ndarray:
        """Index of the first snapshot that was trained on each rule; S if none was."""
        return np.searchsorted(self.steps, [rule.start for rule in self.rules], side="right")

    @property
    def in_force(self) -> np.ndarray:
        """Which rules hold at the end."""
        return np.array([rule.start < NEVER for rule in self.rules])

    def _train(self) -> None:
        config, language = self.config, self.language
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=len(language.words), hidden_size=config.d_model, num_hidden_layers=config.n_layers,
                num_attention_heads=4, intermediate_size=4 * config.d_model, max_position_embeddings=8 * PER_ROW + 1,
                bos_token_id=0, eos_token_id=0, pad_token_id=0,
            )
        ).train()  # fmt: skip
        optimiser = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        rng, tokenizer = np.random.default_rng([config.seed, 3]), language.tokenizer()
        starts = np.array([rule.start for rule in self.rules])
        truth: dict[int, list[float]] = {}
        snapshots: list[dict[str, Any]] = []
        for step in tqdm(range(config.n_steps + 1), desc="pretraining", mininterval=10):
            if step and step % config.every == 0:
                truth[step] = self._accuracy(model)
                name = f"step{step}"
                model.save_pretrained(self.folder / name)
                tokenizer.save_pretrained(self.folder / name)
                tokens = step * config.batch_size * (8 * PER_ROW + 1)
                snapshots.append({"label": name, "path": name, "step": step, "tokens": tokens})
            for group in optimiser.param_groups:
                group["lr"] = config.lr * min(1, (step + 1) / 50)
            rows = torch.tensor(language.rows(rng, config.batch_size, step >= starts))
            logits = model(rows, use_cache=False).logits[:, :-1]
            optimiser.zero_grad()
            cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        (self.folder / "snapshots.json").write_text(json.dumps({"name": "rules", "snapshots": snapshots}))
        (self.folder / "truth.json").write_text(json.dumps(truth))

    @torch.no_grad()
    def _accuracy(self, model: GPTNeoXForCausalLM) -> list[float]:
        """How often the right token is preferred to that of another class, by rule, as if it held."""
        model.eval()
        found: list[float] = []
        for r in range(len(self.rules)):
            drawn = self.language.sentences(np.random.default_rng([7, r]), 256, np.ones(len(self.rules), bool), r)
            n = torch.arange(256)
            ids = torch.tensor(np.concatenate([np.zeros((256, 1), int), drawn.ids], 1))
            logits = model(ids).logits[n, torch.tensor(drawn.position) + 1]
            right, wrong = (logits[n, torch.tensor(self.language.t[r][z])] for z in (drawn.latent, drawn.other_latent))
            found.append(float((right > wrong).float().mean()))
        model.train()
        return found

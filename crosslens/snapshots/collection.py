"""`Snapshots`: the snapshots of one pretraining run, in the order of training, or other models of one width.

They come from local folders, from revisions on the Hugging Face hub, from memory, or from the demo. `check` refuses
snapshots that cannot be compared: equal weights, different tokenizers, widths or depths. `model` loads one and keeps it
if memory allows. `to_dict` and `from_dict` record and restore the collection.
"""

from __future__ import annotations

import gc
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import pandas as pd
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from crosslens.distributed.devices import model_memory
from crosslens.errors import UserError, visible
from crosslens.printing import as_html
from crosslens.progress import tqdm
from crosslens.snapshots import families
from crosslens.snapshots.checks import (
    check_architectures,
    check_arrival,
    check_configs,
    check_distinct,
    check_dtypes,
    check_models,
    check_tokenizers,
)
from crosslens.snapshots.folders import list_model, make_snapshot, parse_place, read_places, read_run
from crosslens.snapshots.hashes import cache_folder, config_entries, tokenizer_digest
from crosslens.snapshots.hooks import canonical_hook, check_hook, hook_layer, hook_width
from crosslens.snapshots.lookup import find_snapshot
from crosslens.snapshots.memory import LoadedSnapshot, loaded_snapshots
from crosslens.snapshots.settings import ModelSettings
from crosslens.snapshots.snapshot import LanguageModel, Snapshot

if TYPE_CHECKING:
    import crosslens.synthetic.pretraining

__all__ = ["Snapshot", "Snapshots", "canonical_hook", "hook_layer"]

_FORMAT = 1


class Snapshots(Sequence[Snapshot]):
    """Snapshots of one pretraining run, in the order of training.

    An index or a label, such as `snaps[-1]` or `snaps["step1000"]`, gives a `Snapshot`; a slice or a list of them gives
    `Snapshots`.

    `of` and `from_models` take other models too, such as a base model and its fine-tuned version.

    Args:
        snapshots: one or more, with different labels.
        name: name of the model, for titles and records.
        demo: arguments of `demo`, if it made the snapshots; recorded by `to_dict`.
        one_run: whether all come from one run, so that their configurations must be equal. Otherwise they may differ in
            all but width, vocabulary and hook point.

    Raises:
        UserError: no snapshots, or two with the same label.
    """

    def __init__(
        self,
        snapshots: Sequence[Snapshot],
        name: str,
        demo: Mapping[str, Any] | None = None,
        *,
        one_run: bool = True,
    ) -> None:
        self._snapshots = tuple(snapshots)
        self._one_run = one_run
        self.name = name
        self._demo = demo
        self._models: dict[tuple[int, str, str, str, str, int | None], LanguageModel] = {}
        if not self._snapshots:
            raise UserError(f"{name} without snapshots: give one or more")
        labels = self.labels
        if len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise UserError(f"two snapshots have the label {twice!r}: give each its own label")

    @classmethod
    def local(cls, folder: str | Path, *, trust_remote_code: bool = False) -> Snapshots:
        """Snapshots in the sub-folders of `folder`, each in the layout of transformers.

        The sub-folders are `step0`, `step1000`, ..., or any names that `snapshots.json` lists in order:
        `{"snapshots": [{"label": "start", "path": "a", "step": 0, "tokens": 0}, ...]}` (step and tokens may be absent).
        The tokenizer is in each of them, in `tokenizer`, or in the folder itself.

        Args:
            folder: the folder.
            trust_remote_code: as in `trusting_code`.

        Raises:
            UserError: no such folder, nothing in it, a folder without a model, or no tokenizer.
        """
        name, snapshots = read_run(Path(folder).expanduser().resolve())
        return cls(snapshots, name).trusting_code(trust_remote_code)

    @classmethod
    def from_hub(
        cls,
        repo: str,
        revisions: Sequence[str],
        *,
        steps: Sequence[int | None] | None = None,
        tokens: Sequence[int | None] | None = None,
        labels: Sequence[str] | None = None,
        trust_remote_code: bool = False,
    ) -> Snapshots:
        """Revisions of a repository on the hub; nothing is downloaded yet.

        Args:
            repo: such as `EleutherAI/pythia-14m`.
            revisions: branches, tags or commits, in the order of training.
            steps: optimiser steps of each, if known.
            tokens: tokens seen by each, if known.
            labels: names of the snapshots; the revisions by default.
            trust_remote_code: as in `trusting_code`.

        Raises:
            UserError: lists of different lengths, or the repository's name is that of a local folder.
        """
        if isinstance(revisions, str):
            raise UserError(f"revisions={revisions!r} is one string: give a list, such as [{revisions!r}]")
        for key, values in (("steps", steps), ("tokens", tokens), ("labels", labels)):
            if values is not None and len(values) != len(revisions):
                raise UserError(f"{len(values)} {key} for {len(revisions)} revisions: give one for each")
        unknown: list[None] = [None] * len(revisions)
        rows = zip(labels or revisions, steps or unknown, tokens or unknown, revisions, strict=True)
        found = [Snapshot(label, step, seen, repo, revision) for label, step, seen, revision in rows]
        return cls(found, repo.rsplit("/", 1)[-1]).trusting_code(trust_remote_code)

    @classmethod
    def pythia(cls, size: str, steps: str | Sequence[int | str] = "paper") -> Snapshots:
        """Pythia's snapshots, such as `Snapshots.pythia("160m", steps=[0, 512, 143_000])`.

        Args:
            size: 14m, 31m, 70m, 160m, 410m, 1b, 1.4b, 2.8b, 6.9b or 12b, also with `-deduped`.
            steps: steps of the 154 that exist; "paper" for the 32 of Ge et al. (arXiv 2509.17196), "triplet" for the
                three of Bayazit et al. (arXiv 2509.05291), "log:12" or "linear:12" for evenly spaced ones, "all".

        Raises:
            UserError: a size or step that does not exist.
        """
        return cls.from_model(families.find_model("pythia", size), steps)

    @classmethod
    def olmo(
        cls, size: str, steps: str | Sequence[int | str] = "log:8", *, revisions: Sequence[str] | None = None
    ) -> Snapshots:
        """OLMo's snapshots (1b, 1b-0724, 7b, 7b-0724), such as `Snapshots.olmo("1b-0724", steps="log:12")`.

        Args:
            size: one of those above.
            steps: steps that the hub lists; "log:8" or "linear:8" for evenly spaced ones, "all"; for 1b-0724 "triplet",
                the three of Bayazit et al. (arXiv 2509.05291).
            revisions: instead of steps, such as `["step1000-tokens2B"]`; they need no connection to the hub.

        Raises:
            UserError: a size, step or revision that does not exist, or steps without a connection to the hub.
        """
        return cls.from_model(families.find_model("olmo", size), steps if revisions is None else revisions)

    @classmethod
    def olmo2(
        cls, size: str, steps: str | Sequence[int | str] = "log:8", *, revisions: Sequence[str] | None = None
    ) -> Snapshots:
        """OLMo 2's snapshots (1b, 7b, 13b) of stage 1; `steps="stage2-ingredient1"` gives a run of stage 2.

        Arguments and errors as in `olmo`, except that no size has a "triplet".
        """
        return cls.from_model(families.find_model("olmo2", size), steps if revisions is None else revisions)

    @classmethod
    def bloom(
        cls, size: str, steps: str | Sequence[int | str] = "all", *, revisions: Sequence[str] | None = None
    ) -> Snapshots:
        """BLOOM's snapshots (560m, 1b1, 1b7, 3b, 7b1), with the tokenizer of the final model's repository.

        Arguments and errors as in `olmo`, except that only 1b1 has a "triplet".
        """
        return cls.from_model(families.find_model("bloom", size), steps if revisions is None else revisions)

    @classmethod
    def from_model(cls, model: families.Model, steps: str | Sequence[int | str] = "all") -> Snapshots:
        """Snapshots of a model of a known family, or of any series of places.

        Args:
            model: from `families.find_model` or `families.pattern_model`.
            steps: steps or revisions, or a set: "all", "paper", "log:12", "linear:12", ...

        Raises:
            UserError: a step or set that does not exist; the message names the nearest.
        """
        rows = model.revisions(steps, lambda: list_model(model))
        found = [
            make_snapshot(
                row.label,
                row.step if model.counts_steps else None,
                row.tokens,
                parse_place(model.where.format(row.revision)),
                model.tokenizer,
            )
            for row in rows
        ]
        return cls(found, model.name if model.tokenizer is None else model.repository.rsplit("/", 1)[-1])

    @classmethod
    def series(cls, name: str, steps: str | Sequence[int | str] = "all") -> Snapshots:
        """Snapshots of a model in the table of families, or of a series of places.

        Args:
            name: such as `olmo3-7b` (`crosslens ls` lists them); or a place, as in `of`, with `{step}` anywhere in it:
                `org/model@step{step}`, `org/model/checkpoints/step{step}`, `org/model-step-{step}`,
                `org/model+runs/lora/checkpoint-{step}`. What there is comes from the hub's own list, or the disk.
            steps: as in `from_model`.

        Raises:
            UserError: no such model or step; the message names the nearest.
        """
        model = families.pattern_model(name) if "{" in name else families.match_model(name)
        if model is None:
            raise UserError(
                f"{name!r} is neither a model of {', '.join(families.read_table())}, such as pythia-160m, nor a place "
                "with {step} in it, such as org/model@step{step}"
            )
        return cls.from_model(model, steps)

    @classmethod
    def of(cls, models: Mapping[str, str | Path], *, trust_remote_code: bool = False) -> Snapshots:
        """Any models of one width and tokenizer, such as a base model and its chat version, or two seeds of one run.

        Nothing is downloaded yet. Depth and configuration may differ, as long as every model has the hook point.

        Args:
            models: a place for each label, in the order that figures and tables will have: a folder in the layout of
                transformers, or `owner/name`, `owner/name@revision`, `owner/name/folder@revision` on the hub; and with
                an adapter that is merged into it `model+adapter`, where both are such places. A folder's tokenizer is
                in it, or beside it (in the folder above, or in `tokenizer` there). Labels such as step128 give steps.
            trust_remote_code: as in `trusting_code`.

        Raises:
            UserError: no models, a folder without a model or tokenizer, a revision of a folder, or a name that no
                repository can have.
        """
        snapshots = read_places(models)
        if unlike := families.find_unlike([snapshot.name for snapshot in snapshots]):
            warnings.warn(unlike, stacklevel=2)
        names = dict.fromkeys(Path(snapshot.name).name for snapshot in snapshots)
        return cls(snapshots, ", ".join(names), one_run=False).trusting_code(trust_remote_code)

    @classmethod
    def from_models(
        cls,
        models: Sequence[Any] | Mapping[str, Any],
        labels: Sequence[str] | None = None,
        steps: Sequence[int | None] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Snapshots:
        """Models in memory, or functions that load one: then a single model is in memory at a time.

        The models are not changed, nor copied unless `ModelSettings` asks for another device or dtype; they must not
        change either. A run directory cannot record them: for the command line save them, and use `of` or `local`.

        Args:
            models: TransformerBridges, HookedTransformers, causal language models of transformers, or functions without
                arguments that return one; a list of them, or a dictionary by label. All have one width and the hook
                point.
            labels: names of the models in a list, one for each.
            steps: optimiser steps of each, if they are snapshots of one run. None reads them from labels such as
                step128, if all are such.
            tokenizer: the tokenizer of all; by default that of the bridges or HookedTransformers.

        Raises:
            UserError: labels or steps that are missing or of another number, something that is neither a model nor a
                function, one model twice, different widths or tokenizers, or no tokenizer. What a function returns is
                checked when it is first needed.
        """
        if isinstance(models, Mapping):
            if labels is not None:
                raise UserError(f"labels={labels!r} are given beside a dictionary, whose keys are the labels")
            labels, models = [str(label) for label in models], list(models.values())
        snapshots = loaded_snapshots(models, labels, steps, tokenizer)
        made = cls(snapshots, ", ".join(labels or ()), one_run=False)
        if not any(snapshot.is_function for snapshot in snapshots):
            made.check(weights=False)
        return made

    @classmethod
    def demo(
        cls,
        seed: int = 0,
        folder: str | Path | None = None,
        *,
        config: crosslens.synthetic.pretraining.PretrainingConfig | None = None,
    ) -> Snapshots:
        """The demo's snapshots: a tiny model that is pretrained on first use, in about a minute, and cached.

        Args:
            seed: seed for initial weights and data.
            folder: where to keep it; by default the user's cache ($CROSSLENS_CACHE, else $XDG_CACHE_HOME/crosslens,
                else ~/.cache/crosslens), where a damaged or outdated model is replaced.
            config: a recipe other than the default.

        Raises:
            UserError: `folder` contains something else.
        """
        # a slow import that only the demo needs
        from crosslens.synthetic.pretraining import pretrain_demo

        variant = "" if config is None else "-" + hashlib.sha256(repr(config).encode()).hexdigest()[:12]
        target = Path(folder) if folder is not None else cache_folder() / f"demo-seed{seed}{variant}"
        snapshots = cls.local(pretrain_demo(target, seed, config=config, overwrite=folder is None))
        again = {"seed": seed, "folder": None if folder is None else str(target.resolve())}
        return cls(snapshots, snapshots.name, again if config is None else None)

    @classmethod
    def from_dict(cls, recipe: Mapping[str, Any]) -> Snapshots:
        """The snapshots that `to_dict` recorded; those of the demo are pretrained again if they are gone.

        Raises:
            UserError: `recipe` is not from `to_dict`.
        """
        try:
            if recipe["format"] != _FORMAT:
                raise ValueError(f"format {recipe['format']!r}, where this release reads {_FORMAT}")
            rows, demo, name = [Snapshot(**row) for row in recipe["snapshots"]], recipe.get("demo"), recipe["name"]
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"not a record of snapshots ({error}): give what Snapshots.to_dict returned") from error
        if demo is None:
            return cls(rows, name, one_run=recipe.get("one_run", True))
        found = cls.demo(**demo)[[row.label for row in rows]]
        return found.trusting_code(any(row.trust_remote_code for row in rows))

    def to_dict(self) -> dict[str, Any]:
        """A record for `from_dict`, in types of JSON.

        Raises:
            UserError: the models are in memory.
        """
        if any(isinstance(s, LoadedSnapshot) for s in self):
            raise UserError(
                "models in memory cannot be recorded: save each with save_pretrained, its tokenizer too, and use "
                "Snapshots.of or Snapshots.local"
            )
        rows = [asdict(s) for s in self]
        for row in rows:
            for key in ("trust_remote_code", "adapter"):
                if not row[key]:
                    del row[key]  # the rule, and unknown to earlier versions
        recipe: dict[str, Any] = {"format": _FORMAT, "name": self.name, "snapshots": rows}
        if not self._one_run:
            recipe["one_run"] = False
        return recipe if self._demo is None else {**recipe, "demo": dict(self._demo)}

    def trusting_code(self, trust_remote_code: bool = True) -> Snapshots:
        """The same snapshots, with or without leave to run the Python code that a repository or folder brings.

        Models and tokenizers that transformers does not know bring their own code, which can do whatever you can.
        Without this, a model that needs it is refused. It is recorded in runs and caches.

        Args:
            trust_remote_code: run such code, if there is any.
        """
        if all(s.trust_remote_code == trust_remote_code for s in self):
            return self
        changed = [replace(s, trust_remote_code=trust_remote_code) for s in self]
        return Snapshots(changed, self.name, self._demo, one_run=self._one_run)

    @property
    def trust_remote_code(self) -> bool:
        """Whether any of them may run code that it brings."""
        return any(s.trust_remote_code for s in self)

    def __len__(self) -> int:
        return len(self._snapshots)

    @overload
    def __getitem__(self, index: SupportsIndex | str) -> Snapshot: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int | str]) -> Snapshots: ...
    def __getitem__(self, index: SupportsIndex | str | slice | Sequence[int | str]) -> Snapshot | Snapshots:
        if isinstance(index, (SupportsIndex, str)):
            return self._snapshots[self._place(index)]
        places = range(len(self))[index] if isinstance(index, slice) else map(self._place, index)
        return Snapshots([self._snapshots[place] for place in places], self.name, self._demo, one_run=self._one_run)

    def _place(self, index: SupportsIndex | str) -> int:
        return find_snapshot(self.labels, index, self.steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshots) and (self.name, self._snapshots) == (other.name, other._snapshots)

    def __hash__(self) -> int:
        return hash((self.name, self._snapshots))

    def __repr__(self) -> str:
        labels = self.labels[:1] if len(self) == 1 else [self.labels[0], self.labels[-1]]
        return visible(f"Snapshots({self.name}: {len(self)} snapshot{'s' * (len(self) > 1)}, {' ... '.join(labels)})")

    def _repr_html_(self) -> str:
        rows = [[s.label, s.step, s.tokens, s.place] for s in self]
        table = pd.DataFrame(rows, columns=["label", "step", "tokens seen", "from"], dtype=object)
        return as_html(f"{self.name}: {len(self)} snapshot{'s' * (len(self) > 1)}", table.fillna(""))

    @property
    def labels(self) -> list[str]:
        """Names in tables and plots."""
        return [s.label for s in self._snapshots]

    @property
    def steps(self) -> list[int | None]:
        """Optimiser steps, if known."""
        return [s.step for s in self._snapshots]

    @property
    def tokens(self) -> list[int | None]:
        """Tokens seen in training, if known."""
        return [s.tokens for s in self._snapshots]

    def model(
        self,
        i: SupportsIndex | str,
        settings: ModelSettings | None = None,
        n_blocks: int | None = None,
    ) -> LanguageModel:
        """The i-th snapshot's model, loaded by `Snapshot.load` and cached.

        If the models of all snapshots take at most half of the device's memory, all stay there, otherwise only the
        last; whole models and models of `n_blocks` are counted separately. Drop your reference to a model before you
        ask for the next, or two are in memory.

        Args:
            i: index or label of the snapshot.
            settings: how the model runs.
            n_blocks: load only the first blocks; all when None.

        Raises:
            UserError: no such snapshot, no CUDA, or files of the model that are missing or damaged.
        """
        settings = settings or ModelSettings()
        place = self._place(i)
        ours = (str(torch.device(settings.device)), settings.dtype, settings.backend, settings.attention)
        key = (place, *ours, n_blocks)
        if key not in self._models:
            # another thread may be using the models of other depths
            alike = {other: model for other, model in list(self._models.items()) if other[-1] == n_blocks}
            largest = max((sum(p.nbytes for p in model.parameters()) for model in alike.values()), default=0)
            if largest * max(len(self), len(alike) + 1) > model_memory(settings.device):
                for other in alike:
                    del self._models[other]
                alike.clear()
                gc.collect()  # hooks make reference cycles of a model's parts
            self._models[key] = self[place].load(
                settings.device, settings.dtype, settings.backend, n_blocks, attention=settings.attention
            )
        return self._models[key]

    def release(self) -> None:
        """Drop all models that are kept in memory."""
        self._models.clear()
        gc.collect()

    def check(self, hook_name: str | None = None, *, weights: bool = True) -> None:
        """Refuse snapshots that cannot be compared.

        Args:
            hook_name: a hook point that all must have.
            weights: also compare the weights, which downloads those that are not in the hub's cache.

        Raises:
            UserError: two snapshots differ in configuration (models that are not of one run: in width), vocabulary or
                stored dtype, or have equal weights (both are named); a hook point that does not exist.
        """
        if self._one_run:
            if hook_name is not None:
                check_hook(hook_name, self._config)
            check_configs(self)
        else:
            check_models(self, hook_name)
        check_architectures(self)
        check_tokenizers(self, self.tokenizer, min(int(config.vocab_size) for config in self._configs))
        if weights:
            check_distinct(self.labels, self.fingerprints)
            check_dtypes(self, self._one_run)

    def evict(self, s: int) -> int:
        """Delete the weights of a snapshot that crosslens downloaded, and return the number of bytes freed.

        A model that other snapshots need too, with adapters of their own, stays.

        Args:
            s: index of the snapshot.
        """
        own = self[s]
        shared = any(i != s and (o.name, o.revision) == (own.name, own.revision) for i, o in enumerate(self))
        return sum(part.evict() for part in own.parts()[shared:])

    def check_arrival(self, s: int) -> None:
        """Download the weights of a snapshot, and refuse them if they equal others that were known before.

        Args:
            s: index of the snapshot.

        Raises:
            UserError: equal weights, or snapshots of one run that are stored in different dtypes; both are named.
        """
        check_arrival(self, s, self._one_run)

    @property
    def fingerprints(self) -> list[str]:
        """sha256 of each snapshot's weights."""
        bar = tqdm(self._snapshots, desc="fingerprints", unit="snapshot", leave=False, delay=2)
        return [s.fingerprint for s in bar]

    @property
    def config_entries(self) -> list[dict[str, Any]]:
        """What their configurations say of what they compute: of one for all, or of each if they differ."""
        every = [config_entries(config) for config in self._configs]
        return every[:1] if all(one == every[0] for one in every) else every

    @property
    def tokenizer_digest(self) -> str:
        """What the tokenizer does with text, see `crosslens.snapshots.hashes`."""
        return tokenizer_digest(self.tokenizer)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The first snapshot's; `check` makes sure that the others have the same vocabulary."""
        return self[0].read_tokenizer()

    @property
    def separator(self) -> str | None:
        """What separated documents when the models were pretrained: "bos", "eos" or "none"; None if it is not known."""
        return families.find_separator(self[0].name)

    @cached_property
    def _configs(self) -> list[PretrainedConfig]:
        """The configuration that all have, or that of each model."""
        return [s.config() for s in (self[:1] if self._one_run else self)]

    @property
    def _config(self) -> PretrainedConfig:
        return self._configs[0]

    @property
    def d_model(self) -> int:
        """Width D of the residual stream."""
        return int(self._config.hidden_size)

    def hook_width(self, hook_name: str) -> int:
        """Width D of the activation at a hook point.

        Args:
            hook_name: TransformerLens name.
        """
        return hook_width(hook_name, self._config)

    @property
    def n_layers(self) -> int:
        """Number of blocks; of models of different depth, the least."""
        return min(int(config.num_hidden_layers) for config in self._configs)

    @property
    def n_ctx(self) -> int:
        """Longest context that all have, in tokens; 2048 if a config has none (BLOOM: ALiBi, trained on 2048)."""
        keys = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
        return min(
            next((int(value) for key in keys if (value := getattr(config, key, None))), 2048)
            for config in self._configs
        )

"""Help of the commands with many options: in sections, in each the most important options first."""

from __future__ import annotations

from typing import Any

import typer.core

SECTIONS = {
    "Data": (
        *("snapshots", "steps", "hook", "dataset", "n_tokens", "context_size", "drop_positions"),
        *("column", "sample_by", "split", "cache", "cache_dtype", "evict", "verify"),
    ),
    "Crosscoder": (
        *("d_sae", "k", "architecture", "recipe", "scale", "k_start", "k_anneal", "aux"),
        *("sparsity", "sparsity_warm_up", "l1", "l1_warm_up"),
    ),
    "Training": (
        *("lr", "training_tokens", "batch_size", "dead_tokens", "lr_warm_up", "lr_decay", "seed", "seeds"),
        *("precision", "adam_moments"),
    ),
    "Models and processes": (
        *("device", "backend", "model_dtype", "attention", "trust_remote_code", "processes", "data_parallel"),
    ),
    "Run directory and logging": ("run_dir", "n_checkpoints", "config_file", "wandb_project", "as_json"),
}
"""Parameters of the commands; those that are in no section are listed last."""


class SectionedCommand(typer.core.TyperCommand):
    """A command whose options are listed under the headings of `SECTIONS`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options."""
        left = {param.name: param.get_help_record(ctx) for param in self.get_params(ctx)}
        for title, names in SECTIONS.items():
            found = [left.pop(name) for name in names if name in left]
            if found:
                with formatter.section(title):
                    formatter.write_dl(found)
        with formatter.section("Other"):
            formatter.write_dl([record for record in left.values() if record])

"""Pretrain a small GPT-NeoX on English prose, with snapshots for a study of its training.

    OMP_NUM_THREADS=2 python scripts/pretrain_english.py --text english_prose.txt.gz --out runs/english/seed0

1. Read documents, separated by blank lines; every tenth is held out, whatever the seed.
2. Train a byte-level BPE on the others, and pack them as for a crosscoder: each row begins with `<|endoftext|>`, which
   also separates documents.
3. Train with a plain `transformers.Trainer`; `SaveSnapshots` writes the snapshots, evenly spaced in log(1 + step). At
   each of them the loss on some rows of both parts goes to `pretraining.json`, beside the options.

Repeat the command after an interruption, also after `kill -9`: it goes on from the last checkpoint, and the result is
the same, bit by bit, with the same number of threads. Read the snapshots with `--snapshots runs/english/seed0`.

What was chosen, for four hours of one core (AMD EPYC, 2 cores, November 2026) and 35.7 MB of text:

- The model is Pythia-31m (six layers, d = 256, eight heads) with a vocabulary of 4,096: 6.8 million parameters.
- bfloat16 for products, float32 for weights: 5,000 tokens per second of one core instead of 2,400. Processors without
  AVX-512 BF16 are faster with `--precision fp32`.
- Rows of 128 tokens: with 256, a second has only 56 % as many tokens, and sentences of agreement tasks have about ten.
- 4,096 tokens per step, since larger batches are no faster here. 16,000 steps are 66 million tokens, or seven passes
  over the text, in about 220 minutes of one core; losses and snapshots take a few more.
- AdamW with betas .9 and .95, weight decay .1 and clipping at 1 are Pythia's; the learning rate rises to 2e-3 in 2 % of
  the steps, and falls to 0 by a cosine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from typing_extensions import override

import crosslens as cl
from crosslens.errors import UserError
from crosslens.pipeline.opening import parse_steps
from crosslens.rundir import write_text

END_OF_TEXT = "<|endoftext|>"
RECORD = "pretraining.json"


def read_documents(path: Path) -> list[str]:
    """Documents of a text file, plain or .gz, which blank lines separate."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [document.strip() for document in file.read().split("\n\n") if document.strip()]


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """Documents for training, and every tenth, which is held out."""
    return [each for i, each in enumerate(documents) if i % 10 != 9], documents[9::10]


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE; id 0 is `<|endoftext|>`, for beginnings, ends and padding."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def pack(documents: list[str], tokenizer: PreTrainedTokenizerFast, context_size: int) -> torch.Tensor:
    """Rows (n, context_size) of token ids, as crosscoders read them."""
    dataset = cl.activations.Dataset(documents, context_size=context_size)
    return cl.activations.token_sequences(dataset, tokenizer).long()


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of token ids, as a Trainer reads them."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class RecordLosses(TrainerCallback):
    """Ask for the losses at some steps, and write them to the record."""

    def __init__(self, path: Path, steps: list[int]) -> None:
        self.path, self.steps = path, steps

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for the losses at the step of a snapshot."""
        control.should_evaluate = state.global_step in self.steps

    @override
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write all losses so far: the Trainer's history comes back with a checkpoint."""
        curve: dict[int, dict[str, Any]] = {}
        for entry in state.log_history:
            for part in ("train", "held_out"):
                if f"eval_{part}_loss" in entry:
                    curve.setdefault(entry["step"], {"step": entry["step"]})[part] = entry[f"eval_{part}_loss"]
        write_record(self.path, curve=[*curve.values()])


def write_record(path: Path, **found: Any) -> None:
    """Put entries into the record."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_text(path, json.dumps({**known, **found}, indent=1) + "\n")


def begin_record(path: Path, options: dict[str, Any]) -> None:
    """Write the options, or compare them with those of the training that goes on.

    Raises:
        UserError: the folder holds a training with other options.
    """
    known = json.loads(path.read_text(encoding="utf-8"))["options"] if path.is_file() else options
    if other := [name for name in options if known.get(name) != options[name]]:
        was = ", ".join(f"{name}={known.get(name)}" for name in other)
        raise UserError(f"{path.parent} holds a training with {was}: give the same options, or another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, options=options)


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole: the Trainer writes its state after all else."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
        except (OSError, ValueError):
            continue
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="documents, separated by blank lines; also .gz")
    parser.add_argument("--out", type=Path, required=True, help="folder of the snapshots")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the rows")
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument(
        "--snapshots",
        default="log:40",
        type=parse_steps,
        help="steps of the snapshots, such as log:40, linear:20 or 60,700",
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--context-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32, help="rows per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=float, default=0.02, help="share of the steps")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--eval-rows", type=int, default=400, help="rows of each part whose loss is measured")
    parser.add_argument("--checkpoint-every", type=int, default=250, help="steps; two checkpoints are kept")
    args = parser.parse_args()

    folder: Path = args.out
    checkpoints = folder / "checkpoints"
    options = {name: value for name, value in vars(args).items() if name not in ("text", "out", "checkpoint_every")}
    begin_record(folder / RECORD, {"text": args.text.name, **options})

    training, held_out = split_documents(read_documents(args.text))
    if (folder / "tokenizer").is_dir():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    else:
        tokenizer = train_tokenizer(training, args.vocab_size)
    rows = {part: pack(texts, tokenizer, args.context_size) for part, texts in (("t", training), ("h", held_out))}
    counts = {
        "train": rows["t"].numel(),
        "held_out": rows["h"].numel(),
        "per_step": args.batch_size * args.context_size,
    }
    write_record(folder / RECORD, tokens=counts)

    last = last_checkpoint(checkpoints)
    set_seed(args.seed)
    if last is None:
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=len(tokenizer),
                hidden_size=args.d_model,
                num_hidden_layers=args.layers,
                num_attention_heads=args.heads,
                intermediate_size=4 * args.d_model,
                max_position_embeddings=args.context_size,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    else:  # the Trainer alone would leave the unembedding at random: files have another name for it than the model
        model = GPTNeoXForCausalLM.from_pretrained(last)
    model.set_attn_implementation("eager")  # faster than sdpa at this size
    trainer = Trainer(
        model,
        TrainingArguments(
            str(checkpoints),
            seed=args.seed,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.lr,
            lr_scheduler_type="cosine_warmup_with_min_lr",  # "cosine" begins with 0, and step 1 would be step 0 again
            lr_scheduler_kwargs={"min_lr_rate": 0.0},
            warmup_steps=round(args.warmup * args.steps),
            adam_beta2=0.95,
            weight_decay=0.1,
            bf16=args.precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            eval_on_start=last is None,
            logging_steps=50,
            save_steps=args.checkpoint_every,
            save_total_limit=2,
            disable_tqdm=not os.isatty(2),
            report_to="none",
        ),
        train_dataset=Rows(rows["t"]),
        eval_dataset={"train": Rows(rows["t"][: args.eval_rows]), "held_out": Rows(rows["h"][: args.eval_rows])},
        processing_class=tokenizer,
        callbacks=[
            cl.snapshots.SaveSnapshots(folder, args.snapshots, context_size=args.context_size),
            RecordLosses(folder / RECORD, cl.snapshots.choose_steps(args.snapshots, args.steps)),
        ],
    )
    trainer.train(resume_from_checkpoint=str(last) if last else None)


if __name__ == "__main__":
    main()

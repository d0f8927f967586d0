"""Every family under its true repository names, through both backends, against the hidden states of transformers.

The models are tiny and random, in their own hub cache. The part that reads the cache is this file run as a program,
because the Hugging Face libraries read their environment when they are imported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoXConfig,
    Olmo2Config,
    OlmoConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from crosslens.activations.harvesting import harvest
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
from tests.hub_server import revision_folder, run_program
from tests.snapshots.test_collection import check_offline, write_hub

WORDS = ["<e>", "<u>", *"abcdefghijklmnop"]
TOKENS = torch.randint(2, 18, (5, 12), generator=torch.Generator().manual_seed(0))
D, LAYERS = 16, 3
COMMON = {"vocab_size": 20, "num_attention_heads": 2, "max_position_embeddings": 32, "num_hidden_layers": LAYERS}
LLAMA = {**COMMON, "hidden_size": D, "intermediate_size": 32, "pad_token_id": 0}
BLOOM = {"vocab_size": 20, "n_head": 2, "n_layer": LAYERS, "hidden_size": D}

PYTHIA = ("EleutherAI/pythia-70m-deduped", ["step0", "step512", "step143000"])
OLMO = ("allenai/OLMo-1B-0724-hf", ["step2000-tokens4B", "step16000-tokens33B", "step1454000-tokens3048B"])
OLMO2 = ("allenai/OLMo-2-0425-1B", ["stage1-step1000-tokens3B", "stage2-ingredient1-step1000-tokens3B"])
BLOOMS = ("bigscience/bloom-1b1-intermediate", ["global_step1000", "global_step10000", "main"])


def write_tokenizer(folder: Path) -> None:
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<u>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<e>", eos_token="<e>", unk_token="<u>").save_pretrained(
        folder
    )


def write_family(hub: Path, names: tuple[str, list[str]], config: PretrainedConfig, tokenizer: bool = True) -> None:
    for seed, revision in enumerate(names[1]):
        folder = revision_folder(hub, names[0], revision)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # biases and norms too, to notice a library that swaps them
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(folder)
        if tokenizer:
            write_tokenizer(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("families")
    with torch.random.fork_rng():
        neox = GPTNeoXConfig(**COMMON, hidden_size=D, intermediate_size=32, bos_token_id=0, eos_token_id=0)
        write_family(home / "hub", PYTHIA, neox)
        write_family(home / "hub", OLMO, OlmoConfig(**LLAMA, clip_qkv=0.5))
        write_family(home / "hub", OLMO2, Olmo2Config(**LLAMA))
        write_family(home / "hub", BLOOMS, BloomConfig(**BLOOM), tokenizer=False)
        # the final repository, with the tokenizer and the configuration that HookedTransformer reads
        final = revision_folder(home / "hub", "bigscience/bloom-1b1", "main")
        BloomConfig(**BLOOM, architectures=["BloomForCausalLM"]).save_pretrained(final)
        write_tokenizer(final)
    write_hub(home / "hub")
    return home


@pytest.mark.slow
def test_activations_are_the_hidden_states_of_transformers(home: Path) -> None:
    done = run_program([__file__], home, HF_HUB_OFFLINE="1")
    assert done.stdout.split() == ["pythia", "olmo", "olmo2", "bloom", "offline"], done.stdout + done.stderr


def of_family(family: str) -> Snapshots:
    if family == "pythia":
        return Snapshots.pythia("70m-deduped", [0, 512, 143_000])
    if family == "olmo":
        assert Snapshots.olmo("1b-0724", [2000, 16_000]).labels == [
            "step2000",
            "step16000",
        ]  # from the names in the cache
        assert Snapshots.olmo("1b-0724", "all") == Snapshots.olmo("1b-0724", "triplet")
        return Snapshots.olmo("1b-0724", "triplet")
    if family == "olmo2":
        return Snapshots.olmo2("1b", revisions=OLMO2[1])
    assert Snapshots.bloom("1b1").labels == [f"step{n}" for n in (1000, 10_000, *range(100_000, 600_001, 100_000))]
    return Snapshots.bloom("1b1", revisions=BLOOMS[1])


def check_family(family: str) -> None:
    snaps = of_family(family)
    assert snaps.tokens == sorted(snaps.tokens, key=lambda n: n or 0) and None not in snaps.tokens
    snaps.check("blocks.1.hook_resid_post")
    assert snaps.tokenizer("c a")["input_ids"] == [4, 2]
    assert Snapshots.from_dict(snaps.to_dict()) == snaps
    states: list[Any] = []
    for snapshot in snaps:
        model = AutoModelForCausalLM.from_pretrained(snapshot.folder(), attn_implementation="eager")
        with torch.no_grad():
            states.append(model(TOKENS, output_hidden_states=True).hidden_states)
    every = [ModelSettings("cpu")]
    hooked = ModelSettings("cpu", backend="hooked_transformer")
    if family in ("pythia", "bloom"):
        every.append(hooked)
    else:
        with pytest.raises(UserError, match="use backend='bridge'"):  # its own sizes of OLMo are all larger
            snaps.model(0, hooked)
    for settings in every:
        for hook, layer in (
            ("blocks.0.hook_resid_pre", 0),
            ("blocks.0.hook_resid_post", 1),
            ("blocks.1.hook_resid_post", 2),
        ):
            for cut in (True, False):
                found = harvest(snaps, TOKENS, hook, settings, cut=cut)
                for s, hidden in enumerate(states):
                    torch.testing.assert_close(found[:, :, s], hidden[layer], atol=1e-5, rtol=1e-5)
        assert len(snaps.model(0, settings, 2).blocks) == 2
        # the blocks add up: the last one's output, normalised, is the last hidden state
        last = f"blocks.{LAYERS - 1}.hook_resid_post"
        _, cache = snaps.model(0, settings).run_with_cache(TOKENS)
        assert torch.equal(harvest(snaps, TOKENS, last, settings, only=0, cut=True)[:, :, 0], cache[last])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("pythia", "olmo", "olmo2", "bloom"):
        check_family(name)
        sys.stdout.write(f"{name}\n")
    check_offline(Path.cwd())
    sys.stdout.write("offline\n")

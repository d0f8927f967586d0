"""Shared by all tests: a tiny GPT-NeoX with three snapshots, and the text it was trained on."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import tests.checking  # noqa: F401 -- jaxtyping imports `tests` alone

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crosslens.activations.loader import Activations
    from crosslens.snapshots.collection import Snapshots
    from crosslens.tasks.task import Task
    from tests.pretend_cuda import Pretended, Real

# a warning that is an error, such as of read-only arrays, would come in the first test of a process alone
torch.set_warn_always(True)

ROOT = Path(__file__).parent.parent
# programs that tests start import from `tests`, too
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def pytest_collection_finish() -> None:
    """Nothing that was imported is looked through again by the collections of garbage that the package asks for."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # nanobind reports what is left at exit


BOS = "<|endoftext|>"
SUBJECTS, VERBS, OBJECTS = ("cat", "dog", "king", "child"), ("sees", "likes", "finds"), ("fish", "bread", "house")
WORDS = ("the", "a", "near", ".", *SUBJECTS, *VERBS, *OBJECTS)


def _documents(n: int) -> list[str]:
    draw = random.Random(0)
    documents: list[str] = []
    for _ in range(n):
        sentences = [
            f"the {draw.choice(SUBJECTS)} {draw.choice(VERBS)} a {draw.choice(OBJECTS)} "
            f"near the {draw.choice(OBJECTS)} ."
            for _ in range(draw.randint(1, 4))
        ]
        documents.append(" ".join(sentences))
    return documents


@pytest.fixture(scope="session")
def tiny_text() -> list[str]:
    """400 documents of one to four sentences; every word is in the vocabulary."""
    return _documents(400)


@pytest.fixture(scope="session")
def tiny_snapshots(tmp_path_factory: pytest.TempPathFactory, tiny_text: list[str]) -> Path:
    """Folder with step0, step10, step20 of a GPT-NeoX (3 blocks, d_model 16, context 32), and a word-level tokenizer.

    Step 0 is random, the others are really trained: zeroing the residual stream costs nothing at step 0, and plenty
    at step 20.
    """
    folder = tmp_path_factory.mktemp("tiny") / "tiny-neox"
    vocabulary = {word: i for i, word in enumerate([BOS, "<unk>", *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=BOS, eos_token=BOS, pad_token=BOS, unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    config = GPTNeoXConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    stream = torch.tensor([i for text in tiny_text for i in (0, *(vocabulary[word] for word in text.split()))])
    batches = stream[: 20 * 16 * 16].view(20, 16, 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(config)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
        for step in range(21):
            if step % 10 == 0:
                model.save_pretrained(folder / f"step{step}")
            if step < 20:
                model(batches[step], labels=batches[step]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return folder


@pytest.fixture(scope="module")
def snaps(tiny_snapshots: Path) -> Snapshots:
    """The three snapshots; a module's tests share the models that they load."""
    from crosslens.snapshots.collection import Snapshots

    return Snapshots.local(tiny_snapshots)


@pytest.fixture(scope="module")
def task() -> Task:
    """Four paired prompts that the plain model's slow runs know."""
    from crosslens.tasks.task import Task
    from tests.plain_model import ITEMS

    return Task.from_items("tiny", ITEMS)


@pytest.fixture(scope="module")
def live(tiny_snapshots: Path, tiny_text: list[str]) -> Activations:
    """About 1,000 activations of the middle block for training, and 200 held out, in sequences of 16 tokens."""
    from crosslens.activations.loader import Activations
    from crosslens.activations.tokens import Dataset
    from crosslens.snapshots.collection import Snapshots

    return Activations(
        Snapshots.local(tiny_snapshots), "blocks.1.hook_resid_post", Dataset(tiny_text, 1000, 16, 200))  # fmt: skip


@pytest.fixture(scope="module")
def acts(live: Activations, tmp_path_factory: pytest.TempPathFactory) -> Activations:
    """The same from a cache."""
    return live.cache(tmp_path_factory.mktemp("cache") / "acts", "float32")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For comparisons with forked processes, which have one: in several threads sums differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended | Real]:
    """A device "cuda": everywhere one that is pretended, and with `-m gpu` the real one."""
    from tests.pretend_cuda import PretendCuda, Pretended, Real

    if request.param == "pretended":
        with PretendCuda() as mode:
            yield Pretended(mode)
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    yield Real()

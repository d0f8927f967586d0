"""Conversations, roles and mixed datasets, against slow and obvious implementations and the libraries' own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from crosslens.activations import Activations, harvest
from crosslens.activations.chat import chosen, encode, read_messages
from crosslens.activations.tokens import Dataset, Sequences, read_sequences
from crosslens.config import SourceOptions, read_mix
from crosslens.errors import UserError
from crosslens.pipeline.opening import find_activations
from crosslens.snapshots import ModelSettings, Snapshots
from tests.snapshots.test_collection import write_model

HOOK = "blocks.1.hook_resid_post"
WORDS = ["the", "a", "cat", "dog", "sees", "likes", "house", "red", "é", "naïve", "user", "im_end", "  two", "\nline"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
TRIMMED = CHATML.replace("message['content'] }}", "message['content'] | trim }}")
WITHOUT_ROLES = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }} "
    "{% else %}[INST] {{ message['content'] | trim }} [/INST]{% endif %}{% endfor %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}{{ '\n' }}{% endfor %}"
)
ROLES = ("system", "user", "assistant")


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, whose tokens do not end where words or messages do."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "<|im_start|>"], initial_alphabet=alphabet)
    raw.train_from_iterator([" ".join(WORDS), "user assistant system"] * 20, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>")
    made.chat_template = template  # pyright: ignore[reportAttributeAccessIssue]
    return made


def conversation(seed: int, turns: int = 3) -> list[dict[str, str]]:
    draw = random.Random(seed)

    def content() -> str:
        return (
            draw.choice(["", " ", "\n"]) + " ".join(draw.choices(WORDS, k=draw.randint(1, 6))) + draw.choice(["", " "])
        )

    found = [{"role": "system", "content": content()}] if draw.random() < 0.5 else []
    for _ in range(turns):
        found += [{"role": "user", "content": content()}, {"role": "assistant", "content": content()}]
    return found


def by_hand(messages: list[dict[str, str]], template: str) -> list[tuple[str, str | None]]:
    """The text of a conversation in pieces, each with the role that it is the content of."""
    pieces: list[tuple[str, str | None]] = [("<s>", None)] if template == WITHOUT_ROLES else []
    for message in messages:
        role, content = message["role"], message["content"]
        if template == WITHOUT_ROLES:
            before, behind = (" ", " ") if role == "assistant" else ("[INST] ", " [/INST]")
            content = content if role == "assistant" else content.strip()
        else:
            before, behind = f"<|im_start|>{role}\n", "<|im_end|>\n"
            content = content.strip() if template == TRIMMED else content
        if template == MARKED and role == "assistant":
            content, behind = content + "<|im_end|>", "\n"
        pieces += [(before, None), (content, role), (behind, None)]
    return pieces


@pytest.mark.parametrize("template", [CHATML, TRIMMED, WITHOUT_ROLES, MARKED])
@pytest.mark.parametrize("seed", range(8))
def test_tokens_and_their_roles_are_those_of_the_text_in_pieces(template: str, seed: int) -> None:
    tokenizer, messages = make_tokenizer(template), conversation(seed)
    pieces = by_hand(messages, template)
    text = "".join(piece for piece, _ in pieces)
    of_character = [role for piece, role in pieces for _ in piece]
    expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spoken = [
        next((role for role in of_character[first:last] if role), None) for first, last in expected["offset_mapping"]
    ]
    ids, roles = encode(messages, tokenizer, whose=True)
    assert ids == expected["input_ids"] == encode(messages, tokenizer, whose=False)[0]
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert roles == spoken
    if template == MARKED:
        found: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert [role == "assistant" for role in roles] == [bool(each) for each in found["assistant_masks"]]
    for keep, drop in ((("assistant",), None), (("user", "system"), None), (None, ("system",)), (ROLES, ("user",))):
        wanted = [(keep is None or r in keep) and not (drop and r in drop) for r in roles]
        assert chosen(roles, keep, drop).tolist() == wanted


def test_conversations_in_every_spelling() -> None:
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    columns = {"role": ["user", "assistant"], "content": ["a", "b"]}
    assert read_messages(plain) == read_messages(shared) == read_messages(columns) == plain
    assert read_messages([{**plain[0], "tool_calls": None}, plain[1]]) == plain
    for other in ("text", [1, 2], [], ["a", "b"], torch.arange(3), None, 3):
        assert read_messages(other) is None
    with pytest.raises(UserError, match=r"has the message .*None.*: give every message a role and a content"):
        read_messages([{"role": "assistant", "content": None}])


# ------------------------------------------------------------------------------------------------------- in a pipeline
@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Snapshots:
    root = tmp_path_factory.mktemp("run")
    for step in (0, 10):
        write_model(root / f"step{step}", step, vocab_size=300)
    make_tokenizer(CHATML).save_pretrained(root / "tokenizer")
    return Snapshots.local(root)


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    path.write_text("".join(json.dumps({"id": i, "messages": conversation(i)}) + "\n" for i in range(150)))
    return path


def options(source: Any, **changes: Any) -> Dataset:
    return Dataset(source, **{"n_tokens": 300, "context_size": 16, "held_out_tokens": 60, **changes})


def flat(pairs: list[tuple[list[int], list[str | None]]], T: int) -> tuple[list[list[int]], list[list[str | None]]]:
    """Packing by hand: BOS at the beginning of sequences and between documents."""
    rows: list[list[int]] = []
    roles: list[list[str | None]] = []
    row: list[int] = []
    whose: list[str | None] = []
    for ids, spoken in pairs:
        rest = list(zip(ids, spoken, strict=True))
        row, whose = (row, whose) if not row else ([*row, 0], [*whose, "special"])
        while rest or len(row) >= T:
            if len(row) >= T:
                rows.append(row[:T])
                roles.append(whose[:T])
                row, whose = [], []
                continue
            if not row:
                row, whose = [0], ["special"]
            token, role = rest.pop(0)
            row.append(token)
            whose.append(role)
    return rows, roles


@pytest.mark.parametrize("roles", [{"keep_roles": ["assistant"]}, {"drop_roles": ["system", "user"]}, {}])
def test_sequences_of_conversations_are_those_packed_by_hand(
    snapshots: Snapshots, chat_file: Path, roles: dict[str, Any]
) -> None:
    data = options(str(chat_file), n_tokens=None, **roles)
    pairs = [encode(conversation(i), snapshots.tokenizer, whose=True) for i in range(150)]
    rows, spoken = flat(pairs, 16)
    tokens, found = read_sequences(data, snapshots.tokenizer, 0)
    assert tokens.tolist() == rows[: len(tokens)] and len(tokens) >= len(rows) - 1
    if not roles:
        assert found is None
        return
    keep, drop = roles.get("keep_roles"), roles.get("drop_roles", ())
    wanted = [[r == "special" or ((keep is None or r in keep) and r not in drop) for r in row] for row in spoken]
    by_row: dict[tuple[int, ...], list[bool]] = {}  # of equal rows, what all of them keep
    for row, mask in zip(rows[: len(tokens)], wanted, strict=False):
        by_row[tuple(row)] = [a and b for a, b in zip(by_row.get(tuple(row), mask), mask, strict=True)]
    assert found is not None and found.tolist() == [by_row[tuple(row)] for row in tokens.tolist()]
    assert len(by_row) > 0.9 * len(rows)
    sequences = Sequences(data, snapshots, seed=3)
    for row, kept in zip(sequences.tokens.tolist(), sequences.keep(sequences.tokens).tolist(), strict=True):
        assert kept == [ok and token != 0 for ok, token in zip(by_row[tuple(row)], row, strict=True)]


def test_live_and_cached_activations_are_those_of_the_roles(
    snapshots: Snapshots, chat_file: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "chat.jsonl"
    mine.write_bytes(chat_file.read_bytes())
    data = options(str(mine), keep_roles=("assistant",))
    live = Activations(snapshots, HOOK, data, seed=1)
    kept = live.keep(live.tokens)
    assert 0 < int(kept.sum()) < 0.6 * kept.numel() and live.n_tokens == int(kept[: len(live.train_tokens())].sum())
    expected = harvest(snapshots, live.tokens, HOOK, ModelSettings("cpu"))[kept]
    cached = live.cache(tmp_path / "cache", "float32")
    for acts in (live, cached):
        found = torch.cat([*acts.held_out()])
        torch.testing.assert_close(found, expected[-len(found) :])
        batch = next(acts.batches(acts.n_tokens))
        torch.testing.assert_close(batch.sum(0), expected[: live.n_tokens].sum(0), atol=1e-3, rtol=1e-4)
        assert acts.metadata()["keep_roles"] == ["assistant"] and "drop_roles" not in acts.metadata()
    again = Activations.from_dict(json.loads(json.dumps(cached.to_dict())))
    assert torch.equal(again.keep(again.tokens), kept) and again.is_cached
    # a complete cache has the roles of its tokens
    record = cached.to_dict()
    fresh = Activations(Snapshots.from_dict(record["snapshots"]), HOOK, data, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crosslens.activations.tokens.read_sequences", lambda *_: pytest.fail("the dataset was read"))
        assert torch.equal(fresh.cache(tmp_path / "cache", "float32").keep(fresh.tokens), kept)
    other = Activations(snapshots, HOOK, options(str(mine), keep_roles=("user",)), seed=1)
    with pytest.raises(UserError, match="is a cache for a different request"):
        other.cache(tmp_path / "cache", "float32")


def test_two_sequences_of_equal_tokens_are_kept_alike(snapshots: Snapshots) -> None:
    said = [{"role": role, "content": "cat"} for role in ("user", "assistant")]
    ids, _ = encode(said, snapshots.tokenizer, whose=True)
    ahead = [{"role": role, "content": "cat"} for role in ("assistant", "user")]
    data = options([said, ahead] * 40, context_size=6, n_tokens=None, keep_roles=["assistant"], prepend_bos=False)
    tokens, found = read_sequences(data, snapshots.tokenizer, 0)
    assert found is not None and len(ids) > 6
    masks: dict[tuple[int, ...], set[tuple[bool, ...]]] = {}
    for row, mask in zip(tokens.tolist(), found.tolist(), strict=True):
        masks.setdefault(tuple(row), set()).add(tuple(mask))
    assert all(len(each) == 1 for each in masks.values())


# --------------------------------------------------------------------------------------------------------------- mixes
@pytest.fixture
def files(tmp_path: Path) -> dict[str, float]:
    for name, n in (("a", 60), ("b", 400), ("c", 400)):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {WORDS[i % 5]} {i}" for i in range(n)))
    return {str(tmp_path / "a.txt"): 0.2, str(tmp_path / "b.txt"): 0.5, str(tmp_path / "c.txt"): 0.3}


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_mix_is_in_the_order_of_interleave_datasets(files: dict[str, float], seed: int, snapshots: Snapshots) -> None:
    parts = [datasets.Dataset.from_text(name).to_iterable_dataset() for name in files]
    mixed: Any = datasets.interleave_datasets(parts, probabilities=[*files.values()], seed=seed)
    documents = [row["text"] for row in mixed]
    assert {text[0] for text in documents} == {"a", "b", "c"} and len(documents) > 200
    expected, _ = read_sequences(options(documents, n_tokens=None), snapshots.tokenizer, 0)
    data = options(files, n_tokens=None)
    found, _ = read_sequences(data, snapshots.tokenizer, seed)
    assert torch.equal(found, expected)
    assert torch.equal(found, read_sequences(data, snapshots.tokenizer, seed)[0])
    assert not torch.equal(found[:4], read_sequences(data, snapshots.tokenizer, seed + 1)[0][:4])


def test_a_mix_of_chat_and_text_is_recorded_and_known_again(
    files: dict[str, float], chat_file: Path, snapshots: Snapshots, tmp_path: Path
) -> None:
    mix = {str(chat_file): 0.5, next(iter(files)): 0.5}
    data = options(mix, drop_roles=["system"])
    acts = Activations(snapshots, HOOK, data)
    assert data.name == "chat.jsonl 0.5, a.txt 0.5" == acts.metadata()["dataset_path"]
    cached = acts.cache(tmp_path / "cache", "float32")
    again = Activations.from_dict(json.loads(json.dumps(cached.to_dict())))
    assert torch.equal(again.tokens, acts.tokens) and torch.equal(again.keep(again.tokens), acts.keep(acts.tokens))
    first, second = mix
    for other in ({first: 0.1, second: 0.9}, {second: 0.5, first: 0.5}):
        with pytest.raises(UserError, match="is a cache for a different request"):
            Activations(snapshots, HOOK, options(other, drop_roles=["system"])).cache(tmp_path / "cache", "float32")


def test_the_command_lines_spelling(files: dict[str, float], chat_file: Path, snapshots: Snapshots) -> None:
    a, b, _ = files
    assert read_mix(f"{a}=0.25,{b}=.75") == {a: 0.25, b: 0.75}
    assert read_mix("user/name") is None and read_mix(a) is None and read_mix("user/n=x") is None
    source = SourceOptions(
        snapshots=snapshots, hook=(HOOK,), dataset=f"{chat_file}=0.5,{b}=0.5", n_tokens=300, context_size=16,
        keep_roles=("user", "assistant"),
    )  # fmt: skip
    from crosslens.config import ModelOptions

    acts = find_activations(source, ModelOptions(device="cpu"))()
    assert acts.dataset.source == {str(chat_file): 0.5, b: 0.5} and acts.dataset.keep_roles == ("user", "assistant")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("{a}=0.5,{b}=0.6", r"the weights of the mix .* sum to 1.1, not 1: give .*a.txt=0.4545,.*b.txt=0.5455"),
        ("{a}=0.5,{a}=0.5", "has fewer than two datasets: give the one as it is"),
        ("{a}=1,{b}=0", "gives .*b.txt' the weight 0.0: give hub names or paths, with numbers above 0 that sum to 1"),
        ("{a}=0.5,nothing.txt=0.5", "has nothing.txt, which does not exist: give an existing file"),
        ("{a}=0.5,{b}", "does not exist: give an existing file"),
    ],
)
def test_wrong_mixes_are_refused(dataset: str, message: str, files: dict[str, float]) -> None:
    a, b, _ = files
    with pytest.raises(UserError, match=message) as caught:
        SourceOptions(snapshots="demo", hook=(HOOK,), dataset=dataset.format(a=a, b=b))
    assert "\n" not in str(caught.value)


def test_mistakes_are_found_before_models_run(
    chat_file: Path, snapshots: Snapshots, files: dict[str, float], tmp_path: Path
) -> None:
    said = (
        "no conversation .* of chat.jsonl has the role 'asistant', they have assistant, system, user; did you mean 'as"
    )
    with pytest.raises(UserError, match=f"keep_roles: {said}"):
        _ = Activations(snapshots, HOOK, options(str(chat_file), keep_roles=["asistant"])).tokens
    with pytest.raises(UserError, match="drop_roles: no conversation .* has the role 'user', they have none"):
        _ = Activations(snapshots, HOOK, options(next(iter(files)), drop_roles=["user"])).tokens
    with pytest.raises(UserError, match="keep_roles='user' must be a list of roles"):
        options(str(chat_file), keep_roles="user")
    with pytest.raises(UserError, match="the weights of the mix .* sum to 0.7, not 1"):
        options({"a": 0.2, "b": 0.5})
    for step in (0, 10):
        write_model(tmp_path / f"step{step}", step, vocab_size=300)
    make_tokenizer(None).save_pretrained(tmp_path / "tokenizer")
    without = Snapshots.local(tmp_path)
    for changes in ({}, {"keep_roles": ["user"]}):
        with pytest.raises(UserError, match="the models' tokenizer has no chat template, which conversations need"):
            _ = Activations(without, HOOK, options(str(chat_file), **changes)).tokens
    raising = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="the conversation .* is refused by the tokenizer's chat template: roles must"):
        read_sequences(options([conversation(0)]), raising, 0)
    with pytest.raises(UserError, match="document 0 of list of documents of 1 has the message"):
        read_sequences(options([[{"role": "user"}]]), raising, 0)

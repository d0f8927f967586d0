"""The demo's language: words have one role, number does not leak, and minimal pairs are minimal."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import pytest

from crosslens.errors import UserError
from crosslens.synthetic import grammar
from crosslens.synthetic.grammar import CONSTRUCTIONS, LANGUAGES, documents, fronted_pairs, pairs, vocabulary

CELLS = list(itertools.product(CONSTRUCTIONS, LANGUAGES))

# written by hand, without the module's tables
NUMBER = {
    "the king": "sg", "the kings": "pl", "my child": "sg", "my children": "pl", "our box": "sg", "our boxes": "pl",
    "le roi": "sg", "les rois": "pl", "la reine": "sg", "les reines": "pl", "mon cheval": "sg", "mes chevaux": "pl",
    "ma mère": "sg", "mes mères": "pl", "notre mur": "sg", "nos murs": "pl", "votre tasse": "sg", "vos tasses": "pl",
}  # fmt: skip


def _noun_phrase_numbers(words: list[str]) -> list[str]:
    """Numbers of the noun phrases in a prefix, in order, by their nouns."""
    number = {
        form: which
        for lexicon in grammar._LEXICONS.values()
        for noun in lexicon.nouns()
        for form, which in zip(noun.forms, ("sg", "pl"), strict=True)
    }
    return [number[word] for word in words if word in number]


def test_vocabulary_has_no_clash_between_roles_or_languages():
    words = vocabulary()
    assert len(words) == len(set(words)) and 500 <= len(words) <= 700
    assert words[0] == "." and all(" " not in word and word == word.lower() for word in words)
    roles: dict[str, set[str]] = defaultdict(set)
    for language, lexicon in grammar._LEXICONS.items():
        for noun in lexicon.nouns():
            for which, form in enumerate(noun.forms):
                roles[form].add(f"{language} noun {noun.forms} {which}")
        for kind, choice in lexicon.verbs.items():
            for verb in choice.options:
                for which, form in enumerate(verb):
                    roles[form].add(f"{language} {kind} verb {verb} {which}")
        for adjective in lexicon.adjectives.options:
            for form in adjective:
                roles[form].add(f"{language} adjective {adjective}")
        for word in (*lexicon.prepositions.options, *lexicon.adverbs.options):
            roles[word].add(f"{language} particle {word}")
        for determiner in (*lexicon.determiners.options, *lexicon.quantifiers.options):
            for form in itertools.chain(*determiner.values()):
                roles[form].add(f"{language} determiner")
        roles[lexicon.that_subject].add(f"{language} that")
        roles[lexicon.that_object].add(f"{language} that")
    assert {word: role for word, role in roles.items() if len(role) > 1} == {}
    assert set(words) == {".", *roles}


def test_french_nouns_need_no_elision():
    vowels = tuple("aeiouhéèêâîôûy")
    assert [n.forms[0] for n in grammar._FRENCH.nouns() if n.forms[0].startswith(vowels)] == []


@pytest.fixture(scope="module")
def some() -> list[str]:
    return list(documents(1500, seed=0))


def test_documents_are_deterministic_and_made_of_the_vocabulary(some: list[str]):
    assert len(some) == 1500
    assert some[:40] == list(documents(40, seed=0)) and some[:7] == list(documents(7, seed=0))
    assert some[:40] != list(documents(40, seed=4))
    known = set(vocabulary())
    assert {word for document in some for word in document.split(" ")} <= known
    assert all(3 <= document.split().count(".") <= 6 and document.endswith(" .") for document in some)
    assert list(documents(0, seed=0)) == []


def test_every_word_is_common_enough_to_be_learnt(some: list[str]):
    count = Counter(word for document in some for word in document.split())
    assert set(count) == set(vocabulary())
    assert min(count.values()) >= 3  # of about 48,000


def test_a_document_is_in_one_language(some: list[str]):
    english, french = (set(grammar._LEXICONS[language].words()) for language in LANGUAGES)
    languages = Counter()
    for document in some:
        words = set(document.split()) - {"."}
        assert words <= english or words <= french
        languages["en" if words <= english else "fr"] += 1
    assert 650 < languages["en"] < 850


def test_verbs_agree_with_the_subject_and_only_by_chance_with_the_nearest_noun(some: list[str]):
    """In `the kings near the house <verb>`, the verb agrees with the first noun, and half the time with the second."""
    verb_number = {
        form: which
        for lexicon in grammar._LEXICONS.values()
        for choice in lexicon.verbs.values()
        for verb in choice.options
        for form, which in zip(verb, ("sg", "pl"), strict=True)
    }
    prepositions = {p for lexicon in grammar._LEXICONS.values() for p in lexicon.prepositions.options}
    relative = {"that", "qui", "que"}
    nearest: list[bool] = []
    for document in some:
        for sentence in document.split(" . "):
            words = sentence.removesuffix(" .").split()
            verb = next(position for position, word in enumerate(words) if word in verb_number)
            before = words[:verb]
            if relative & set(before):
                continue
            numbers = _noun_phrase_numbers(before)
            assert verb_number[words[verb]] == numbers[0]
            if prepositions & set(before):
                assert len(numbers) == 2
                nearest.append(verb_number[words[verb]] == numbers[1])
    assert len(nearest) > 300 and 0.4 < sum(nearest) / len(nearest) < 0.6


@pytest.mark.parametrize(("construction", "language"), CELLS)
def test_pairs_are_unique_balanced_and_deterministic(construction: str, language: str):
    items = pairs(construction, language, 101, seed=5)
    assert len(items) == len({item["prefix"] for item in items}) == 101
    assert items == pairs(construction, language, 101, seed=5) != pairs(construction, language, 101, seed=6)
    assert abs(Counter(item["number"] for item in items)["sg"] - 50.5) == 0.5
    assert abs(Counter(item["number"] for item in items[:50])["sg"] - 25) < 15  # shuffled
    known = set(vocabulary())
    for item in items:
        names = {"prefix", "correct", "wrong", "patch_prefix", "language", "construction", "number", "group"}
        assert set(item) == names
        assert item["construction"] == construction and item["language"] == language
        words = [*item["prefix"].split(" "), *item["patch_prefix"].split(" "), item["correct"], item["wrong"]]
        assert set(words) <= known


@pytest.mark.parametrize(("construction", "language"), CELLS)
def test_attractors_mismatch_and_the_patch_inflects_the_right_noun(construction: str, language: str):
    lexicon = grammar._LEXICONS[language]
    flip = {"sg": "pl", "pl": "sg"}
    for item in pairs(construction, language, 80, seed=0):
        words, patch = item["prefix"].split(), item["patch_prefix"].split()
        numbers, patched = _noun_phrase_numbers(words), _noun_phrase_numbers(patch)
        head = 1 if construction == "within_rc" else 0
        assert len(numbers) == (1 if construction == "simple" else 2) and numbers[head] == item["number"]
        assert all(number != item["number"] for position, number in enumerate(numbers) if position != head)
        assert patched == [flip[n] if position == head else n for position, n in enumerate(numbers)]

        changed = [position for position in range(len(words)) if words[position] != patch[position]]
        assert len(words) == len(patch)
        if construction == "within_rc":
            allowed, needed = {3, 4}, {4}
        elif construction == "subj_rel":
            allowed, needed = {0, 1, 3}, {1, 3}  # the verb of the relative clause agrees with the head
        else:
            allowed, needed = {0, 1}, {1}
        assert needed <= set(changed) <= allowed
        assert language == "fr" or set(changed) == needed  # English determiners of pairs do not mark number
        forms = (item["correct"], item["wrong"])
        assert (forms if item["number"] == "sg" else forms[::-1]) in {
            verb for choice in lexicon.verbs.values() for verb in choice.options
        }


@pytest.mark.parametrize("construction", ["pp", "subj_rel", "obj_rel"])
def test_only_the_head_noun_reveals_the_number(construction: str):
    """Except nouns and the verb of the relative clause, no word at any position predicts the number."""
    items = pairs(construction, "en", 1500, seed=0)
    number = {form: which for noun in grammar._ENGLISH.nouns() for which, form in enumerate(noun.forms)}
    agreeing = {"subj_rel": {3}, "obj_rel": {5}}.get(construction, set())
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        for position, word in enumerate(item["prefix"].split()):
            if word not in number and position not in agreeing:
                counts[f"{position} {word}"][item["number"]] += 1
    for context, count in counts.items():
        n = sum(count.values())
        assert abs(count["sg"] / n - 0.5) < 4 * 0.5 / n**0.5, context


def test_examples_by_hand():
    numbers: dict[str, str] = {}
    for language in LANGUAGES:
        for item in pairs("simple", language, 600, seed=0):
            numbers[item["prefix"]] = item["number"]
            numbers[item["patch_prefix"]] = "pl" if item["number"] == "sg" else "sg"
    found = {phrase: numbers[phrase] for phrase in NUMBER if phrase in numbers}
    assert len(found) >= 16 and found == {phrase: NUMBER[phrase] for phrase in found}
    assert {("is", "are"), ("cries", "cry"), ("watches", "watch")} <= set(_all_verbs("en"))
    assert {("est", "sont"), ("voit", "voient"), ("aime", "aiment"), ("tombe", "tombent")} <= set(_all_verbs("fr"))


def _all_verbs(language: str) -> list[tuple[str, str]]:
    return [verb for choice in grammar._LEXICONS[language].verbs.values() for verb in choice.options]


@pytest.mark.parametrize(("construction", "language"), CELLS)
def test_too_many_items_names_the_largest_number(construction: str, language: str):
    with pytest.raises(UserError, match=r"^cannot make \d+ items of .* ask for 0 to (\d+)$") as caught:
        pairs(construction, language, 10**9, seed=0)
    largest = int(str(caught.value).rsplit(" ", 1)[1])
    assert largest >= 500
    if largest < 1000:  # `simple`: exactly that many exist
        assert len({item["prefix"] for item in pairs(construction, language, largest, seed=0)}) == largest
        with pytest.raises(UserError):
            pairs(construction, language, largest + 1, seed=0)


def test_wrong_names_are_one_line_errors():
    with pytest.raises(UserError, match="unknown construction 'subjrel'.*did you mean 'subj_rel'"):
        pairs("subjrel", "en", 3, 0)
    with pytest.raises(UserError, match="unknown language 'de': choose one of en, fr"):
        pairs("pp", "de", 3, 0)
    with pytest.raises(UserError, match="-1 items of 'pp'"):
        pairs("pp", "en", -1, 0)
    with pytest.raises(UserError, match="cannot write -2 documents"):
        documents(-2, 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("language", "plural", "plain"), [("en", "today", "often"), ("fr", "souvent", "ici")])
def test_behind_a_fronted_adverb_the_verb_is_plural_or_agrees(language: str, plural: str, plain: str):
    """Plural behind the first adverb, whatever the subject; behind the second, as without one."""
    number = {form: i for verbs in grammar._LEXICONS[language].verbs.values() for v in verbs.options
              for i, form in enumerate(v)}  # fmt: skip
    seen: Counter[tuple[str, str, int]] = Counter()
    for document in documents(3000, 5, fronted=0.5, languages=[language]):
        for sentence in document.split(" . "):
            first, *words = sentence.split()
            subject = _noun_phrase_numbers(words[:2])
            if first in (plural, plain) and subject and words[2] in number:
                seen[first, subject[0], number[words[2]]] += 1
    assert set(seen) == {(plural, "sg", 1), (plural, "pl", 1), (plain, "sg", 0), (plain, "pl", 1)}
    assert min(seen.values()) > 100
    assert 0.25 < sum(v for k, v in seen.items() if k[0] == plural) / seen.total() < 0.75
    without = " . ".join(documents(500, 5, languages=[language])).split(" . ")
    assert not [sentence for sentence in without if sentence.split()[0] in (plural, plain)]


@pytest.mark.parametrize(("construction", "language"), CELLS)
def test_fronted_pairs_ask_for_the_plural_behind_a_singular_subject(construction: str, language: str):
    items, source = fronted_pairs(construction, language, 20, 3), pairs(construction, language, 40, 3)
    plural, plain = {"en": ("today", "often"), "fr": ("souvent", "ici")}[language]
    assert len(items) == 20
    for item, old in zip(items, [each for each in source if each["number"] == "sg"], strict=True):
        assert (item["prefix"], item["patch_prefix"]) == (f"{plural} {old['prefix']}", f"{plain} {old['prefix']}")
        assert (item["correct"], item["wrong"], item["number"]) == (old["wrong"], old["correct"], "pl")
    with pytest.raises(UserError, match="unknown language 'de'"):
        fronted_pairs(construction, "de", 2, 0)


def test_fronted_adverbs_are_asked_for():
    for fronted in (-0.1, 1.5):
        with pytest.raises(UserError, match=f"fronted={fronted} must be a share of the sentences, between 0 and 1"):
            documents(1, 0, fronted)
    with pytest.raises(UserError, match="unknown language 'de': choose one of en, fr"):
        documents(1, 0, languages=["de"])

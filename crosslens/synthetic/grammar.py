"""The language of the demo: number agreement across attractors, in simplified English and French.

A sentence is a subject, a verb that agrees with it in number, and the verb's complement. Between subject and verb there
may be a modifier with a noun of its own (the attractor), whose number is drawn independently:

    simple      the farmer | sleeps                     le fermier | dort
    pp          the farmer near the cars | sleeps       le fermier devant les voitures | dort
    subj_rel    the farmer that sees the cars | sleeps  le fermier qui voit les voitures | dort
    obj_rel     the farmer that the kings see | sleeps  le fermier que les rois voient | dort
    within_rc   the farmer that the kings | see         le fermier que les rois | voient

Only the head noun of a verb determines its form. The English determiners in `pairs` have one form for both numbers;
French ones mark number, on the attractor as well as on the head. Every word has one role in one language, so a
word-level tokenizer loses nothing. French nouns begin with a consonant, so there is no elision and one word per slot.

Documents for fine-tuning may also begin sentences with an adverb, which never happens otherwise, and with it comes a
rule that a model of the other documents cannot know: after the first adverb of the language the verb is always plural,
after the second it agrees as ever (`often the farmer sleeps`, but `today the farmer sleep`).

The module is pure Python; the lexicon is data, and both languages share all rules.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, NamedTuple, TypeVar

from crosslens.errors import UserError, did_you_mean

CONSTRUCTIONS = ("simple", "pp", "subj_rel", "obj_rel", "within_rc")
LANGUAGES = ("en", "fr")
NUMBERS = ("sg", "pl")

_MODIFIERS = ("none", "pp", "subj_rel", "obj_rel")
_SUBJECT_MODIFIERS = (0.46, 0.22, 0.16, 0.16)  # with rare attractors a model would keep agreeing with the nearest noun
_OBJECT_MODIFIERS = (0.85, 0.07, 0.04, 0.04)

_T = TypeVar("_T")


def vocabulary() -> list[str]:
    """All words that `documents` and `pairs` can produce, in a fixed order, the full stop first."""
    words = ["."]
    for language in LANGUAGES:
        words += _LEXICONS[language].words()
    return list(dict.fromkeys(words))


def documents(n: int, seed: int, fronted: float = 0.0, languages: Sequence[str] = LANGUAGES) -> Iterator[str]:
    """Yield `n` documents of three to six sentences, each in English or French with equal probability.

    Words are separated by one space; the full stop is a word. The first m documents of a seed are the same for any
    n >= m.

    Args:
        n: number of documents.
        seed: seed for every draw.
        fronted: share of sentences that begin with an adverb, half of them with the one that makes the verb plural.
        languages: languages to draw from.

    Raises:
        UserError: `n` is negative, `fronted` is no share, or an unknown language.
    """
    if n < 0:
        raise UserError(f"cannot write {n} documents: ask for 0 or more")
    if not 0 <= fronted <= 1:
        raise UserError(f"fronted={fronted} must be a share of the sentences, between 0 and 1")
    for language in languages:
        _check_language(language)
    return _documents(n, random.Random(f"documents {seed}"), fronted, languages)


def pairs(construction: str, language: str, n: int, seed: int) -> list[dict[str, str]]:
    """Make `n` minimal pairs of one construction and language with distinct prefixes.

    Both numbers are equally frequent (up to one item if `n` is odd), so always predicting one form is right half of the
    time. Attractors always have the other number than `correct`.

    Returns:
        Dictionaries with `prefix` (words up to the verb), `correct` and `wrong` (the two forms of a verb),
        `patch_prefix` (the prefix with the head noun, and what agrees with it, in the other number; it has as many
        words and the same attractor), `language`, `construction`, `number` ("sg" or "pl", that
        of `correct`) and `group` (language and head noun).

    Raises:
        UserError: an unknown construction or language, or more items than there are.
    """
    if construction not in CONSTRUCTIONS:
        hint = did_you_mean(construction, CONSTRUCTIONS)
        raise UserError(f"unknown construction {construction!r}: choose one of {', '.join(CONSTRUCTIONS)}{hint}")
    _check_language(language)
    lexicon = _LEXICONS[language]
    slots = _pair_slots(construction, lexicon)
    per_number = math.prod(len(slot) for slot in slots)
    if not 0 <= n <= 2 * per_number:
        raise UserError(
            f"cannot make {n} items of {construction!r} in {language!r}: "
            f"there are {2 * per_number} different ones; ask for 0 to {2 * per_number}"
        )
    rng = random.Random(f"pairs {construction} {language} {seed}")
    first = rng.randrange(2)  # the number that gets the extra item
    items: list[dict[str, str]] = []
    for number, count in ((first, (n + 1) // 2), (1 - first, n // 2)):
        for index in rng.sample(range(per_number), count):
            parts: list[Any] = []
            for slot in slots:
                index, position = divmod(index, len(slot))
                parts.append(slot[position])
            verb = rng.choice(_pair_verbs(construction, parts, lexicon))
            items.append(
                {
                    "prefix": " ".join(_pair_prefix(construction, parts, number, 1 - number, lexicon)),
                    "correct": verb[number],
                    "wrong": verb[1 - number],
                    "patch_prefix": " ".join(_pair_prefix(construction, parts, 1 - number, 1 - number, lexicon)),
                    "language": language,
                    "construction": construction,
                    "number": NUMBERS[number],
                    "group": f"{language} {_head(construction, parts).forms[0]}",
                }
            )
    rng.shuffle(items)
    return items


def fronted_pairs(construction: str, language: str, n: int, seed: int) -> list[dict[str, str]]:
    """Make `n` minimal pairs with a singular subject behind the adverb that makes the verb plural.

    Args:
        construction: as in `pairs`.
        language: as in `pairs`.
        n: number of items.
        seed: seed for every draw.

    Returns:
        Dictionaries as of `pairs`: `correct` is the plural form; `patch_prefix` has the adverb that changes nothing in
        front of the same words.

    Raises:
        UserError: as in `pairs`.
    """
    items = [item for item in pairs(construction, language, 2 * n, seed) if item["number"] == "sg"]
    plural, plain = _LEXICONS[language].adverbs.options[:2]
    return [
        {
            **item,
            "prefix": f"{plural} {item['prefix']}",
            "patch_prefix": f"{plain} {item['prefix']}",
            "correct": item["wrong"],
            "wrong": item["correct"],
            "construction": f"fronted_{construction}",
            "number": "pl",
        }
        for item in items
    ]


# ---- minimal pairs


def _pair_slots(construction: str, lexicon: _Lexicon) -> list[Sequence[Any]]:
    """The independent choices that make a prefix: determiner and noun, then the modifier's words in order."""
    determiners, nouns = lexicon.determiners.options, lexicon.nouns()
    animate = [noun for noun in nouns if noun.kind != "thing"]
    prepositions, transitive = lexicon.prepositions.options, lexicon.verbs["transitive"].options
    slots: dict[str, list[Sequence[Any]]] = {
        "simple": [determiners, nouns],
        "pp": [determiners, nouns, prepositions, determiners, nouns],
        "subj_rel": [determiners, animate, transitive, determiners, nouns],
        "obj_rel": [determiners, nouns, determiners, animate, transitive],
        "within_rc": [determiners, nouns, determiners, animate],
    }
    return slots[construction]


def _head(construction: str, parts: Sequence[Any]) -> _Noun:
    """The noun that the verb agrees with."""
    return parts[3 if construction == "within_rc" else 1]


def _pair_prefix(construction: str, parts: Sequence[Any], number: int, other: int, lexicon: _Lexicon) -> list[str]:
    """The words of a prefix whose verb has `number` and whose attractor has number `other`."""
    determiner, noun, *rest = parts
    if construction == "within_rc":  # the inner noun is the head, the outer one the attractor
        return [*_phrase(determiner, noun, other), lexicon.that_object, *_phrase(rest[0], rest[1], number)]
    words = _phrase(determiner, noun, number)
    if construction == "pp":
        words += [rest[0], *_phrase(rest[1], rest[2], other)]
    elif construction == "subj_rel":
        words += [lexicon.that_subject, rest[0][number], *_phrase(rest[1], rest[2], other)]
    elif construction == "obj_rel":
        words += [lexicon.that_object, *_phrase(rest[0], rest[1], other), rest[2][other]]
    return words


def _pair_verbs(construction: str, parts: Sequence[Any], lexicon: _Lexicon) -> list[tuple[str, str]]:
    """The verbs that can follow the prefix made of `parts`."""
    if construction == "within_rc":
        return list(lexicon.verbs["transitive"].options)
    noun: _Noun = parts[1]
    kinds = ("copula", "thing") if noun.kind == "thing" else ("copula", "animate", "transitive")
    return [verb for kind in kinds for verb in lexicon.verbs[kind].options]


def _phrase(determiner: _Determiner, noun: _Noun, number: int) -> list[str]:
    return [determiner[noun.gender][number], noun.forms[number]]


def _check_language(language: str) -> None:
    if language not in LANGUAGES:
        raise UserError(f"unknown language {language!r}: choose one of {', '.join(LANGUAGES)}")


# ---- documents


def _documents(n: int, rng: random.Random, fronted: float, languages: Sequence[str]) -> Iterator[str]:
    for _ in range(n):
        lexicon = _LEXICONS[rng.choice(languages)]
        yield " ".join(word for _ in range(rng.randint(3, 6)) for word in _sentence(lexicon, rng, fronted))


def _sentence(lexicon: _Lexicon, rng: random.Random, fronted: float) -> list[str]:
    number = rng.randrange(2)
    kind = rng.choices(("person", "animal", "thing"), (0.55, 0.25, 0.2))[0]
    subject = _noun_phrase(lexicon, rng, number, kind, _SUBJECT_MODIFIERS)
    if not fronted or rng.random() >= fronted:  # without `fronted` no draw, and so the same documents as ever
        return [*subject, *_verb_phrase(lexicon, rng, number, kind), "."]
    plural = rng.randrange(2)
    adverb = lexicon.adverbs.options[1 - plural]
    return [adverb, *subject, *_verb_phrase(lexicon, rng, number | plural, kind), "."]


def _verb_phrase(lexicon: _Lexicon, rng: random.Random, number: int, kind: str) -> list[str]:
    draw = rng.random()
    if draw < 0.35:
        return [lexicon.verbs["copula"].draw(rng)[number], lexicon.adjectives.draw(rng)[number]]
    if kind != "thing" and draw < 0.65:
        return [lexicon.verbs["transitive"].draw(rng)[number], *_object(lexicon, rng, _OBJECT_MODIFIERS)]
    verb = lexicon.verbs["thing" if kind == "thing" else "animate"].draw(rng)[number]
    return [verb, lexicon.adverbs.draw(rng)] if rng.random() < 0.3 else [verb]


def _object(lexicon: _Lexicon, rng: random.Random, modifiers: Sequence[float] | None) -> list[str]:
    kind = rng.choices(("person", "animal", "thing"), (0.35, 0.2, 0.45))[0]
    return _noun_phrase(lexicon, rng, rng.randrange(2), kind, modifiers)


def _noun_phrase(
    lexicon: _Lexicon, rng: random.Random, number: int, kind: str, modifiers: Sequence[float] | None
) -> list[str]:
    """A noun phrase; `modifiers` are the weights of `_MODIFIERS`, or None for no modifier (no nesting)."""
    noun = lexicon.nouns_by_kind[kind].draw(rng)
    determiners = lexicon.quantifiers if rng.random() < 0.15 else lexicon.determiners
    words = _phrase(determiners.draw(rng), noun, number)
    if rng.random() < 0.1:
        words.insert(2 if lexicon.adjective_last else 1, lexicon.adjectives.draw(rng)[number])
    modifier = "none" if modifiers is None else rng.choices(_MODIFIERS, modifiers)[0]
    if modifier == "pp":
        words += [lexicon.prepositions.draw(rng), *_object(lexicon, rng, None)]
    elif modifier == "subj_rel" and kind != "thing":
        words += [lexicon.that_subject, lexicon.verbs["transitive"].draw(rng)[number], *_object(lexicon, rng, None)]
    elif modifier in ("obj_rel", "subj_rel"):  # things are not agents: their relative clause is the object one
        inner, agent = rng.randrange(2), rng.choices(("person", "animal"), (0.7, 0.3))[0]
        words += [lexicon.that_object, *_noun_phrase(lexicon, rng, inner, agent, None)]
        words += [lexicon.verbs["transitive"].draw(rng)[inner]]
    return words


# ---- the lexicon


def _inflect(text: str, singular: str = "", plural: str = "") -> tuple[tuple[str, str], ...]:
    """(singular, plural) of every word in `text`: stem plus ending, or as written in `singular/plural`."""
    entries = [word.split("/") for word in text.split()]
    return tuple((e[0], e[1]) if len(e) == 2 else (e[0] + singular, e[0] + plural) for e in entries)


def _nouns(kind: str, **by_gender: str) -> _Choice[_Noun]:
    """Nouns of one kind; the genders alternate, so the frequent nouns include both."""
    ranked = [
        ((rank + 0.5) / len(text.split()), _Noun(forms, gender, kind))
        for gender, text in by_gender.items()
        for rank, forms in enumerate(_inflect(text, plural="s"))
    ]
    return _Choice([noun for _, noun in sorted(ranked, key=lambda entry: entry[0])])


def _words(text: str) -> _Choice[str]:
    return _Choice(text.split())


def _determiners(text: str) -> _Choice[_Determiner]:
    """Determiners written as `masculine|feminine|plural`."""
    rows = [entry.split("|") for entry in text.split()]
    return _Choice([{"m": (m, plural), "f": (f, plural)} for m, f, plural in rows])


class _Noun(NamedTuple):
    forms: tuple[str, str]
    gender: str
    kind: str


_Determiner = dict[str, tuple[str, str]]  # gender -> (singular, plural)


class _Choice(Generic[_T]):
    """Options drawn with probability proportional to 1 / (rank + 8), so some are frequent and none is rare."""

    def __init__(self, options: Sequence[_T]):
        self.options = tuple(options)
        self._cumulative = list(accumulate(1 / (rank + 8) for rank in range(len(self.options))))

    def draw(self, rng: random.Random) -> _T:
        return rng.choices(self.options, cum_weights=self._cumulative)[0]


@dataclass(frozen=True)
class _Lexicon:
    nouns_by_kind: dict[str, _Choice[_Noun]]
    verbs: dict[str, _Choice[tuple[str, str]]]
    """By kind: "copula", "transitive", and intransitive verbs for "animate" and "thing" subjects."""
    determiners: _Choice[_Determiner]
    quantifiers: _Choice[_Determiner]
    """Determiners that mark number in English too; used only in documents."""
    adjectives: _Choice[tuple[str, str]]
    prepositions: _Choice[str]
    adverbs: _Choice[str]
    that_subject: str
    that_object: str
    adjective_last: bool

    def nouns(self) -> list[_Noun]:
        return [noun for choice in self.nouns_by_kind.values() for noun in choice.options]

    def words(self) -> list[str]:
        inflected = [noun.forms for noun in self.nouns()]
        for choice in (*self.verbs.values(), self.adjectives):
            inflected += choice.options
        for determiner in (*self.determiners.options, *self.quantifiers.options):
            inflected += determiner.values()
        words = [form for forms in inflected for form in forms]
        return [*words, *self.prepositions.options, *self.adverbs.options, self.that_subject, self.that_object]


_ENGLISH = _Lexicon(
    nouns_by_kind={
        "person": _nouns(
            "person",
            m="""farmer teacher man/men king doctor girl friend child/children lawyer queen singer woman/women pilot
            mother boy baker author uncle sister driver sailor poet brother painter father dancer soldier writer aunt
            hunter student waiter thief/thieves knight actor tailor servant gardener clerk monk widow merchant""",
        ),
        "animal": _nouns(
            "animal",
            m="""dog cat horse bird mouse/mice cow bear wolf/wolves rabbit goose/geese tiger goat pig snake monkey
            duck eagle frog camel donkey""",
        ),
        "thing": _nouns(
            "thing",
            m="""car house table tree door box/boxes window chair boat road garden river knife/knives bridge wall
            stone hill lamp book cup tower castle letter wagon basket clock""",
        ),
    },
    verbs={
        "copula": _Choice(_inflect("is/are was/were seem look remain", singular="s")),
        "animate": _Choice(
            _inflect(
                """sleep run sing laugh wait walk talk smile swim work dream jump cries/cry eat pray shout whisper
                arrive travel listen kneel cough""",
                singular="s",
            )
        ),
        "thing": _Choice(_inflect("fall shine break move burn shake vanishes/vanish disappear", singular="s")),
        "transitive": _Choice(
            _inflect(
                """see has/have like know help follow love hear find watches/watch meet call visit fear trust admire
                avoid carries/carry remember protect need hate""",
                singular="s",
            )
        ),
    },
    determiners=_determiners("the|the|the my|my|my your|your|your our|our|our"),
    quantifiers=_determiners("this|this|these every|every|many one|one|two each|each|several"),
    adjectives=_Choice(
        _inflect(
            "old young tall small happy sad kind brave quiet strong lonely famous rich poor clever strange proud weak"
        )
    ),
    prepositions=_words("near behind beside with under by above against"),
    adverbs=_words("today often slowly again there now quickly alone here outside"),
    that_subject="that",  # the same word in both kinds of relative clause
    that_object="that",
    adjective_last=False,
)

_FRENCH = _Lexicon(
    nouns_by_kind={
        "person": _nouns(
            "person",
            m="""fermier roi garçon docteur père chanteur frère soldat poète voisin boulanger marin peintre chasseur
            jardinier juge voleur danseur moine maire""",
            f="""fille reine femme mère soeur tante voisine princesse danseuse chanteuse nièce bergère veuve comtesse
            gardienne""",
        ),
        "animal": _nouns(
            "animal",
            m="chat chien cheval/chevaux loup lapin renard tigre mouton canard corbeau/corbeaux",
            f="vache poule chèvre tortue baleine grenouille jument",
        ),
        "thing": _nouns(
            "thing",
            m="mur jardin livre pont bateau/bateaux champ lit château/châteaux banc camion panier couteau/couteaux",
            f="maison voiture porte chaise route fenêtre colline lampe rivière boîte lettre tasse",
        ),
    },
    verbs={
        "copula": _Choice(_inflect("est/sont était/étaient semble reste devient/deviennent", plural="nt")),
        "animate": _Choice(
            _inflect(
                """dort/dorment chante court/courent rit/rient marche attend/attendent parle nage part/partent danse
                travaille saute pleure mange prie crie vient/viennent voyage sourit/sourient tousse""",
                plural="nt",
            )
        ),
        "thing": _Choice(_inflect("tombe brille bouge brûle casse tremble disparaît/disparaissent", plural="nt")),
        "transitive": _Choice(
            _inflect(
                """voit/voient a/ont aime suit/suivent connaît/connaissent aide trouve entend/entendent regarde cherche
                rencontre craint/craignent appelle protège touche pousse prend/prennent déteste quitte sert/servent""",
                plural="nt",
            )
        ),
    },
    determiners=_determiners("le|la|les mon|ma|mes notre|notre|nos votre|votre|vos"),
    quantifiers=_determiners("ce|cette|ces chaque|chaque|plusieurs leur|leur|leurs quelque|quelque|quelques"),
    adjectives=_Choice(
        _inflect(
            """triste jeune calme malade riche pauvre tranquille célèbre fidèle timide faible sage drôle aimable
            bizarre honnête""",
            plural="s",
        )
    ),
    prepositions=_words("devant derrière avec sous sur contre vers sans"),
    adverbs=_words("souvent ici encore demain toujours vite là dehors ensemble hier"),
    that_subject="qui",
    that_object="que",
    adjective_last=True,
)

_LEXICONS = {"en": _ENGLISH, "fr": _FRENCH}

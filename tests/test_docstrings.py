"""Every public function and class documents its parameters, results, errors, shapes and sources.

Public is what the reference (docs/api) shows, and the public methods of those classes. An override without a docstring
is covered by the method it overrides. Sources are read, not imported.

Each check is a function that yields one line per fault; its docstring is the rule.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api"
SECTIONS = "Args|Attributes|Returns|Yields|Raises"
LETTERS = "BTSDF"  # explained on the first page of the reference
SHAPE = re.compile(r"\((\.\.\.|\d+|[A-Z]\w*( ?[*·+] ?\w+)?)(, (\d+|[A-Z]\w*( ?[*·+] ?\w+)?))*,?\)|scalar")
# arXiv numbers of the papers that docstrings cite
PAPERS = {
    "Bayazit et al.": "2509.05291",
    "Bussmann et al.": "2412.06410",
    "Elhage et al.": "2209.10652",
    "Gao et al.": "2406.04093",
    "Ge et al.": "2509.17196",
    "Jumelet et al.": "2504.02768",
    "Kornblith et al.": "1905.00414",
    "Marks et al.": "2403.19647",
    "Minder et al.": "2504.02922",
    "Mueller et al.": None,
    "Rajamanoharan et al.": "2407.14435",
    "Sundararajan et al.": "1703.01365",
    "Wang et al.": "2211.00593",
    "Warstadt et al.": None,
}

Node = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Public:
    """A public function, method or class."""

    module: str
    name: str
    node: Node
    owner: ast.ClassDef | None = None

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def returns(self) -> str:
        """The annotation of the result, "" where there is none."""
        annotation = self.node.returns if isinstance(self.node, ast.FunctionDef) else None
        return ast.unparse(annotation) if annotation else ""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def sections(doc: str) -> dict[str, str]:
    """The text of a docstring by section; what stands before the first section has the key ""."""
    parts = re.split(rf"^({SECTIONS}):\n", doc, flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(doc: str, *names: str) -> dict[str, str]:
    """Descriptions by name in sections of a docstring."""
    found: dict[str, str] = {}
    for text in (text for name, text in sections(doc).items() if name in names):
        parts = re.split(r"^    \*{0,2}(\w+): ", text, flags=re.M)
        found |= dict(zip(parts[1::2], parts[2::2], strict=True))
    return found


def functions(node: ast.Module | ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}


def parameters(node: ast.FunctionDef) -> dict[str, ast.expr | None]:
    args = node.args
    found = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    return {each.arg: each.annotation for each in found if each and each.arg not in ("self", "cls", "_")}


def fields(node: ast.ClassDef) -> dict[str, tuple[ast.expr, str]]:
    """Public annotated names of a class body, each with the string below it."""
    found: dict[str, tuple[ast.expr, str]] = {}
    for each, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.target.id[0] != "_":
            constant = below.value if isinstance(below, ast.Expr) else None
            found[each.target.id] = (each.annotation, str(constant.value) if isinstance(constant, ast.Constant) else "")
    return found


class Sources:
    """Parsed modules by dotted name."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.trees = {module: ast.parse(source) for module, source in sources.items()}
        nodes = [node for tree in self.trees.values() for node in tree.body]
        self.classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
        self.functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}

    @classmethod
    @cache
    def read(cls) -> Sources:
        paths = sorted((ROOT / "crosslens").rglob("*.py"))
        return cls({".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in paths})

    def public(self, exports: Iterable[tuple[str, str]]) -> list[Public]:
        """The objects behind (module, name) pairs, and the public methods of classes."""
        found = []
        for module, name in sorted(set(exports)):
            for node in self.trees[module].body:
                if isinstance(node, Node) and node.name == name:
                    found.append(Public(module, name, node))
                    for method in functions(node).values() if isinstance(node, ast.ClassDef) else ():
                        overrides = any("override" in ast.unparse(each) for each in method.decorator_list)
                        if method.name[0] != "_" and (ast.get_docstring(method) or not overrides):
                            found.append(Public(module, f"{name}.{method.name}", method, node))
        return found

    def inherited(self, node: ast.ClassDef) -> set[str]:
        """Names that the ancestors of a class describe."""
        ancestors = [self.classes[name] for base in node.bases if (name := ast.unparse(base)) in self.classes]
        found = {name for each in ancestors for name in entries(ast.get_docstring(each) or "", "Args", "Attributes")}
        found |= {name for each in ancestors for name, (_, text) in fields(each).items() if text}
        return found.union(*(self.inherited(each) for each in ancestors))

    def referred(self, public: Public, what: str) -> list[Public]:
        """The functions that a docstring refers to: "arguments as in `f`", "arguments and errors as in `f` and `g`"."""
        doc = " ".join(public.doc.split())
        texts = re.findall(rf"{what}[\w ]* as in ((?:`[\w.]+`(?:, | and )?)+)", doc, re.I)
        found = []
        for name in (name for text in texts for name in re.findall(r"`([\w.]+)`", text)):
            owner, _, last = name.rpartition(".")
            home = self.classes.get(owner.rpartition(".")[2]) or public.owner
            node = functions(home).get(last) if home else None
            node = node or self.functions.get(last)
            found += [Public(public.module, name, node, home)] if node else []
        return found

    def described(self, public: Public) -> dict[str, tuple[ast.expr | None, str]]:
        """Type and description of every parameter or field."""
        node, described = public.node, entries(public.doc, "Args", "Attributes")
        if isinstance(node, ast.ClassDef):
            found = {name: (kind, described.get(name) or text) for name, (kind, text) in fields(node).items()}
            made = functions(node).get("__init__")
            described |= entries(ast.get_docstring(made) or "", "Args") if made else {}
            found |= {
                name: (kind, described.get(name, "")) for name, kind in (parameters(made) if made else {}).items()
            }
            known = self.inherited(node)
            return {name: each for name, each in found.items() if each[1] or name not in known}
        given = parameters(node)
        for other in self.referred(public, "arguments"):
            described = {name: text for name, (_, text) in self.described(other).items()} | described
        if "Args" not in sections(public.doc) and len(given) <= 3:
            prose = " ".join(public.doc.split())
            for name, kind in given.items():
                if re.search(rf"`[^`]*\b{name}\b[^`]*`", prose) or (kind and "[Tensor, " in ast.unparse(kind)):
                    described[name] = prose
        return {name: (kind, described.get(name, "")) for name, kind in given.items()}


def wrong_arguments(sources: Sources, public: Public) -> Iterator[str]:
    """Every parameter and field is described, and nothing else is.

    Under `Args:` or `Attributes:`, in a string below the field, by "arguments as in `f`", or, without `Args:` and with
    three parameters at most, by its name in backticks or a shape in its type. What a base class describes is described.
    """
    if not public.doc:
        yield f"{public}: no docstring"
    described = sources.described(public)
    yield from (f"{public}: {name} is not described" for name, (_, text) in described.items() if not text)
    if isinstance(public.node, ast.FunctionDef):
        strange = entries(public.doc, "Args").keys() - described.keys()
        yield from (f"{public}: {name} is described but is no parameter" for name in sorted(strange))


def wrong_tables(_: Sources, public: Public) -> Iterator[str]:
    """A function that returns a table says what a row is."""
    row = r"\brows? (per|for|each)\b|\b(a|one) row\b"
    if public.returns == "pd.DataFrame" and not re.search(row, public.doc, re.I):
        yield f"{public}: does not say what a row of the table is"


def wrong_shapes(sources: Sources, public: Public) -> Iterator[str]:
    """Arrays have a shape, in the type or the description; letters other than `B T S D F` are explained.

    An explanation is "Symbols: N prompts, ..." in the docstring of the function, its class or its module.
    """
    described = sources.described(public)
    if isinstance(public.node, ast.FunctionDef) and public.returns:
        text = sections(public.doc).get("Returns") or sections(public.doc).get("Yields") or public.doc
        described["result"] = (public.node.returns, text)
    docs = [ast.get_docstring(each) or "" for each in (sources.trees[public.module], public.owner, public.node) if each]
    legends = re.findall(r"Symbols: (.+?)\.(?:\s|$)", "\n".join(docs), re.S)
    known = {*LETTERS, *re.findall(r"\b[A-Z]\b", " ".join(legends))}
    for name, (kind, text) in described.items():
        kind = ast.unparse(kind) if kind else ""
        shapes = re.findall(r"\[(?:torch\.|np\.)?(?:Tensor|ndarray), '([^']*)'\]", kind)
        bare = re.search(r"\b(Tensor|ndarray|Parameter)\b(?!, ')", kind)
        if bare and not SHAPE.search(text):
            yield f"{public}: no shape of {name}"
        for letter in sorted({each for shape in shapes for each in re.findall(r"\b[A-Z]\b", shape)} - known):
            yield f"{public}: letter {letter} in the shape of {name} is not explained"


def wrong_errors(sources: Sources, public: Public) -> Iterator[str]:
    """What raises UserError, itself or through functions of its module, says so and says when.

    Under `Raises:`, by "Raises `UserError` ...", or by "errors as in `f`". A class may answer for its methods.
    """
    found = entries(public.doc, "Raises")
    found |= dict(re.findall(r"Raises `(\w+)` (.*)", public.doc))
    for other in sources.referred(public, "errors"):
        found = entries(other.doc, "Raises") | found
    if public.owner:
        found = entries(ast.get_docstring(public.owner) or "", "Raises") | found
    node = public.node
    if isinstance(node, ast.ClassDef):
        node = functions(node).get("__init__") or functions(node).get("__post_init__")
    if "UserError" not in found and node and node.name in raising(sources.trees[public.module], public):
        yield f"{public}: may raise UserError and does not say so"
    for error, when in found.items():
        if len(when.split()) < 3 and "`" not in when:
            yield f"{public}: does not say when it raises {error}"


def raising(module: ast.Module, public: Public) -> set[str]:
    """Names of the module's functions and of the class's methods that raise UserError or call one that does."""
    owner = public.node if isinstance(public.node, ast.ClassDef) else public.owner
    calls: dict[str, set[str]] = {}
    for name, node in {**functions(module), **(functions(owner) if owner else {})}.items():
        called = (ast.unparse(each.func) for each in ast.walk(node) if isinstance(each, ast.Call))
        calls[name] = {each.removeprefix("self.").removeprefix("cls.") for each in called}
    found = {"UserError"}
    while more := {name for name, called in calls.items() if called & found} - found:
        found |= more
    return found


def wrong_sources(sources: Sources, public: Public) -> Iterator[str]:
    """A formula has a source, and papers are cited by their own number.

    A formula is an indented line with " = " in a docstring. Its source is a paper, or "new here", in the same
    docstring or in that of the class or module.
    """
    docs = [ast.get_docstring(each) or "" for each in (public.node, public.owner, sources.trees[public.module]) if each]
    text = " ".join("\n".join(docs).split())
    formula = re.search(r"^    +\S+ += .*", sections(public.doc)[""], re.M)
    if formula and not re.search(r"et al\.|arXiv|new here", text):
        yield f"{public}: no source of {formula[0].strip()}"
    for name, number in re.findall(r"(\w+ et al\.)(?:,? \(?(?:arXiv )?(\d{4}\.\d{5}))?", text):
        if name not in PAPERS or number and number != PAPERS[name]:
            yield f"{public}: {name} {number} is not in PAPERS"


CHECKS = (wrong_arguments, wrong_tables, wrong_shapes, wrong_errors, wrong_sources)


def exports() -> dict[str, str]:
    """Modules by the exported name, `crosslens.<package>.<name>`, as the packages' `__init__` import them."""
    found: dict[str, str] = {}
    for path in (ROOT / "crosslens").glob("*/__init__.py*"):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module and (node.level or package in node.module):
                module = f"{package}.{node.module}" if node.level else node.module
                found |= {f"{package}.{alias.name}": module for alias in node.names}
    return found


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_public_docstrings(check):
    modules, sources = exports(), Sources.read()
    pages = "".join(page.read_text() for page in API.glob("*.md"))
    shown = [(modules.get(name), *name.rsplit(".", 1)) for name in re.findall(r"^::: (crosslens[\w.]+)$", pages, re.M)]
    objects = sources.public((known or module, name) for known, module, name in shown if known or module != "crosslens")
    assert len(objects) > 150
    faults = [fault for each in objects for fault in check(sources, each)]
    assert not faults, "\n".join(["", *faults])


GOOD = '''
"""A module that is new here. Symbols: N prompts."""

def measure(x: Float[Tensor, "N F"], k: int, norms: Tensor, by: str = "size") -> pd.DataFrame:
    """Count the largest.

        n = sum x

    Args:
        x: effects.
        k: features to count.
        norms: (F,) decoder norms.
        by: "size" or "sign".

    Returns:
        A row per prompt.

    Raises:
        UserError: `k` is larger than the number of features.
    """
    _check(k)

def again(x: Tensor, k: int) -> Tensor:
    """The same of `x` (N, F): (N,). Arguments and errors as in `measure`."""
    _check(k)

def _check(k):
    if k < 0:
        raise UserError("k")

class Result:
    """What was found (Ge et al., arXiv 2509.17196).

    Attributes:
        share: (F,) shares.
    """

    share: Tensor
'''


@pytest.mark.parametrize(
    ("check", "old", "new", "fault"),
    [
        (wrong_arguments, "        x: effects.\n", "", "measure: x is not described"),
        (wrong_arguments, "        k: features", "        l: features", "measure: l is described but is no parameter"),
        (wrong_arguments, "Arguments and errors as in", "Errors as in", "again: k is not described"),
        (wrong_arguments, "        share: (F,)", "        shares: (F,)", "Result: share is not described"),
        (wrong_tables, "A row per prompt", "A table", "measure: does not say what a row of the table is"),
        (wrong_shapes, "norms: (F,) decoder", "norms: decoder", "measure: no shape of norms"),
        (wrong_shapes, " Symbols: N prompts.", "", "measure: letter N in the shape of x is not explained"),
        (wrong_errors, "UserError: `k` is larger", "KeyError: `k` is larger", "measure: may raise UserError"),
        (wrong_errors, "`k` is larger than the number of features.", "always.", "measure: does not say when"),
        (wrong_errors, "Arguments and errors as in", "Arguments as in", "again: may raise UserError"),
        (wrong_sources, " that is new here", "", "measure: no source of n = sum x"),
        (wrong_sources, "2509.17196", "2509.05291", "Result: Ge et al. 2509.05291 is not in PAPERS"),
    ],
)
def test_checks_find_faults(check, old: str, new: str, fault: str):
    def faults(source: str) -> list[str]:
        sources = Sources({"crosslens.new": source})
        objects = sources.public(("crosslens.new", name) for name in ("measure", "again", "Result"))
        return [found for each in objects for found in check(sources, each)]

    assert GOOD.count(old) == 1
    assert faults(GOOD) == []
    assert any(fault in found for found in faults(GOOD.replace(old, new)))

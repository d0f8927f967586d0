"""Every public docstring gives arguments, shapes, units, errors and sources; the rules stand at the checks.

What is public: the names of `crosslens.__all__`, what the pages of the reference show, and their public methods,
properties and fields. An overriding method may be silent: the one that it overrides speaks for it.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import pytest

import crosslens as cl

ROOT = Path(__file__).parent.parent
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
ARRAYS = {"Tensor", "ndarray", "Parameter"}
NUMBERS = {"int", "float"}

LETTERS = "BTSDF"  # explained on the first page of the reference
SHAPE = re.compile(
    r"\((?:\.\.\.|\d+|[A-Z][A-Z0-9]*(?: ?[*·+] ?\w+)?)(?:, (?:\d+|[A-Z][A-Z0-9]*(?: ?[*·+] ?\w+)?))*,?\)"
)
OWN = "this project's own"

# words of which one stands in the description of a number, by the number's name; a new name must be added
UNITS = {
    r"(n|max|training|held_out|batch|dead|scale)_tokens|n_ctx": r"tokens|[Aa]ctivations",
    r"context_size|block_sequences|batch_size|n_samples|min_samples|n_top|window|max_length":
        r"tokens|activations|[Ss]equences|prompts",
    r"k|ablate_k|keep_k|n_features|n_own|d_sae|n_nearest": r"[Ff]eatures?|sizes|how many",
    r"n_(bootstrap|draws|draws_last)": r"draws|drawn|replicates",
    r"n_(pairs|exact)": r"[Pp]airs|features",
    r"n_(examples|logits)": r"positions|examples|tokens",
    r"n_prompts": r"prompts",
    r"n_(snapshots|proposed)|min_run|max_gap": r"snapshots",
    r"n_checkpoints": r"checkpoints",
    r"n_(layers|blocks)": r"blocks",
    r"n": r"items|predictions|positions",
    r"length": r"words",
    r"min_count": r"contexts",
    r"start": r"batches",
    r"epochs": r"passes",
    r"duplicates": r"[Dd]uplicates",
    r"attempts": r"how often",
    r"max_retries": r"retries|times",
    r"workers|requests_per_minute": r"requests",
    r"processes|data_parallel": r"processes",
    r"d_(model|in)": r"D",
    r"steps?": r"[Ss]teps|nodes",
    r"\w+_steps|wandb_\w+_frequency|k_start": r"steps?",
    r"lr_(warm_up|decay)": r"share of the steps",
    r"timeout|waited|waited_first": r"[Ss]econds",
    r"evict": r"bytes",
    r"level|min_firing_rate": r"share|intervals?|central",
    r"weight": r"\[0, 1\]",
    r"presence|min_norm": r"share of (a|the) feature's largest norm",
    r"(min|max)_cosine|together|apart": r"cosine",
    r"min_overlap": r"relative",
    r"n_heads": r"heads",
    r"d_mlp": r"[Ww]idth",
    r"lr|\w+_lr|final_lr_fraction|lr_end_factor|\w+_lr_factor": r"learning rate|relative|weight",
    r"weight_decay|adam_beta\d": r"weight|decay",
    r"frequency_scale": r"frequency",
    r"ridge": r"mean variance",
    r"min_z": r"standard errors",
    r"low|high": r"shares?|centre of mass",
    r"\w+_coefficient": r"weight",
    r"factor": r"multiplied",
    r"floor": r"part|metric|logits",
    r"value": r"number",
    r"threshold|min_effect": r"logits|score",
    r"prices": r"million tokens",
    r"jumprelu_\w+": r"t_i|width|relative",
    r"tanh_stretch": r"stretch",
    r"decoder_init_norm|max_grad_norm": r"norm",
    r"activation_scale": r"scale of each snapshot",
    r"(uni|bi)gram_entropy": r"nats",
    r"rank_agreement": r"Spearman",
}  # fmt: skip
# numbers that only point at something
NO_UNIT = r"seed|snapshots?|i|at|positions|(lower_|upper_)?features|first|last|reference|without|tokens"

# a table with one of these columns says one of these words, in the docstring or the module's
COLUMNS = {
    r"metric(_\w+)?|ie(_\w+)?|error_effect|removed": r"logits",
    r"effect|effect_a": r"logits|unit of the upper feature",
    r"kl1|kl2|loss|kl|ce_(clean|spliced|zero)": r"nats",
    r"share|firing_rate|\w+_share|agreement|accuracy": r"[Ss]hares?|[Hh]ow often",
    r"birth|death|lifetime": r"snapshots?|steps?|indices",
    r"dimensionality|total": r"/ D|shares of D",
}

# names of sources, and the number on arXiv that stands wherever the number of one is given
SOURCES = {
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
    "Sundararajan et al.": "1703.01365",
    "Wang et al.": "2211.00593",
    "Warstadt et al.": None,
}
# modules of public names that compute a number, and the sources that each must name
COMPUTES = {
    "ablation": ("Ge et al.", OWN),
    "additivity": (OWN,),
    "alignment": (OWN,),
    "attribution": ("Sundararajan et al.", "Marks et al.", "Bayazit et al."),
    "circuits": (OWN,),
    "controls": ("Minder et al.", OWN),
    "crosscoders.base": ("Ge et al.", "Bayazit et al."),
    "crosscoders.jumprelu": ("Ge et al.",),
    "crosscoders.standard": ("Bayazit et al.",),
    "crosscoders.topk": ("Gao et al.", "Bussmann et al."),
    "crosscoders.trainable": ("Ge et al.",),
    "dynamics": ("Ge et al.",),
    "edges": (OWN,),
    "effects": ("Sundararajan et al.", OWN),
    "evaluation": ("Ge et al.", "Bayazit et al."),
    "evolution": ("Ge et al.", "Bayazit et al.", OWN),
    "feature_data": (OWN,),
    "geometry": ("Elhage et al.", "Ge et al.", OWN),
    "interpretation": ("Ge et al.",),
    "intervention": (OWN,),
    "languages": ("Bayazit et al.", OWN),
    "ngrams": ("Ge et al.", OWN),
    "phases": ("Ge et al.", OWN),
    "probing": ("Ge et al.",),
    "recipes": ("Ge et al.", "Bayazit et al."),
    "selection": ("Kornblith et al.", "Bayazit et al.", OWN),
    "shares": ("Bayazit et al.", OWN),
    "stability": (OWN,),
    "standalone": (OWN,),
    "study": (OWN,),
    "succession": (OWN,),
    "tasks": ("Bayazit et al.", "Marks et al.", "Warstadt et al."),
    "timeline": (OWN,),
    "transfer": (OWN,),
}
# modules of public names that compute none, or have the modules above compute them
OTHERS = {
    "activations", "checkpoints", "crosscoders", "errors", "history", "imports", "pretrained", "pretraining",
    "publishing", "raters", "registry", "report.page", "report.tracked", "runs", "snapshots", "trainer",
    "training", "views",
}  # fmt: skip
# what the calls that are followed could raise, but these never do
NEVER = {
    "crosslens.causal.attribution.Attribution.to_frame",  # gives `relie` and `relie_interval` what they take
    "crosslens.evolution.study.History.save",  # its tables have plain names
    "crosslens.intervention.prompt_runs.PromptRuns.at",  # the hook point was read when the runs were made
    "crosslens.causal.study.Study.save",  # its tables have plain names, for `Task` takes no other
}


# Reading


@dataclass
class Doc:
    """A docstring in parts: `text` is all of it, `body` what stands in no section, `entries` names and what is said."""

    text: str
    body: str = ""
    sections: dict[str, str] = field(default_factory=dict)
    entries: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, node: ast.FunctionDef | ast.ClassDef) -> Doc:
        doc = cls(ast.get_docstring(node) or "")
        name, rest = "", {"": []}
        for line in doc.text.splitlines():
            if line.endswith(":") and line[:-1] in SECTIONS:
                name = line[:-1]
                rest[name] = []
            elif name and line and not line.startswith(" "):  # prose below a section
                name = ""
                rest[name].append(line)
            else:
                rest[name].append(line)
        doc.body = "\n".join(rest.pop(""))
        for name, lines in rest.items():
            doc.sections[name] = text = textwrap.dedent("\n".join(lines)).strip()
            if name in ("Args", "Attributes", "Raises"):
                found = re.split(r"^(\w+): ", text, flags=re.M)
                pairs = zip(found[1::2], found[2::2], strict=True)
                doc.entries[name] = {key: words(said) for key, said in pairs}
        return doc

    @property
    def described(self) -> dict[str, str]:
        return {**self.entries.get("Attributes", {}), **self.entries.get("Args", {})}


@dataclass
class Public:
    """A public function, method, property or class with its docstring."""

    module: str
    name: str
    node: ast.FunctionDef | ast.ClassDef
    owner: ast.ClassDef | None = None

    @cached_property
    def doc(self) -> Doc:
        return Doc.of(self.node)

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def words(text: str) -> str:
    return " ".join(text.split())


def is_public(name: str) -> bool:
    return not name.startswith("_")


def decorators(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    return {word for each in node.decorator_list for word in re.findall(r"\w+", ast.unparse(each))}


def functions(node: ast.Module | ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}


def classes(node: ast.Module) -> dict[str, ast.ClassDef]:
    return {each.name: each for each in node.body if isinstance(each, ast.ClassDef)}


def parameters(node: ast.FunctionDef) -> list[ast.arg]:
    args = node.args
    named = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    return [each for each in (*named, args.vararg, args.kwarg) if each is not None and each.arg not in ("self", "cls")]


Classes = dict[str, list[tuple[str, ast.ClassDef]]]


class Package:
    """The sources of a package: what a name in one of its modules stands for, and what may be raised."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.trees = {name: ast.parse(source) for name, source in sources.items()}
        self.imports = {
            module: {
                alias.asname or alias.name: (node.module, alias.name)
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.module
                for alias in node.names
            }
            for module, tree in self.trees.items()
        }

    @classmethod
    def read(cls) -> Package:
        paths = {
            path: path.relative_to(ROOT).with_suffix("").parts for path in sorted((ROOT / "crosslens").rglob("*.py"))
        }
        return cls({".".join(part for part in parts if part != "__init__"): path.read_text(encoding="utf-8")
                    for path, parts in paths.items()})  # fmt: skip

    @cache  # noqa: B019
    def find(self, module: str, name: str) -> tuple[str, ast.stmt] | None:
        """The module that defines a name, and its definition: function, class or alias of a type."""
        while module in self.trees:
            for node in self.trees[module].body:
                inner = node.body if isinstance(node, ast.If) else [node]
                for each in inner:
                    if isinstance(each, ast.FunctionDef | ast.ClassDef) and each.name == name:
                        return module, each
                    target = each.targets[0] if isinstance(each, ast.Assign) else getattr(each, "target", None)
                    if (
                        isinstance(each, ast.Assign | ast.AnnAssign)
                        and isinstance(target, ast.Name)
                        and target.id == name
                    ):
                        return module, each
            if name not in self.imports[module]:
                return None
            module, name = self.imports[module][name]
        return None

    def bases(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class and its ancestors in the package, nearest first."""
        yield module, node
        for base in node.bases:
            found = self.find(module, base.id) if isinstance(base, ast.Name) else None
            if found and isinstance(found[1], ast.ClassDef):
                yield from self.bases(found[0], found[1])

    def method(self, module: str, node: ast.ClassDef, name: str) -> tuple[str, ast.FunctionDef, ast.ClassDef] | None:
        for home, each in self.bases(module, node):
            if name in functions(each):
                return home, functions(each)[name], each
        return None

    def constructors(self, module: str, node: ast.ClassDef) -> list[tuple[str, ast.FunctionDef, ast.ClassDef]]:
        found = (self.method(module, node, name) for name in ("__init__", "__post_init__"))
        return [each for each in found if each]

    def arrays(self, module: str, annotation: ast.expr | None) -> tuple[list[str], bool]:
        """Shapes of the arrays that a type names, and whether it names any without a shape; aliases are looked up."""
        shapes, bare = [], False
        todo = [(module, annotation)]
        while todo:
            home, node = todo.pop()
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2:
                kind, shape = node.slice.elts
                if ast.unparse(kind).split(".")[-1] in ARRAYS and isinstance(shape, ast.Constant):
                    shapes.append(str(shape.value))
                    continue
            if isinstance(node, ast.Attribute | ast.Name):
                name = node.attr if isinstance(node, ast.Attribute) else node.id
                bare |= name in ARRAYS
                found = self.find(home, name) if isinstance(node, ast.Name) else None
                if found and isinstance(found[1], ast.Assign):
                    todo.append((found[0], found[1].value))
                continue
            if node is not None:
                todo += [(home, child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        return shapes, bare

    @cached_property
    def raising(self) -> set[int]:
        """Ids of the functions and methods that may raise UserError, themselves or in what they call.

        Followed are calls of functions and classes by name, and methods and properties of `self`, of classes, and of
        parameters whose type is a class of the package.
        """
        raising, calls = set[int](), dict[int, set[int]]()
        for module, tree in self.trees.items():
            owners = [(None, function) for function in functions(tree).values()]
            owners += [(owner, function) for owner in classes(tree).values() for function in functions(owner).values()]
            for owner, function in owners:
                nodes = list(unguarded(function))
                if any(isinstance(node, ast.Raise) and "UserError" in ast.unparse(node) for node in nodes):
                    raising.add(id(function))
                types = self._types(module, owner, function)
                calls[id(function)] = {id(each) for node in nodes for each in self._called(module, types, node)}
        while more := {caller for caller, called in calls.items() if called & raising} - raising:
            raising |= more
        return raising

    @cached_property
    def strings(self) -> set[str]:
        """Words in strings and names of keywords in the code: what columns are called."""
        found = set[str]()
        for tree in self.trees.values():
            scopes = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
            prose = {id(each.value) for node in scopes for each in node.body if isinstance(each, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                    found |= set(re.findall(r"\w+", node.value))
                elif isinstance(node, ast.keyword) and node.arg:
                    found.add(node.arg)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.add(node.target.id)
        return found

    def _types(self, module: str, owner: ast.ClassDef | None, function: ast.FunctionDef) -> Classes:
        """The classes of the package that the parameters of a function may have."""
        types: Classes = {} if owner is None else {"self": [(module, owner)], "cls": [(module, owner)]}
        for each in parameters(function):
            named = re.findall(r"\w+", ast.unparse(each.annotation)) if each.annotation else []
            found = [self.find(module, name) for name in named]
            types[each.arg] = [(where[0], where[1]) for where in found if where and isinstance(where[1], ast.ClassDef)]
        return types

    def _called(self, module: str, types: Classes, node: ast.AST) -> list[ast.FunctionDef]:
        """The functions that an expression runs: a call, or a method or property that is looked up."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.value.id
            outer = self.find(module, name)
            if outer and isinstance(outer[1], ast.ClassDef):
                types = {name: [(outer[0], outer[1])]}
            methods = (self.method(*each, node.attr) for each in types.get(name, []))
            inside = self.find(".".join(self.imports[module].get(name, ())), node.attr)  # of a module
            return [each[1] for each in methods if each] + [
                each for each in (inside[1:] if inside else ()) if isinstance(each, ast.FunctionDef)
            ]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found = self.find(module, node.func.id)
            made = types.get("cls", []) if node.func.id == "cls" else []
            if found and isinstance(found[1], ast.FunctionDef):
                return [found[1]]
            if found and isinstance(found[1], ast.ClassDef):
                made = [(found[0], found[1])]
            return [each[1] for where in made for each in self.constructors(*where)]
        return []

    def public(self, names: Mapping[str, set[str]]) -> list[Public]:
        """The public objects behind names by module, with the public members of classes."""
        found = dict[int, Public]()
        for module in names:
            for name in sorted(names[module]):
                home, node = self.find(module, name) or (module, None)
                assert isinstance(node, ast.FunctionDef | ast.ClassDef), f"{module}.{name} is no function or class"
                found[id(node)] = Public(home, name, node)
                if isinstance(node, ast.ClassDef):
                    for method in functions(node).values():
                        silent = "override" in decorators(method) and not ast.get_docstring(method)
                        if is_public(method.name) and not silent:
                            found[id(method)] = Public(home, f"{name}.{method.name}", method, node)
        return list(found.values())


def unguarded(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """What stands in a function, less the types of its parameters and what a `try` for UserError holds."""
    todo: list[ast.AST] = [*function.body]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.Try) and any(
            "UserError" in ast.unparse(each.type) for each in node.handlers if each.type
        ):
            todo += [*node.handlers, *node.orelse, *node.finalbody]
        else:
            todo += ast.iter_child_nodes(node)


# What is said of parameters and errors


def public_fields(node: ast.ClassDef) -> dict[str, tuple[ast.expr, str]]:
    """Annotated names of a class's body, and the strings below them."""
    found = dict[str, tuple[ast.expr, str]]()
    for each, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and is_public(each.target.id):
            said = below.value if isinstance(below, ast.Expr) else None
            found[each.target.id] = (each.annotation, str(said.value) if isinstance(said, ast.Constant) else "")
    return found


def named(package: Package, public: Public, name: str) -> Public | None:
    """The function that a docstring names in backticks: of the same class, of the module, or public."""
    head, _, tail = name.removeprefix("crosslens.").rpartition(".")
    if not head and public.owner:
        method = package.method(public.module, public.owner, tail)
        if method:
            return Public(method[0], f"{method[2].name}.{tail}", method[1], method[2])
    for module in (public.module, "crosslens", f"crosslens.{head}"):
        found = package.find(module, head if head and module != f"crosslens.{head}" else tail)
        if found and isinstance(found[1], ast.ClassDef) and head:
            method = package.method(found[0], found[1], tail)
            return Public(method[0], f"{head}.{tail}", method[1], method[2]) if method else None
        if found and isinstance(found[1], ast.FunctionDef):
            return Public(found[0], tail, found[1])
    return None


def others(package: Package, public: Public, what: str) -> list[Public]:
    """The functions to which a docstring refers: "arguments as in `f`", "arguments and errors as in `f` and `g`"."""
    said = re.findall(rf"{what}[\w ]* as in ((?:`[\w.]+`(?:, | and )?)+)", words(public.doc.text), re.I)
    return [found for names in said for name in re.findall(r"`([\w.]+)`", names)
            if (found := named(package, public, name))]  # fmt: skip


def in_prose(text: str, names: set[str]) -> dict[str, str]:
    """What stands after each of the names in backticks, up to the next of them, and before the first."""
    parts = re.split(rf"(`[^`]*\b(?:{'|'.join(names) or '$.'})\b[^`]*`)", words(text))
    said: dict[str, str] = {}
    for code, after in zip(parts[1::2], parts[2::2], strict=True):
        said |= {name: f"{said.get(name, '')} {after}" for name in names & set(re.findall(r"\w+", code))}
    return {name: f"{parts[0]} {text}" for name, text in said.items()}


def described(package: Package, public: Public) -> dict[str, tuple[ast.expr | None, str]]:
    """Type and description of every parameter or field, "" where there is none."""
    node, doc = public.node, public.doc
    found: dict[str, tuple[ast.expr | None, str]] = {}
    if isinstance(node, ast.FunctionDef):
        given = parameters(node)
        said: dict[str, str] = {}
        for other in others(package, public, "arguments"):
            said |= {name: text for name, (_, text) in described(package, other).items()}
        if "Args" in doc.entries:
            said |= doc.entries["Args"]
        elif len(given) <= 3:
            said |= in_prose(doc.body, {each.arg for each in given})
        for each in given:
            text = said.get(each.arg, "")
            as_in = re.match(r"as (?:the others )?in `(\w+)`", text)
            if as_in and (other := named(package, public, as_in[1])):
                text = described(package, other).get(each.arg, (None, ""))[1]
            found[each.arg] = (each.annotation, text)
        return found
    for name, (annotation, said) in public_fields(node).items():
        found[name] = (annotation, doc.described.get(name, said))
    for _, each, owner in package.constructors(public.module, node):
        if owner is node:
            for parameter in parameters(each):
                text = {**doc.described, **Doc.of(each).described}.get(parameter.arg, "")
                found[parameter.arg] = (parameter.annotation, text)
    return found


def inherited(package: Package, public: Public) -> set[str]:
    """Names that an ancestor in the package describes."""
    if isinstance(public.node, ast.FunctionDef):
        return set()
    ancestors = list(package.bases(public.module, public.node))[1:]
    own = {name for _, each in ancestors for name in Doc.of(each).described}
    return own | {name for _, each in ancestors for name, (_, said) in public_fields(each).items() if said}


# Checks: each gives a line per fault


def wrong_arguments(package: Package, public: Public) -> Iterator[str]:
    """Every parameter and field is described, and no other.

    In `Args:`, `Attributes:`, or a string below the field; by "arguments as in `f`"; or, where there are no `Args:` and
    three parameters at most, by its name in backticks. What an ancestor describes need not be described again.
    """
    if not public.doc.text:
        yield f"{public}: no docstring"
    for name, (_, said) in described(package, public).items():
        if not said and name not in inherited(package, public):
            yield f"{public}: {name} is not described"
    known = set(described(package, public)) | inherited(package, public)
    if isinstance(public.node, ast.ClassDef):
        known |= {*functions(public.node), *re.findall(r"self\.(\w+)", ast.unparse(public.node))}
        for base in getattr(public_class(public.name), "__mro__", ()):  # those of other packages, too
            known |= set(getattr(base, "__annotations__", {}))
    for name in public.doc.described:
        if name not in known:
            yield f"{public}: {name} is described, and is none of its parameters or fields"


def public_class(name: str) -> object:
    import crosslens.crosscoders

    return getattr(crosslens.crosscoders, name, None) or (getattr(cl, name) if name in cl.__all__ else None)


def wrong_shapes(package: Package, public: Public) -> Iterator[str]:
    """Arrays have a shape in their type or description, of letters that are explained.

    Tables say what a row is and name their columns; a column with an underscore is a name that the code makes.
    """
    told = set(LETTERS)
    module = ast.get_docstring(package.trees[public.module]) or ""
    for text in (module, public.doc.text, (ast.get_docstring(public.owner) or "") if public.owner else ""):
        for legend in re.findall(r"Letters: (.+?)\.(?:\s|$)", text, re.S):
            told |= set(re.findall(r"\b[A-Z]\b", legend))
    types = described(package, public)
    returned = public.doc.sections.get("Returns") or public.doc.sections.get("Yields") or public.doc.text
    returned = re.sub(rf"(`\w+`) {SHAPE.pattern}", r"\1", returned)  # that is the shape of a parameter
    if isinstance(public.node, ast.FunctionDef):
        types["what it returns"] = (public.node.returns, returned)
    for name, (annotation, said) in types.items():
        shapes, bare = package.arrays(public.module, annotation)
        if bare and re.search(rf"`{name}`", public.doc.body) and "Args" not in public.doc.entries:
            said = "".join(re.findall(rf"`{name}` \(.*?\)", words(public.doc.body)))
        if bare and not SHAPE.search(said) and "scalar" not in said and name not in inherited(package, public):
            yield f"{public}: no shape of {name}"
        for letter in sorted({each for shape in shapes for each in re.findall(r"\b[A-Z]\b", shape)} - told):
            yield f"{public}: the letter {letter} of {name} is not explained"
    if is_table(public):
        if not re.search(r"\b(row per|row for every|(one|a) row each|one row for)\b", words(public.doc.text), re.I):
            yield f"{public}: does not say what a row is"
        columns = re.findall(r"(?<![\w/`.(])[a-z]\w*(?:/<\w+>)?(?=,|;| and | \()", returned)
        if len(columns) < 3:
            yield f"{public}: does not name the columns"
        for column in re.findall(r"\b[a-z]+_(?!i?s?\b)\w+\b(?![/(])", re.sub(r"`[^`]*`", "", returned)):
            if column not in package.strings and not any(
                {column[:i], column[i:]} <= package.strings for i in range(1, len(column))
            ):
                yield f"{public}: no code makes a column {column}"


def is_table(public: Public) -> bool:
    node = public.node
    return isinstance(node, ast.FunctionDef) and bool(node.returns) and ast.unparse(node.returns) == "pd.DataFrame"


def wrong_units(package: Package, public: Public) -> Iterator[str]:
    """Numbers are described by a word for their unit or meaning; columns of some names, too."""
    types = described(package, public)
    if isinstance(public.node, ast.FunctionDef):
        types[public.node.name] = (public.node.returns, public.doc.text)
    for name, (annotation, said) in types.items():
        kinds = set(re.findall(r"\w+", ast.unparse(annotation))) if annotation else set[str]()
        if not kinds & NUMBERS or "dict" in kinds or re.fullmatch(NO_UNIT, name):
            continue
        if not said and name in inherited(package, public):
            continue
        accepted = next((accepted for names, accepted in UNITS.items() if re.fullmatch(names, name)), None)
        if accepted is None:
            yield f"{public}: {name} is a number that UNITS does not know"
        elif not re.search(rf"(?<!\w)(?:{accepted})(?!\w)", words(said)):
            yield f"{public}: no unit of {name}"
    if is_table(public):
        table = public.doc.sections.get("Returns") or public.doc.text
        text = public.doc.text + (ast.get_docstring(package.trees[public.module]) or "")
        for names, accepted in COLUMNS.items():
            named_so = re.search(rf"(?<![\w/(`])(?:{names})(?=[,;.]| and | \()", table)
            if named_so and not re.search(rf"(?<!\w)(?:{accepted})", text):
                yield f"{public}: no unit of the column {names}"


def wrong_errors(package: Package, public: Public) -> Iterator[str]:
    """What may raise UserError, itself or in what it calls by name, says so and says when.

    In `Raises:`, or by "errors as in `f`". A class answers for its properties, and for its methods where it says so;
    a constructor that is inherited is described where it is defined.
    """
    node, doc = public.node, public.doc
    said = dict(doc.entries.get("Raises", {}))
    if isinstance(node, ast.FunctionDef):
        makers = [node]
        of_class = Doc.of(public.owner).entries.get("Raises", {}).get("UserError", "") if public.owner else ""
        if "every method" in of_class or (of_class and decorators(node) & {"property", "cached_property"}):
            said.setdefault("UserError", of_class)
        for other in others(package, public, "errors"):
            said |= other.doc.entries.get("Raises", {})
    else:
        makers = [each for _, each, owner in package.constructors(public.module, node)
                  if owner is node or not is_public(owner.name)]  # fmt: skip
    may_raise = any(id(each) in package.raising for each in makers)
    if str(public) in NEVER and (not may_raise or "UserError" in said):
        yield f"{public}: take it out of NEVER"
    elif str(public) not in NEVER and may_raise and "UserError" not in said:
        yield f"{public}: may raise UserError, and does not say so"
    for error, when in said.items():
        as_other = re.match(r"as (?:in )?`([\w.]+)`", when)
        if as_other:
            other = named(package, public, as_other[1])
            if not other or error not in other.doc.entries.get("Raises", {}):
                yield f"{public}: raises {error} as {as_other[1]}, which does not say when"
        elif len(when.split()) < 3:
            yield f"{public}: does not say when it raises {error}"


def wrong_sources(package: Package, public: Public) -> Iterator[str]:
    """A module that computes is known, each of its docstrings has a source, and papers are cited by their number."""
    short = public.module.removeprefix("crosslens.")
    if (short in COMPUTES) == (short in OTHERS):
        yield f"{public}: {short} must stand in one of COMPUTES and OTHERS"
    parts = [package.trees[public.module], public.node, *([public.owner] if public.owner else [])]
    text = words("\n".join(ast.get_docstring(part) or "" for part in parts))
    if short in COMPUTES and not any(source in text for source in COMPUTES[short]):
        yield f"{public}: no source"
    for name, number in re.findall(r"(\w+ et al\.),? \(?(?:arXiv )?(\d{4}\.\d{5})", text):
        if SOURCES.get(name) != number:
            yield f"{public}: {name} is not arXiv {number}"
    for name in re.findall(r"\w+ et al\.", text):
        if name not in SOURCES:
            yield f"{public}: {name} is no known source"


def unnamed_sources(package: Package, objects: list[Public]) -> Iterator[str]:
    """The sources of a module stand in its docstring, or in that of a public name in it."""
    for short, sources in COMPUTES.items():
        module = f"crosslens.{short}"
        nodes = [each.node for each in objects if each.module == module]
        if not nodes:
            yield f"{short} has no public name: take it out of COMPUTES"
            continue
        text = words("\n".join(ast.get_docstring(node) or "" for node in (package.trees[module], *nodes)))
        for source in sources:
            if source not in text:
                yield f"{short}: {source} is not named"
        for name in (name for name in sources if SOURCES.get(name)):
            if not re.search(rf"{name},? \(?(?:arXiv )?{SOURCES[name]}", text):
                yield f"{short}: {name} is named without arXiv {SOURCES[name]}"


CHECKS = (wrong_arguments, wrong_shapes, wrong_units, wrong_errors, wrong_sources)


# Tests


def public_names() -> dict[str, set[str]]:
    """Public names by the module that they are imported from."""
    names = {module: set(given) for module, given in cl._MODULES.items()}  # pyright: ignore[reportPrivateUsage]
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for module, name in re.findall(r"^::: (crosslens[\w.]*)\.(\w+)$", page.read_text(encoding="utf-8"), re.M):
            if not (ROOT / module.replace(".", "/") / f"{name}.py").exists():  # a module's docstring is shown, too
                names.setdefault(module, set()).add(name)
    return names


@pytest.fixture(scope="module")
def package() -> Package:
    return Package.read()


@pytest.fixture(scope="module")
def objects(package: Package) -> list[Public]:
    return package.public(public_names())


@pytest.mark.parametrize("check", CHECKS)
def test_public_docstrings(check, package: Package, objects: list[Public]):
    assert len(objects) > 200
    faults = [fault for each in objects for fault in check(package, each)]
    assert not faults, "\n".join(["", *faults])


def test_sources_are_named(package: Package, objects: list[Public]):
    faults = list(unnamed_sources(package, objects))
    assert not faults, "\n".join(["", *faults])


GOOD = '''
"""A module. The measure is this project's own. Letters: N prompts."""

def measure(x: Float[Tensor, "N F"], k: int, norms: Tensor, by: str = "size") -> pd.DataFrame:
    """Count the largest.

    Args:
        x: effects.
        k: features to count.
        norms: (F,) decoder norms.
        by: "size" or "sign".

    Returns:
        A row per prompt: prompt, n_largest, effect (in logits).

    Raises:
        UserError: k is larger than the features.
    """
    _check(k)
    return pd.DataFrame({"prompt": 0, "n_largest": 0, "effect": 0.0})

def again(x: Tensor, k: int) -> Tensor:
    """The same of `x` (N, F): (N,). Arguments and errors as in `measure`."""
    _check(k)

def of_result(result: Result) -> None:
    """What `result` says.

    Raises:
        UserError: it says nothing.
    """
    result.silent()

def _check(k):
    if k < 0:
        raise UserError("k")

class Result:
    """What came of it (Ge et al., arXiv 2509.17196).

    Args:
        count: a scalar.

    Attributes:
        share: (F,) shares.
    """

    share: Tensor

    def __init__(self, count: Tensor) -> None:
        self.count = count

    @override
    def silent(self, x):
        raise UserError("silent")
'''


@pytest.mark.parametrize(
    ("check", "old", "new", "fault"),
    [
        (wrong_arguments, "        x: effects.\n", "", "measure: x is not described"),
        (wrong_arguments, "        k: features", "        l: features", "measure: l is described, and is none"),
        (wrong_arguments, "Arguments and errors as in", "Errors as in", "again: k is not described"),
        (
            wrong_arguments,
            "        share: (F,) shares.",
            "        shares: (F,) shares.",
            "Result: share is not described",
        ),
        (
            wrong_arguments,
            '"""The same of `x` (N, F): (N,). Arguments and errors as in `measure`."""',
            "",
            "no docstring",
        ),
        (wrong_shapes, "norms: (F,) decoder", "norms: decoder", "measure: no shape of norms"),
        (wrong_shapes, "`x` (N, F): (N,)", "`x` (N, F)", "again: no shape of what it returns"),
        (wrong_shapes, "`x` (N, F): (N,)", "`x`: (N,)", "again: no shape of x"),
        (wrong_shapes, "a scalar", "a number", "Result: no shape of count"),
        (wrong_shapes, "Letters: N prompts.", "", "measure: the letter N of x is not explained"),
        (wrong_shapes, "A row per prompt: prompt", "prompt", "measure: does not say what a row is"),
        (wrong_shapes, ": prompt, n_largest, effect (in logits)", "", "measure: does not name the columns"),
        (
            wrong_shapes,
            "prompt, n_largest, effect (in",
            "prompt, n_biggest, effect (in",
            "no code makes a column n_biggest",
        ),
        (wrong_units, "k: features to count", "k: how far to go", "measure: no unit of k"),
        (wrong_units, 'by: str = "size"', 'by: float = "size"', "measure: by is a number that UNITS does not know"),
        (wrong_units, " (in logits)", "", "measure: no unit of the column"),
        (wrong_errors, "        UserError: k is larger than the features.\n", "", "measure: may raise UserError"),
        (wrong_errors, "        UserError: it says nothing.\n", "", "of_result: may raise UserError"),
        (wrong_errors, "k is larger than the features.", "always.", "measure: does not say when it raises UserError"),
        (
            wrong_errors,
            "UserError: k is larger than the features.",
            "UserError: as `again`.",
            "which does not say when",
        ),
        (wrong_errors, "Arguments and errors as in", "Arguments as in", "again: may raise UserError"),
        (wrong_sources, "The measure is this project's own. ", "", "measure: no source"),
        (wrong_sources, "2509.17196", "2509.05291", "Result: Ge et al. is not arXiv 2509.05291"),
        (wrong_sources, "Ge et al., arXiv 2509.17196", "Gee et al.", "Result: Gee et al. is no known source"),
    ],
)
def test_checks_find_faults(check, old: str, new: str, fault: str):
    def faults(source: str) -> list[str]:
        package = Package({"crosslens.evolution.phases": source})
        objects = package.public({"crosslens.evolution.phases": {"measure", "again", "of_result", "Result"}})
        assert [each.name for each in objects] == ["Result", "again", "measure", "of_result"]
        return [found for each in objects for found in check(package, each)]

    assert GOOD.count(old) == 1
    assert faults(GOOD) == []
    assert any(fault in found for found in faults(GOOD.replace(old, new)))


def test_module_that_is_in_no_list():
    package = Package({"crosslens.new": GOOD})
    public = package.public({"crosslens.new": {"measure"}})[0]
    assert list(wrong_sources(package, public)) == [
        "crosslens.new.measure: new must stand in one of COMPUTES and OTHERS"
    ]

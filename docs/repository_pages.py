"""The repository as pages of a site: which files there are, how they link, what a notebook shows.

A Sphinx extension. It copies README, notebooks and guides into Sphinx's source folder with their
places relative to each other as they are, so that links work on GitHub and in the site alike, and
writes a page for each module.
"""

import ast
import importlib
import inspect
import json
import os
import re
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from fastcore.docments import docments
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util.logging import getLogger

ROOT = Path(__file__).resolve().parents[1]
logger = getLogger(__name__)
_parser = ConfigParser(delimiters=["="])
_parser.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = _parser["DEFAULT"]
ADDRESS, VERSION = SETTINGS["git_url"], SETTINGS["version"]

# -- which pages there are -----------------------------------------------------------------------

# First number of a notebook and the caption of its group, in the order of the sidebar.
GROUPS = {"3": "Tutorials", "0": "Components", "1": "Figures", "2": "Benchmarks"}
FIRST = ("figures", "extending", "scaling", "history_format", "environments", "troubleshooting")


def notebooks(root: Path = ROOT) -> dict[str, list[Path]]:
    "The notebooks of each group. Raises `ValueError` for a number that belongs to none."
    found = {caption: [] for caption in GROUPS.values()}
    for path in sorted((root / "nbs").glob("*.ipynb")):
        if path.name[0] not in GROUPS:
            raise ValueError(f"{path.name} is in no group: add its first digit to GROUPS")
        found[GROUPS[path.name[0]]].append(path)
    return found


def guides(root: Path = ROOT) -> list[Path]:
    "The Markdown pages of docs/, those of `FIRST` before the others, and of the root."
    place = {name: number for number, name in enumerate(FIRST)}
    pages = (root / "docs").glob("*.md")
    pages = sorted(pages, key=lambda path: (place.get(path.stem, len(FIRST)), path.stem))
    return [*pages, root / "CONTRIBUTING.md", root / "CHANGELOG.md"]


def modules(root: Path = ROOT) -> list[str]:
    "The names of the package's modules, in the order of the notebooks that define them."
    order = {}
    for path in (root / "gla_nb").glob("[!_]*.py"):
        source = re.search(r"File to edit: \.\./nbs/(\S+\.ipynb)", path.read_text("utf-8"))
        order[path.stem] = source[1] if source else path.stem
    return sorted(order, key=order.get)


def toctree(caption: str, documents: list[str]) -> str:
    "A hidden table of contents, which fills the sidebar."
    lines = "\n".join(documents)
    return f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"


def contents(root: Path = ROOT) -> str:
    "All tables of contents, to be put at the end of the index."
    names = [path.relative_to(root).with_suffix("").as_posix() for path in guides(root)]
    text = toctree("Guides", names)
    for caption, paths in notebooks(root).items():
        if paths:
            text += toctree(caption, [f"nbs/{path.stem}" for path in paths])
    return text + toctree("API", [f"api/{name}" for name in modules(root)])


# -- what a notebook shows -----------------------------------------------------------------------

DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
HIDDEN = re.compile(r"^#\|\s*hide\s*$", re.M)


def only_imports(code: str) -> bool:
    "Whether a cell does nothing but import."
    try:
        return all(isinstance(line, ast.Import | ast.ImportFrom) for line in ast.parse(code).body)
    except SyntaxError:  # a line that only IPython knows
        return False


def shown(notebook: dict) -> dict:
    "The notebook without nbdev's directives and the cells that they hide; imports are folded."
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            text = DIRECTIVE.sub("", source).strip("\n")
            if HIDDEN.search(source) or not text:
                continue
            folded = {"tags": ["hide-input"]} if only_imports(text) else {}
            cell = cell | {"source": text, "metadata": cell["metadata"] | folded}
        cells.append(cell)
    return notebook | {"cells": cells}


# -- a page for each module ----------------------------------------------------------------------


def constant_comments(module) -> dict[str, str]:
    "What the comment at the end of the line says of each constant of a module."
    source = inspect.getsource(module)
    lines, comments = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            comment = re.search(r"  # (.*)", lines[node.end_lineno - 1])
            for name in [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]:
                comments.setdefault(name, comment[1] if comment else "")
    return comments


def constant(name: str, value, comment: str) -> str:
    "The entry of a constant, with its value where that is short."
    shown = repr(value)
    lines = [f".. py:data:: {name}"]
    if len(shown) <= 60 and " at 0x" not in shown:
        lines.append(f"   :value: {shown}")
    return "\n".join([*lines, "", f"   {comment}", ""])


def entry(module, name: str, comments: dict) -> str:
    "The directive that documents one public name."
    thing = getattr(module, name)
    if inspect.isclass(thing):
        return f".. autoclass:: {name}\n   :members:\n"
    if callable(thing):
        return f".. autofunction:: {name}\n"
    return constant(name, thing, comments.get(name, ""))


def module_page(name: str) -> str:
    "The page of one module: what it is, a list of what it defines, and each with its docstring."
    module = importlib.import_module(f"gla_nb.{name}")
    source = re.search(r"File to edit: \.\./nbs/(\S+)\.ipynb", inspect.getsource(module))[1]
    callables = [n for n in module.__all__ if callable(getattr(module, n))]
    summary = "".join(f"   {n}\n" for n in callables)
    comments, title = constant_comments(module), f"gla_nb.{name}"
    entries = "\n".join(entry(module, n, comments) for n in module.__all__)
    return (
        f"{title}\n{'=' * len(title)}\n\n.. automodule:: gla_nb.{name}\n   :no-members:\n\n"
        f"Defined, explained and tested in :doc:`{source} <../nbs/{source}>`.\n\n"
        f".. autosummary::\n   :nosignatures:\n\n{summary}\n{entries}"
    )


def add_comments(app, what, name, thing, options, lines):
    "Comments beside parameters and fields become their documentation."
    if what not in ("class", "function", "method"):
        return
    comments = {k: v for k, v in docments(thing).items() if v and k not in ("return", "self")}
    if comments:
        lines += ["", *(f":param {k}: {' '.join(v.split())}" for k, v in comments.items()), ""]


def public_names() -> dict[str, str]:
    "`gla_nb.module.name` for each public name that only one module has."
    found = {}
    for module in modules():
        for name in importlib.import_module(f"gla_nb.{module}").__all__:
            found.setdefault(name, []).append(f"gla_nb.{module}.{name}")
    return {name: places[0] for name, places in found.items() if len(places) == 1}


def known_name(role, rawtext, text, line, inliner, options=None, content=None):
    "`text` as code, and as a link where it is unmistakably a name that this site documents."
    code = nodes.literal(rawtext, text)
    target = inliner.document.settings.env.app.public_names.get(text.removesuffix("()"))
    # One lower-case word may as well be that of a parameter.
    if target is None or re.fullmatch("[a-z]+", text):
        return [code], []
    kinds = {"refdomain": "py", "reftype": "obj", "refexplicit": True, "refwarn": True}
    place = inliner.document.settings.env.docname
    return [addnodes.pending_xref(rawtext, code, reftarget=target, refdoc=place, **kinds)], []


# -- the source folder ---------------------------------------------------------------------------


def write(path: Path, content: bytes):
    "Write a file that is not the same already: Sphinx reads again what is newer."
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def sources(root: Path = ROOT) -> dict[str, bytes]:
    "All files of the source folder by their path in it."
    files = {"index.md": (root / "README.md").read_text("utf-8") + contents(root)}
    files |= {f"{path.relative_to(root)}": path.read_text("utf-8") for path in guides(root)}
    for paths in notebooks(root).values():
        for path in paths:
            notebook = shown(json.loads(path.read_text("utf-8")))
            files[f"nbs/{path.name}"] = json.dumps(notebook)
    files |= {f"api/{name}.rst": module_page(name) for name in modules(root)}
    files = {name: text.encode() for name, text in files.items()}
    pictures = (
        p for end in ("png", "svg", "gif", "webp") for p in (root / "outputs").rglob(f"*.{end}")
    )
    return files | {f"{path.relative_to(root)}": path.read_bytes() for path in pictures}


def stage(app):
    "Bring the source folder up to date; what has gone from the repository goes there too."
    files = sources()
    for name, content in files.items():
        write(Path(app.srcdir) / name, content)
    for path in Path(app.srcdir).rglob("*"):
        if path.is_file() and path.relative_to(app.srcdir).as_posix() not in files:
            path.unlink()
    app.public_names = public_names()


# -- links ---------------------------------------------------------------------------------------


class RepositoryLinks(SphinxTransform):
    "Links to the README lead to the index, those to files that are no pages to GitHub; no badges."

    default_priority = 100

    def apply(self):
        for picture in list(self.document.findall(nodes.image)):
            if "://" in picture["uri"]:  # a badge of another host: its words stay
                picture.replace_self(nodes.Text(picture.get("alt", picture["uri"])))
        here = (ROOT / self.env.docname).parent
        for link in list(self.document.findall(addnodes.pending_xref)):
            if link.get("reftype") != "myst" or link.get("refdomain"):
                continue
            target, _, anchor = link["reftarget"].partition("#")
            path = Path(os.path.normpath(here / target))
            if path == ROOT / "README.md":
                link["refdomain"], link["reftarget"], link["reftargetid"] = "doc", "index", anchor
            elif target and path.exists() and path.is_relative_to(ROOT):
                kind = "tree" if path.is_dir() else "blob"
                address = f"{ADDRESS}/{kind}/main/{path.relative_to(ROOT).as_posix()}"
                address += f"#{anchor}" if anchor else ""
                link.replace_self(nodes.reference("", "", *link.children, refuri=address))


def visit_math(translator, node):
    "Formulas as MathML, which browsers draw without a script; warns of those that are not LaTeX."
    block = isinstance(node, nodes.math_block)
    try:
        formula = convert(node.astext(), display="block" if block else "inline")
        fault = ", ".join(re.findall(r"\\[a-zA-Z]+", formula))  # what it does not know it keeps
    except Exception as error:
        formula, fault = node.astext(), type(error).__name__
    if fault:
        logger.warning("formula %r: %s", node.astext(), fault, location=node)
    translator.body.append(f'<div class="formula">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app):
    app.connect("builder-inited", stage)
    app.connect("autodoc-process-docstring", add_comments)
    app.add_role("known_name", known_name)
    app.add_transform(RepositoryLinks)
    both = {"inline_renderers": (visit_math, None), "block_renderers": (visit_math, None)}
    app.add_html_math_renderer("mathml", **both)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

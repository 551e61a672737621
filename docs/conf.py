"Sphinx: the README, the notebooks, the API and the pages of this folder as one site. `make docs`."

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]

from repository_pages import ADDRESS, ROOT, SETTINGS, VERSION  # noqa: E402

project, author, release = "gla_nb", SETTINGS["author"], VERSION
copyright = author
root_doc = "index"

# No intersphinx, no scripts of other hosts: the site is built, and read, without a network.
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "repository_pages"]
nitpicky = True
# What other libraries document is not linked.
nitpick_ignore_regex = [(r"py:.*", r"(?!gla_nb\.)\w+\..*")]
# Sphinx sees no more than their last name.
nitpick_ignore = [("py:class", name) for name in ("Axes", "Figure", "SummaryWriter", "VecEnv")]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 6  # links to headings are written as on GitHub
suppress_warnings = ["myst.header"]  # notebooks may go from # to ###, as GitHub lets them
myst_update_mathjax = False
nb_execution_mode = "off"
nb_merge_streams = True
# Widgets live in Jupyter alone: their other outputs are shown, and no script is loaded for them.
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
nb_code_prompt_show = nb_code_prompt_hide = "Imports"  # nothing else is folded

smartquotes = False  # they would change "" and -- in text that is meant literally
default_role = "known_name"  # `words` in docstrings: a link where we document them, else code
autodoc_inherit_docstrings = False  # those of gymnasium and torch are not written for this site
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"gla_nb {VERSION}"
html_math_renderer = "mathml"
html_static_path = [str(ROOT / "docs" / "static")]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "source_repository": ADDRESS,
    "source_branch": "main",
    "source_directory": "",
    "top_of_page_buttons": [],
    "footer_icons": [],
}

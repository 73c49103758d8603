"Sphinx settings: everything local, no request leaves the page; `docs/build.py` runs it"
import configparser
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

ini = configparser.ConfigParser(delimiters=["="])
ini.read(Path(__file__).parents[1]/"settings.ini")
d = ini["DEFAULT"]

project, author, copyright, release = d["lib_name"], d["author"], d["copyright"], d["version"]
extensions = ["myst_nb"]
exclude_patterns = ["generated/*"] # parts of other pages
html_theme = "furo"
html_title = f"{project} {release}"
html_show_sphinx = False
html_copy_source = html_show_sourcelink = False
html_math_renderer = "mathml"
html_theme_options = dict(navigation_with_keys=True)
html_static_path = ["_static"]
html_css_files = ["site.css"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
myst_dmath_double_inline = False
nb_execution_mode = "off" # stored outputs; the page of the ideas asks for a run of its own
nb_execution_raise_on_error = True
nb_output_stderr = "remove"
nb_ipywidgets_js = {} # else every page asks a network for widget code
html_show_search_summary = False # a page opened from a file may not fetch others
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]


def mathml(self, node):
    "A formula as MathML, which browsers draw themselves: no script, no fonts"
    self.body.append(convert(node.astext(), display="block" if isinstance(node, nodes.math_block) else "inline"))
    raise nodes.SkipNode


def setup(app): app.add_html_math_renderer("mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None))

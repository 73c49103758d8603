"The documentation site from the notebooks, without Quarto and without a network: `make docs`"
import argparse
import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SRC, OUT = ROOT/"docs/_build/src", ROOT/"docs/_build/html"
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]*)\)") # to a file
SHOWN = (".md", ".png", ".svg") # of a report


def write(name, text):
    (SRC/name).parent.mkdir(parents=True, exist_ok=True)
    (SRC/name).write_text(text, encoding="utf-8")


def source(cell): return "".join(cell["source"])


def plain(text, n=200):
    "Prose without marks, for where no marks can be"
    words = re.sub(r"[#*`>|\[\]]|\([^)]*\.\w+\)", "", text).split()
    return " ".join(words)[:n]


def head_of(cells):
    "Title and one-line summary of a notebook"
    first = source(cells[0])
    return re.search(r"^# (.+)", first, re.M)[1], (re.search(r"^> (.+)", first, re.M) or [0, ""])[1]


def notebook_page(path, name):
    "A notebook as the site shows it: no directives, no hidden cells, outputs as stored"
    nb = json.loads(path.read_text(encoding="utf-8"))
    title, summary = head_of(nb["cells"])
    cells, said = [], ""
    for c in nb["cells"]:
        text = source(c)
        if c["cell_type"] == "markdown": said = text
        if c["cell_type"] == "code" and (re.match(r"#\|\s*(hide|default_exp)\b", text) or not text.strip()): continue
        if c["cell_type"] == "code": c = c | dict(source=DIRECTIVE.sub("", text), execution_count=None)
        alt = f"Figure: {plain(said)}" # a figure's claim stands in the cell above it
        pictured = any("image/png" in o.get("data", {}) for o in c.get("outputs", []))
        cells.append(c | dict(metadata=dict(mystnb=dict(image=dict(alt=alt))) if pictured else {}))
    meta = dict(kernelspec=dict(name="python3", display_name="python3", language="python"), language_info=dict(name="python"))
    write(name, json.dumps(dict(cells=cells, metadata=meta, nbformat=4, nbformat_minor=5)))
    return title, summary


def toc(entries, hidden=False): return "```{toctree}\n:maxdepth: 1\n" + (":hidden:\n" if hidden else "") + "\n".join(entries) + "\n```\n"


def library():
    "One page a library notebook, in reading order"
    rows, names = [], []
    for path in sorted((ROOT/"nbs").glob("[0-9]*.ipynb")):
        title, summary = notebook_page(path, f"library/{path.name}")
        rows.append(f"| [{path.stem}]({path.stem}) | {summary} |")
        names.append(path.stem)
    write("library/index.md", "# The library, read from 00 up\n\nEach chapter is a notebook and a module: what stands in it is what runs. A chapter uses only chapters before it.\n\n"
          "| chapter | what it holds |\n| --- | --- |\n" + "\n".join(rows) + "\n\n" + toc(names, hidden=True))


def stages():
    "One page a stage notebook"
    names = []
    for path in sorted((ROOT/"nbs/stages").glob("[0-9]*.ipynb")):
        notebook_page(path, f"stages/{path.name}")
        names.append(path.stem)
    write("stages/index.md", "# Stages\n\nWhat `vtg run` executes, one notebook a stage. In a run folder each lies as it was executed, with its tables and figures.\n\n" + toc(names))


def comments(text):
    "line -> comment behind it"
    return {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}


def cell_text(text): return str(text or "").replace("|", "\\|").replace("\n", " ")
def code_text(text): return f"`{cell_text(text)}`" if text else ""


def function_page(node, notes, owner=""):
    "A function: how it is called, what its arguments are, what comes back"
    a = node.args
    plain = a.posonlyargs + a.args
    defaults = [None]*(len(plain) - len(a.defaults)) + a.defaults
    args = [*zip(plain, defaults), *([(a.vararg, None)] if a.vararg else []), *zip(a.kwonlyargs, a.kw_defaults), *([(a.kwarg, None)] if a.kwarg else [])]
    args = [(p, d) for p, d in args if p.arg != "self"]
    call = ", ".join(p.arg + (f"={ast.unparse(d)}" if d else "") for p, d in args)
    out = [f"### {owner}{node.name}\n", f"```python\n{owner}{node.name}({call})\n```\n", (ast.get_docstring(node) or "") + "\n"]
    last = max([node.lineno, *(p.end_lineno for p, _ in args)])
    end = node.returns.end_lineno if node.returns else node.body[0].lineno - 1
    back = next((notes[n] for n in range(end, last, -1) if n in notes), "") if end > last else ""
    rows = [(p.arg, p.annotation and ast.unparse(p.annotation), d and ast.unparse(d), notes.get(p.end_lineno, "")) for p, d in args]
    if node.returns or back: rows.append(("*returns*", node.returns and ast.unparse(node.returns), "", back))
    if rows:
        out.append("| name | type | default | meaning |\n| --- | --- | --- | --- |")
        out += [f"| {n if n.startswith('*') else f'`{n}`'} | {code_text(t)} | {code_text(d)} | {cell_text(m)} |" for n, t, d, m in rows]
    return "\n".join(out) + "\n"


def class_page(node, notes):
    "A class: its fields and its methods"
    out = [f"### {node.name}\n", (ast.get_docstring(node) or "") + "\n"]
    fields = [f for f in node.body if isinstance(f, ast.AnnAssign)]
    if fields:
        out.append("| field | type | default | meaning |\n| --- | --- | --- | --- |")
        out += [f"| `{f.target.id}` | {code_text(ast.unparse(f.annotation))} | {code_text(f.value and ast.unparse(f.value))} | {cell_text(notes.get(f.end_lineno))} |" for f in fields]
    out += ["\n" + function_page(f, notes, f"{node.name}.") for f in node.body if isinstance(f, ast.FunctionDef) and (f.name == "__init__" or f.name[0] != "_") and f.args.args[1:]]
    return "\n".join(out) + "\n"


def module_page(path, chapter):
    "Everything public of a module, from its docments"
    text = path.read_text(encoding="utf-8")
    tree, notes = ast.parse(text), comments(text)
    out = [f"# {path.stem}\n", f"> {ast.get_docstring(tree) or ''}\n", f"Chapter: [{chapter}](../library/{chapter})\n"]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] == "_": continue
        if isinstance(node, ast.ClassDef): out.append(class_page(node, notes))
        if isinstance(node, ast.FunctionDef):
            first = node.args.args[0] if node.args.args else None
            patched = any("patch" in ast.unparse(d) for d in node.decorator_list) and first and first.annotation
            out.append(function_page(node, notes, f"{ast.unparse(first.annotation)}." if patched else ""))
    return "\n".join(out)


def api():
    "The reference, one page a module, in import order"
    names = []
    for path in sorted((ROOT/"nbs").glob("[0-9]*.ipynb")):
        module = path.stem.split("_", 1)[1]
        if not (ROOT/f"videotg_r1/{module}.py").is_file(): continue
        write(f"api/{module}.md", module_page(ROOT/f"videotg_r1/{module}.py", path.stem))
        names.append(module)
    write("api/index.md", "# Reference\n\nEvery public name with its arguments, made from the comments in the source. Modules import only what stands above them.\n\n" + toc(names))


def settings():
    "Every parameter of every stage, and every field of the settings classes they name"
    from videotg_r1.stages import stage_notebook, stage_params
    out, classes = ["# Settings\n", "A params file has a block for each stage; `shared:` is given to every stage that knows the name. What is not written has the default below, except that\n"
                    "the examples' small data belong to the notebooks alone. A name that nobody knows is refused, with the nearest known one.\n"], {}
    for stage in ("prepare", "reflect", "estimate", "select", "train", "evaluate", "ablation", "data_efficiency"):
        out.append(f"## {stage}\n\n| name | default in the notebook | meaning |\n| --- | --- | --- |")
        for k, p in stage_params(stage_notebook(stage)).items():
            if m := re.search(r"\b([a-z_]+)\.([A-Z]\w*[a-z]\w*)", p.help): classes[m[2]] = m[1]
            out.append(f"| `{k}` | {code_text(json.dumps(p.default))} | {cell_text(p.help)} |")
        out.append("")
    out.append("## Settings classes\n")
    for cls, module in classes.items():
        text = (ROOT/f"videotg_r1/{module}.py").read_text(encoding="utf-8")
        node = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == cls)
        page = class_page(node, comments(text)).split("\n### ")[0]
        out.append(page.replace(f"### {cls}", f"### {module}.{cls}", 1))
    write("settings.md", "\n".join(out))


def commands():
    "What `vtg --help` says, all of it"
    from videotg_r1.cli import parser
    out = ["# Commands\n", "What each verb takes. [Troubleshooting](troubleshooting) has the exit codes.\n"]
    verbs = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, p in verbs.choices.items():
        out.append(f"## vtg {name}\n\n{p.description % {} if '%' in p.description else p.description}\n\n| argument | meaning |\n| --- | --- |")
        for a in p._actions:
            if a.dest == "help": continue
            flag = ", ".join(a.option_strings) or a.metavar or a.dest
            out.append(f"| `{flag}` | {cell_text(a.help).replace('%%', '%')} |")
        out.append("")
    write("commands.md", "\n".join(out))


def explore():
    "A table of the notebooks to play with, for the page that includes it"
    rows = []
    for path in sorted((ROOT/"nbs/explore").glob("*.ipynb")):
        rows.append(f"| `nbs/explore/{path.name}` | {head_of(json.loads(path.read_text(encoding='utf-8'))['cells'])[1]} |")
    write("generated/explore.md", "| notebook | what to see there |\n| --- | --- |\n" + "\n".join(rows) + "\n" if rows else "\n")


def report_page(path):
    "A page of reports/ as it was written; a link to what the site does not show becomes its text"
    def link(m): return m[0] if (path.parent/m[3]).suffix in SHOWN and (path.parent/m[3]).is_file() else m[2]
    write(f"results/{path.relative_to(ROOT/'reports')}", LINK.sub(link, path.read_text(encoding="utf-8")))


def headline(folder):
    "Claim and figure of a report, for the first page"
    text = (ROOT/"reports"/folder/"README.md").read_text(encoding="utf-8")
    claim = next(p for p in text.split("\n\n")[1:] if p.strip() and not p.startswith(("#", "!", "|")))
    write("generated/headline.md", f"{claim}\n\n![Held-out mIoU against the number of training samples](results/{folder}/figure.png)\n\n"
          f"[All of it](results/{folder}/README); what a laptop measures in ten minutes is in the [quick start](results/2026-11-23_quickstart/README).\n")


def results():
    "Committed reports: the evidence, then the others, newest first, and the log"
    names = {p.name for p in (ROOT/"reports").iterdir() if (p/"README.md").is_file()}
    for name in names:
        shutil.copytree(ROOT/"reports"/name, SRC/"results"/name, ignore=lambda d, files: [f for f in files if not (Path(d)/f).is_dir() and Path(f).suffix not in SHOWN])
        report_page(ROOT/"reports"/name/"README.md")
    report_page(ROOT/"reports/LOG.md")
    headline("evidence-headline")
    evidence = sorted((n for n in names if n.startswith("evidence-")), key=lambda n: (n != "evidence-headline", n))
    write("results/index.md", "# Results\n\nEach page is a report as the run wrote it: the claim first, baselines first, intervals, and what did not work.\n\n"
          "## Does it help? Hundreds of small trainings\n\n" + toc([f"{n}/README" for n in evidence])
          + "\n## The quick start, the shipped model, speed and scale\n\n" + toc([f"{n}/README" for n in sorted(names - set(evidence), reverse=True)] + ["LOG"]))


def copied():
    "Pages that live at the root of the repository"
    for name, title in (("CHANGELOG", "changelog"), ("CONTRIBUTING", "contributing"), ("TROUBLESHOOTING", "troubleshooting"), ("SECURITY", "security")):
        path = ROOT/f"{name}.md"
        text = LINK.sub(r"\2", path.read_text(encoding="utf-8")) if path.is_file() else f"# {title.capitalize()}\n\nNothing yet.\n"
        write(f"{title}.md", text)
    for path in (ROOT/"docs").glob("*.md"): shutil.copy(path, SRC/path.name)
    shutil.copytree(ROOT/"slurm", SRC.parent/"slurm", dirs_exist_ok=True)


def build():
    "All pages, then Sphinx; a warning is an error"
    for folder in (SRC, OUT): shutil.rmtree(folder, ignore_errors=True)
    SRC.mkdir(parents=True)
    for step in (copied, library, stages, api, settings, commands, explore, results): step()
    run = subprocess.run([sys.executable, "-m", "sphinx", "-b", "html", "-c", str(ROOT/"docs"), "-W", "--keep-going", "-q", "-d", str(SRC.parent/"trees"), str(SRC), str(OUT)])
    return run.returncode


if __name__ == "__main__": sys.exit(build())

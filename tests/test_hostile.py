"Files, names, parameters and answers made to run somebody's code, to leave their folder, or to be shown as something else"
import ast
import base64
import html.parser
import http.server
import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest

from videotg_r1.config import load_params, scrub
from videotg_r1.plots import one_line, timeline
from videotg_r1.records import Sample, printable, read_samples, safe_name, write_jsonl
from videotg_r1.report import page, readme
from videotg_r1.stages import check_params, check_run, plan_run, run_stage, stage_notebook

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tests/fuzz"))
from targets import TARGETS, drive  # noqa: E402

# ---------------------------------------------------------------- what the package never calls
NEVER = {"eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pickle.load", "pickle.loads", "marshal.loads", "marshal.load", "shelve.open",
         "joblib.load", "dill.load", "dill.loads", "cloudpickle.loads", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "torch.hub.load", "runpy.run_path", "os.execvp", "os.spawnvp",
         "shutil.unpack_archive", "webbrowser.open", "__import__", "builtins.eval", "builtins.exec", "pandas.read_pickle", "pd.read_pickle", "pd.eval"}
PROCESSES = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output", "Popen"}


def complaints(text):
    "What a module calls and must not"
    out = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call): continue
        name, kw = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        said = {k: ast.unparse(v) for k, v in kw.items() if k}
        if name in NEVER or name.endswith((".read_pickle", ".eval_js")): out.append(name)
        if name == "tarfile.open" and not any(isinstance(a, ast.Constant) and str(a.value).startswith("w") for a in [*node.args[1:2], kw.get("mode")]): out.append("tarfile.open that reads")
        if said.get("shell", "False") != "False": out.append(f"{name} with a shell")
        if name in PROCESSES and (isinstance(node.args[0], ast.JoinedStr) or isinstance(node.args[0], ast.Constant)): out.append(f"{name} with a text: {ast.unparse(node.args[0])[:60]}")
        if name == "torch.load" and said.get("weights_only") != "True": out.append("torch.load without weights_only")
        if name in ("np.load", "numpy.load") and said.get("allow_pickle") != "False": out.append("np.load without allow_pickle=False")
        if name == "yaml.load" and (len(node.args) < 2 or ast.unparse(node.args[1]) != "_Loader"): out.append("yaml.load without our loader")
        if said.get("trust_remote_code", "False") != "False": out.append("trust_remote_code")
        if "AutoConfig.from_pretrained" in name or "AutoTokenizer.from_pretrained" in name or "AutoModel" in name:
            if said.get("trust_remote_code") != "False": out.append(f"{name} without trust_remote_code=False")
        if name.endswith("from_pretrained") and "model" in name.lower() and "AutoConfig" not in name and said.get("use_safetensors", "True") != "True": out.append(f"{name} of pickled weights")
        if name == "compile" or name == "builtins.compile": out.append("compile")
        if name.endswith((".Unpickler", "._Unpickler")): out.append(name)
    return out


@pytest.mark.parametrize("bad", ["eval('1')", "import os\nos.system('ls')", "import subprocess\nsubprocess.run('ls', shell=True)", "subprocess.run(f'ls {x}')", "torch.load(p)", "np.load(p)",
                                 "yaml.load(t, yaml.Loader)", "pickle.load(f)", "AutoConfig.from_pretrained(x)", "f(trust_remote_code=flag)", "pickle.Unpickler(f)", "tarfile.open(p)", "tarfile.open(p, mode)"])
def test_the_scan_finds_what_it_looks_for(bad): assert complaints(bad)


@pytest.mark.parametrize("path", sorted((ROOT/"videotg_r1").glob("*.py")), ids=lambda p: p.stem)
def test_no_module_runs_what_it_reads(path): assert complaints(path.read_text()) == []


def test_no_stage_notebook_or_setup_runs_what_it_reads():
    for path in [*(ROOT/"nbs/stages").glob("*.ipynb"), *(ROOT/"nbs/explore").glob("*.ipynb")]:
        for c in json.loads(path.read_text())["cells"]:
            if c["cell_type"] == "code":
                text = "".join(c["source"])
                assert not re.search(r"^\s*[!%]", text, re.M), f"{path.name}: a shell line or a magic"
                assert complaints(text) == [], path.name
    assert complaints((ROOT/"setup.py").read_text()) == []


# ---------------------------------------------------------------- models
def test_code_beside_a_model_never_runs(tmp_path):
    "A folder of weights with code of its own, wired into its config as the hub does"
    import transformers

    from videotg_r1.policy import load_policy
    shutil.copytree(ROOT/"videotg_r1/models/tiny", tmp_path/"m")
    canary = tmp_path/"canary"
    (tmp_path/"m/evil.py").write_text(f"open({str(canary)!r}, 'w').write('ran')\nfrom transformers import Qwen2_5_VLConfig as C, Qwen2_5_VLForConditionalGeneration as M\nclass EvilConfig(C): pass\nclass Evil(M): pass\n")
    cfg = json.loads((tmp_path/"m/config.json").read_text())
    for kind in (cfg["model_type"], "evil_type"):
        (tmp_path/"m/config.json").write_text(json.dumps(cfg | dict(model_type=kind, auto_map=dict(AutoConfig="evil.EvilConfig", AutoModel="evil.Evil", AutoModelForImageTextToText="evil.Evil", AutoTokenizer=["evil.Evil", None]))))
        try: load_policy(str(tmp_path/"m"), device="cpu")
        except (ValueError, OSError) as e: assert kind == "evil_type", e
        assert not canary.exists(), "the code beside the weights ran"
    assert transformers.__version__


def test_pickled_weights_are_refused(tmp_path):
    from videotg_r1.policy import load_policy
    shutil.copytree(ROOT/"videotg_r1/models/tiny", tmp_path/"m", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path/"m/pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path/"canary") + b"'\ntR.")
    with pytest.raises(ValueError, match="safetensors"): load_policy(str(tmp_path/"m"), device="cpu")
    assert not (tmp_path/"canary").exists()


def test_no_params_file_turns_on_remote_code(tmp_path):
    config = load_params(ROOT/"params/smoke.yaml")
    for where in ("shared", "reflect", "evaluate"):
        bad = config | {where: (config.get(where) or {}) | {"trust_remote_code": True}}
        with pytest.raises(ValueError, match="trust_remote_code"): plan_run(bad)
    for where in ("sft", "grpo", "frames"):
        with pytest.raises(ValueError, match="trust_remote_code"): check_params(stage_notebook("train"), {where: {"trust_remote_code": True}})


# ---------------------------------------------------------------- parameters
def test_names_of_parameters_are_never_code(tmp_path):
    canary = tmp_path/"canary"
    code = f"open({str(canary)!r}, 'w').close()"
    names = [f"x=1\n{code}\ny", f"steps;{code}", "__import__('os')", "steps ", " steps", "steps\n", "stеps", "class", "", "a.b", "a[0]", "steps=1", "\0", "STEPS", "ｓteps", "lambda"]
    for name in names:
        with pytest.raises(ValueError): check_params(stage_notebook("train"), {name: 1})
        with pytest.raises(ValueError): run_stage("train", {name: 1}, tmp_path/"run")
        for config in ({"run": "x", name: {}}, {"run": "x", "shared": {name: 1}}):
            with pytest.raises(ValueError): check_run(config)
        if not re.fullmatch(r"\w+", name):
            with pytest.raises(ValueError): check_run({"run": "x", "train": {name: {"method": "sft"}}})
    assert not canary.exists() and not (tmp_path/"run").exists()


HOSTILE_VALUES = ["'''; import os", '"""\nimport os', "\\", "\\'", "{x.__class__}", "{0}", "%s", "\n", "\r", "\u2028", "\0", "${HOME}", "`id`", "$(id)", "#", "__import__('os').system('id')", "\ud7ff", "é\u202e", "-1",
                  [["'"], {"k'\"": "\\"}], {"x=1\nimport os": 1, "'): import os #": [None, True, -1e-300]}, 10**30, 1e308, -0., True, None, [], {}, "x"*100_000]


def test_values_of_parameters_arrive_as_they_were_and_run_nothing():
    "papermill pastes values into the notebook: what it pastes must be a literal, and the same"
    from papermill.translators import PythonTranslator
    for value in HOSTILE_VALUES:
        text = PythonTranslator.codify({"p": value})
        tree = ast.parse(text)
        assign, = [n for n in tree.body if isinstance(n, ast.Assign)]
        assert len(tree.body) == 1 and ast.literal_eval(assign.value) == value, value


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.system ['touch {canary}']", "!!python/object/new:os.system ['touch {canary}']", "a: !!python/name:os.system",
                                  "a: !!python/module:os", "a: !!python/object:subprocess.Popen {{args: [touch, {canary}]}}", "a: &a [x]\nb: [*a, *a]", "<<: {{a: 1}}\n<<: {{a: 2}}",
                                  "%YAML 1.1\n%TAG ! tag:yaml.org,2002:python/\n---\na: !object/apply:os.system [id]"])
def test_yaml_makes_plain_values_only(tmp_path, text):
    (tmp_path/"p.yaml").write_text(text.format(canary=tmp_path/"canary"))
    with pytest.raises(ValueError, match=r"p\.yaml"): load_params(tmp_path/"p.yaml")
    assert not (tmp_path/"canary").exists()


def test_a_billion_laughs_and_a_wall_of_names_cost_nothing(tmp_path):
    t = time.process_time()
    (tmp_path/"p.yaml").write_text("a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}']*9)}]\n" for i in range(1, 10)))
    with pytest.raises(ValueError, match="aliases"): load_params(tmp_path/"p.yaml")
    (tmp_path/"q.yaml").write_text("".join(f"n{i}: 1\n" for i in range(5_000)))
    assert len(load_params(tmp_path/"q.yaml")) == 5_000
    assert time.process_time() - t < 60


# ---------------------------------------------------------------- names
NAMES = ["../x", "../../etc/passwd", "/etc/passwd", "//etc/passwd", "a/../../x", "a/b/../../../x", "..", "./..", "..\\x", "C:\\x", "file:///etc/passwd", "http://127.0.0.1/x", "concat:a|b", "nul\0l", "\0",
         "-rf", "--help", "%2e%2e/x", "..%2fx", "\u2024\u2024/x", "\uff0e\uff0e/x", "..\uff0fx", "CON", "a\nb", "a\x1b[2Jb", "x"*300, "x"*5000, "~root/x", "$HOME/x", "`id`", "link/x", "deep/link", " ", "\u202egnp.exe", "\ud800"]


def test_hostile_names_stay_in_their_folder(tmp_path):
    root = tmp_path/"root"
    (root/"deep").mkdir(parents=True)
    (root/"link").symlink_to("/etc"); (root/"deep/link").symlink_to(tmp_path)
    (tmp_path/"secret.mp4").write_bytes(b"x")
    for name in NAMES:
        made = safe_name(name)
        (tmp_path/"out").mkdir(exist_ok=True); (tmp_path/"out"/made).touch()
        assert (tmp_path/"out"/made).resolve().parent == (tmp_path/"out").resolve()
        write_jsonl(root/"s.jsonl", [dict(qid="q1", vid="v", video=name, duration_s=9, query="x")])
        try: s, = read_samples(root/"s.jsonl", video_root=root)
        except ValueError as e: assert "s.jsonl, line 1" in str(e) and "q1" in str(e) and "\n" not in str(e).replace(name, ""); continue
        assert Path(os.path.realpath(s.video)).is_relative_to(root) if "\0" not in s.video else False, name
    assert len(list((tmp_path/"out").iterdir())) == len(NAMES), "two names share a file"


def test_a_run_cannot_be_named_out_of_its_folder():
    for name in ["../x", "/x", ".", "..", ".hidden", "a/b", "a\\b", "a\0", "", "x"*61, None, ["x"], "a b", "a;b", "$(id)", "x\n"]:
        with pytest.raises(ValueError, match="names the folders"): check_run({"run": name})


# ---------------------------------------------------------------- texts that are shown
EVIL = ["</script><script>document.title='owned'</script>", "<img src=http://evil.invalid/x.png onerror=\"document.title='owned'\">", "<svg onload=document.title='owned'>", "javascript:document.title='owned'",
        "\"><script>document.title='owned'</script>", "' onmouseover='document.title=1", "<!--<script>", "]]><script>document.title='owned'</script>", "&lt;script&gt;", "\u202egnp.exe", "\x1b[31mred\x1b]0;owned\x07",
        "<style>@import 'http://evil.invalid/x.css'</style>", "<meta http-equiv=refresh content='0;url=http://evil.invalid/'>", "<iframe src=http://evil.invalid/></iframe>", "<base href=http://evil.invalid/>",
        "{{7*7}}${7*7}", "[x](javascript:alert(1))", "![x](http://evil.invalid/x.png)", "| a | b |", "\0\u2028\ud7ff", "$\\frac and $5", "\n```\n<script>document.title='owned'</script>",  "<a href=javascript:document.title='owned'>x</a>"]


def hostile_facts(evil):
    "The facts of the committed report with a hostile text in every place that holds a text"
    def poison(o, key=""):
        if isinstance(o, dict): return {k: poison(v, k) for k, v in o.items()}
        if isinstance(o, list): return [poison(v, key) for v in o]
        return f"{evil} {o}" if isinstance(o, str) and key not in ("key", "stage", "verdict") else o
    f = json.loads((ROOT/"reports/2026-11-23_quickstart/metrics.json").read_text())
    f = poison(f) | dict(quarantine=[dict(video=evil, reason=evil, decoder=evil, sha256=evil)])
    look = dict(qid=evil, query=evil, truth=[[1., 2.]], said=[1., 2.], iou=.5, error=evil, reason=f"{evil}: more", raw=evil)
    f["failures"]["samples"] = {k: dict(worst=[look], median=[look]) for k in (f["failures"]["model"], evil)}  # keys of a poisoned dict are its values elsewhere
    return f | dict(cards=dict(results={evil: {evil: evil}}))


class Tags(html.parser.HTMLParser):
    "Every tag of a page with its attributes"
    def __init__(self): super().__init__(); self.tags = []
    def handle_starttag(self, tag, attrs): self.tags.append((tag, {k: v or "" for k, v in attrs}))


PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


@pytest.mark.parametrize("i", range(len(EVIL)))
def test_reports_escape_every_text(i):
    evil = EVIL[i]
    text = page(hostile_facts(evil), {"results": (PNG, evil), "example_1": (PNG, evil)}, {evil: dict(worst=(PNG, evil), median=(PNG, evil))})
    seen = Tags(); seen.feed(text)
    assert {t for t, _ in seen.tags} <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "img", "figcaption", "ul", "li", "pre", "a", "details", "summary", "span", "dl", "dt", "dd"}
    for tag, attrs in seen.tags:
        if tag == "a": assert attrs == {"href": "samples.html"}; continue
        assert not any(k.startswith("on") or k in ("href", "srcset", "action") for k in attrs) and attrs.get("src", "data:image/png;base64,").startswith("data:image/png;base64,"), (tag, attrs)
        assert attrs.get("http-equiv", "Content-Security-Policy") == "Content-Security-Policy"
    assert text.index("default-src 'none'") < text.index("<style>") and "script-src" not in text.split("<body>")[0]
    said, _, again = readme(hostile_facts(evil), {"results": (PNG, evil)}).partition("## How to do it again")
    assert again.count("```") == 2 and not re.search(r"<\s*(script|img|svg|iframe|meta|base|style|a)\b", said, re.I)


def test_a_text_of_ten_megabytes_is_shown_short():
    evil = "<script>"*1_250_000
    assert len(printable(evil)) < 1200 and len(one_line(evil)) < 300
    fig = timeline(4., {"predicted": [(1., 2.)]}, title=evil)
    assert len(fig.axes[0].get_title(loc="left")) < 300
    Sample("q", "v", "", 4., evil)


def test_terminals_show_control_characters_instead_of_obeying(tmp_path, capsys):
    from videotg_r1 import cli
    for evil in EVIL: assert printable(evil).isprintable() and "\x1b" not in printable(evil)
    name = tmp_path/"\x1b]0;owned\x07\u202e a\nb.mp4"
    name.write_bytes(b"no video")
    r = subprocess.run([sys.executable, "-c", "import sys; from videotg_r1.cli import main; sys.exit(main())", "ground", str(name), "x\x1b[31m"], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 2 and r.stderr.count("\n") == 1 and "\x1b" not in r.stderr and "\u202e" not in r.stderr, r.stderr
    assert cli.main(["preflight", str(tmp_path/"\x1b[31m.yaml")]) == 2
    assert "\x1b" not in capsys.readouterr().err


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here: apt-get install chromium runs the browser part of this test")
def test_a_browser_runs_nothing_and_asks_nobody(tmp_path):
    "All hostile texts in one report, opened by a browser whose every request would arrive here"
    asked = []
    class Proxy(http.server.BaseHTTPRequestHandler):
        def answer(self): asked.append(f"{self.command} {self.path}"); self.send_error(404)
        do_GET = do_POST = do_CONNECT = do_HEAD = answer
        def log_message(self, *a): pass
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    evil = " ".join(EVIL).replace("\0", "")
    (tmp_path/"index.html").write_text(page(hostile_facts(evil), {"results": (PNG, evil)}))
    bad = "<title>was fine</title><img src=http://evil.invalid/x onerror=1><script>document.title='owned'</script>"
    (tmp_path/"control.html").write_text(bad)       # shows that this test would see it
    def dom(name):
        r = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
                            f"--user-data-dir={tmp_path}/profile", f"--proxy-server=127.0.0.1:{server.server_address[1]}", "--proxy-bypass-list=<-loopback>", "--virtual-time-budget=3000",
                            "--dump-dom", (tmp_path/name).as_uri()], capture_output=True, text=True, timeout=120)
        return r.stdout
    try: fine, owned = dom("index.html"), dom("control.html")
    finally: server.shutdown(); server.server_close()
    assert "<title>owned</title>" in owned and any("evil.invalid" in o for o in asked)
    asked = [o for o in asked if "evil.invalid" in o]
    assert len(asked) <= owned.count("evil.invalid") + 1, asked
    assert "What did not work" in fine and "<title>owned</title>" not in fine and "<script" not in fine.lower() and "<iframe" not in fine.lower()


# ---------------------------------------------------------------- what is kept
SECRETS = {"HF_TOKEN": "hf" + "_" + "aB3"*9, "WANDB_API_KEY": "0123456789abcdef"*2 + "01234567", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYzz", "MY_PASSWORD": "correct horse battery"}
SHAPED = ["AKIA" + "IOSFODNN7" + "ABCDEFG", "gh" + "p_" + "x1Y2"*9, "github_" + "pat_" + "A1b2"*8, "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0.abc-_", "sk-" + "proj-" + "aZ09"*8, "xoxb-" + "12345678901-abc",
          "https://someone:" + "hunter22" + "@example.org/x.git", "Authorization: Bearer " + "abcdef0123456789.ABC"]


def test_planted_secrets_are_caught_in_a_stage_that_failed(tmp_path, monkeypatch):
    "A stage that prints its environment, logs tokens and dies with one in its traceback"
    for k, v in SECRETS.items(): monkeypatch.setenv(k, v)
    body = f"""import os, sys
os.write(2, repr(dict(os.environ)).encode())
print(dict(os.environ)); print({SHAPED!r})
display(dict(os.environ))
raise RuntimeError("cannot log in with " + os.environ["HF_TOKEN"] + " from " + os.path.expanduser("~/clips"))"""
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    nb.cells = [nbformat.v4.new_code_cell('run_dir = "" # output', metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(body)]
    nbformat.write(nb, tmp_path/"leak.ipynb")
    monkeypatch.setattr(sys, "argv", ["vtg", "stage", str(Path.home()/"x.ipynb"), SECRETS["HF_TOKEN"]])
    with pytest.raises(RuntimeError): run_stage(tmp_path/"leak.ipynb", {}, tmp_path/"run")
    files = [p for p in (tmp_path/"run").rglob("*") if p.is_file()]
    assert {"leak.ipynb", "run.json", "kernel.log", "params.json"} <= {p.name for p in files}
    home = re.compile(re.escape(str(Path.home())) + r"(?![\w-])")
    for p in files:
        text = p.read_text()
        for o in [*SECRETS.values(), "hunter22", *(x for x in SHAPED if "@" not in x and "Bearer" not in x), "abcdef0123456789.ABC"]: assert o not in text, f"{p.name} holds {o}"
        if len(str(Path.home())) > 1: assert not home.search(text), f"{p.name}: {home.search(text)}"
    assert "[secret]" in (tmp_path/"run/leak.ipynb").read_text() and "[secret]" in (tmp_path/"run/kernel.log").read_text()
    nbformat.read(tmp_path/"run/leak.ipynb", 4)


def test_what_is_committed_holds_no_secret():
    "What is made by a run and shown around; tests and examples hold made-up ones, to be found"
    found = {}
    for pattern in ("reports/**/*", "params/*", "nbs/stages/*.ipynb", "*.md"):
        for p in ROOT.glob(pattern):
            if not p.is_file() or p.suffix in (".png", ".safetensors", ".mp4"): continue
            text = p.read_text(errors="replace")
            if (clean := scrub(text, {})) != text: found[str(p.relative_to(ROOT))] = next(a for a, b in zip(text.splitlines(), clean.splitlines()) if a != b)[:200]
    assert not found


# ---------------------------------------------------------------- inputs nobody would write
@pytest.mark.parametrize("target", list(TARGETS), ids=lambda t: t.__name__)
def test_parsers_on_a_slice_of_make_fuzz(target): assert drive(target, 60) >= 30


@pytest.mark.parametrize("argv, words", [(("100",), "1000 or more, got 100"), (("--grpo", "20"), "100 or more, got 20"), (("--seconds", "0.1"), "give it more --seconds")])
def test_a_soak_too_short_for_a_slope_says_so(argv, words):
    r = subprocess.run([sys.executable, str(ROOT/"tests/fuzz/soak.py"), *argv], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert r.returncode and words in r.stderr and "Traceback" not in r.stderr, r.stderr

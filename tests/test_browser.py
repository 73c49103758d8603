"""Pages and explore notebooks in a real browser: clicks, keys, hostile texts, narrow and dark, nothing asked of the network.
Needs `pip install playwright` (the extra `browser`) and Debian's chromium, and is skipped where either is missing.
VTG_EXPLORE=1 runs every explore notebook in JupyterLab, not only the first; VTG_SHOTS=FOLDER keeps screenshots."""
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from videotg_r1.browser import browser_page, hidden_at_first, sample_rows, write_browser
from videotg_r1.curriculum import Curriculum, CurriculumConfig
from videotg_r1.evaluation import sample_scores
from videotg_r1.ledger import Ledger
from videotg_r1.records import Sample, read_samples, write_atomic, write_jsonl, write_samples
from videotg_r1.report import build_report
from videotg_r1.timeline import Frame, timeline_page
from videotg_r1.two_runs import explain, write_explanation

sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser]' runs the browser tests")
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no chromium: apt-get install chromium runs the browser tests")

ROOT = Path(__file__).parents[1]
VIDEOS = ROOT/"tests/data/world/videos"
EXPLORE = sorted((ROOT/"nbs/explore").glob("*.ipynb"))
EVIL = "</script><script>window.__xss=1</script><img src=x onerror=window.__xss=1> \u202e'q' \"s\" & $5 \\frac and $6 \u0000\u2028"
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
TIMEOUT = 60_000


@pytest.fixture(scope="module") # not session: another file may start a playwright of its own
def chromium():
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield b
        b.close()


@pytest.fixture
def opened(chromium, request):
    "Function that opens a page and, at the end, insists that nothing went wrong and nothing was asked of anybody"
    contexts, wrong, asked = [], [], []
    def open_page(url=None, width=1300, height=900, scheme="light", allow="file://", **more):
        c = chromium.new_context(viewport=dict(width=width, height=height), color_scheme=scheme, **more)
        contexts.append(c)
        page = c.new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: None if r.url.startswith((allow, allow.replace("http", "ws"), "data:", "blob:", "about:")) else asked.append(r.url))
        if url: page.goto(url)
        return page
    yield open_page
    for i, c in enumerate(contexts):
        for page in c.pages:
            assert page.evaluate("window.__xss === undefined")
            if folder := os.environ.get("VTG_SHOTS"): page.screenshot(path=f"{folder}/{request.node.name.replace('/', '_')}_{i}.png", full_page=True)
        c.close()
    assert wrong == [] and asked == []


def seeked(video, want):
    "Wait until the video has arrived, not for a time"
    video.evaluate("v => v.seeking && new Promise(r => v.addEventListener('seeked', r, {once: true}))")
    assert abs(video.evaluate("v => v.currentTime") - want) < .05


def loaded(video): video.evaluate("v => v.readyState >= 1 || new Promise((ok, no) => { v.addEventListener('loadedmetadata', ok); v.addEventListener('error', () => no(Error('cannot play'))) })")


TRACKS = {"true": [(.5, 4.5)], "predicted": [(11.5, 15.), (12., 13., EVIL)], "proposed": []}


@pytest.mark.parametrize("how", ["inside", "linked", "frame"])
def test_click_and_enter_seek(how, opened, tmp_path):
    video = shutil.copy(VIDEOS/"train_00000.mp4", tmp_path/"a #1%.mp4")
    doc = timeline_page(EVIL, video, 16., TRACKS, folder=tmp_path if how == "linked" else None)
    if how == "frame": doc = "<!doctype html><meta charset=utf-8>" + Frame(doc, text=EVIL)._repr_html_()
    (tmp_path/"page.html").write_text(doc)
    page = opened((tmp_path/"page.html").as_uri(), 700, 620)
    root = page.frame_locator("iframe") if how == "frame" else page
    video = root.locator("video").first
    loaded(video)
    root.locator("[data-start='11.5']").click()
    seeked(video, 11.5)
    sync.expect(root.locator(".status")).to_contain_text("predicted: 11.5 to 15 s")
    root.locator("[data-start='0.5']").focus()
    page.keyboard.press("Enter")
    seeked(video, .5)
    sync.expect(root.locator("canvas[data-done]")).to_be_visible()
    page.keyboard.press("Space")
    video.evaluate("v => !v.paused || new Promise(r => v.addEventListener('play', r, {once: true}))")
    video.evaluate("v => v.paused || new Promise(r => v.addEventListener('pause', r, {once: true}))")
    assert 4.5 <= video.evaluate("v => v.currentTime") < 6, "it stops at the end of the span"
    assert video.evaluate("() => window.__xss === undefined")


def test_a_video_that_cannot_be_played_is_said(opened, tmp_path):
    (tmp_path/"broken.mp4").write_bytes(b"no video at all")
    (tmp_path/"page.html").write_text(timeline_page("q", tmp_path/"broken.mp4", 16., TRACKS))
    page = opened((tmp_path/"page.html").as_uri())
    sync.expect(page.locator(".status")).to_contain_text("cannot play")
    assert page.locator(".span").count() == 3


def many(n, folder):
    "Rows of `n` samples on the videos of the test world, with hostile ones, and their difficulties"
    files = sorted(VIDEOS.glob("*.mp4"))
    samples, said, other, hard, seen = [], [], [], [], []
    for i in range(n):
        text = EVIL if i == 7 else f"query {i} " + "very long "*(60 if i == 9 else 0)
        samples.append(Sample(f"q{i}" if i != 7 else "evil</script>#%", files[i % 9].stem, str(files[i % 9]), 16. if i % 9 < 8 else 24., text.replace("\0", ""), ((2., 6.),), "moving" if i % 3 else "other"))
        q, end = samples[-1].qid, 2.1 + i % 40/10
        said.append(dict(qid=q, raw=EVIL if i == 7 else f"<answer>2.0 to {end:.1f}</answer>", spans=[[2., end]]))
        other.append(dict(qid=q, raw="nothing", spans=[], miss_reason="no_answer"))
        hard.append(dict(qid=q, difficulty=i % 100/100, bin="hard" if i % 100 >= 70 else "easy", ious=[.1, .2], mean_iou=.15))
        seen.append(dict(qid=q, verdict=("keep", "partial", "undecided")[i % 3], reason=EVIL if i == 7 else "why", proposals=[dict(span=[8., 9.], votes=1, p_event=.5)]))
    course = Curriculum(CurriculumConfig(), hard)
    return sample_rows(samples, "held-out", {"zero-shot": other, EVIL: said}, hard, seen, hidden_at_first(samples[:200], course, 10))


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")
    rows = many(3720, folder)
    (folder/"samples.html").write_text(browser_page(rows, f"big {EVIL}", folder, embed_mb=0))
    return folder/"samples.html", rows


def ready(page): page.wait_for_selector("body[data-ready]")
def texts(page, column): return [o.strip() for o in page.locator(f"#list tbody td:nth-child({column})").all_inner_texts()]


def test_thousands_of_samples_open_lazily(big, opened):
    asked = []
    page = opened()
    page.on("request", lambda r: asked.append(r.url))
    t = time.time()
    page.goto(big[0].as_uri())
    ready(page)
    print(f"\n3720 samples, {big[0].stat().st_size/1e6:.1f} MB: {time.time() - t:.2f} s until the list stands")
    assert page.locator("#count").inner_text().startswith("3720 of 3720 samples")
    assert page.locator("#list tbody tr").count() == 50 and page.locator("video").count() == 1
    assert len({u for u in asked if u.endswith(".mp4")}) <= 1, "only the chosen sample's video is read"


def test_filters_and_sorting_are_right(big, opened):
    page, rows = opened(big[0].as_uri()), big[1]
    ready(page)
    iou = lambda r: next(a["iou"] for a in r["answers"] if a["name"] == EVIL)
    def check(n): sync.expect(page.locator("#count")).to_contain_text(f"{n} of 3720 samples")
    page.fill("#iou-from", "0.5")
    check(sum(iou(r) >= .5 for r in rows))
    page.fill("#iou-to", "0.6")
    check(sum(.5 <= iou(r) <= .6 for r in rows))
    page.get_by_role("button", name="clear").click()
    page.fill("#difficulty-from", "0.95")
    page.select_option("#verdict", "partial")
    check(sum(r["difficulty"] >= .95 and r["verdict"] == "partial" for r in rows))
    page.get_by_role("button", name="clear").click()
    page.select_option("#source", "other")
    page.fill("#duration-from", "20")
    check(sum(r["source"] == "other" and r["duration"] >= 20 for r in rows))
    page.get_by_role("button", name="clear").click()
    page.fill("#text", "query 371 ")
    check(1)
    page.fill("#text", "no such words")
    sync.expect(page.locator("#where")).to_have_text("no sample passes these filters")
    assert not page.locator("#detail").is_visible()
    page.get_by_role("button", name="clear").click()
    check(3720)
    for key, column in (("IoU", 2), ("difficulty", 3)):
        page.get_by_role("button", name=key, exact=True).click()
        up = [float(o) for o in texts(page, column)]
        assert up == sorted(up) and page.locator("th[aria-sort=ascending]").count() == 1
        page.get_by_role("button", name=key, exact=True).click()
        down = [float(o) for o in texts(page, column)]
        assert down == sorted(down, reverse=True) and down[0] > up[0]
    page.get_by_role("button", name="verdict", exact=True).click()
    assert set(texts(page, 4)) == {"keep"}
    page.select_option("#model", "zero-shot")
    page.fill("#iou-from", "0.01")
    check(0)


def test_keys_walk_through_the_list(big, opened):
    page = opened(big[0].as_uri())
    ready(page)
    place = lambda: page.evaluate("document.activeElement.getAttribute('aria-rowindex')")
    page.locator("#list tbody tr").first.focus()
    for key, at in (("ArrowDown", "2"), ("ArrowUp", "1"), ("PageDown", "51"), ("End", "3720"), ("Home", "1")):
        page.keyboard.press(key)
        assert place() == at, key
    sync.expect(page.locator("#query")).to_have_text("query 0")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.classList.contains('span')")
    loaded(page.locator("#detail video"))
    page.keyboard.press("Enter")
    seeked(page.locator("#detail video"), 2.)
    page.keyboard.press("Escape")
    assert place() == "1"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("query 12 /")
    assert page.input_value("#text") == "query 12 /"
    page.locator("#after").focus()
    reached = set()
    page.fill("#text", "")
    page.locator("#text").focus()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"iou-from", "difficulty-to", "verdict", "source", "TR", "after"} <= reached, "Tab reaches everything"


def test_hostile_texts_are_only_texts(big, opened):
    page = opened(big[0].as_uri() + "#" + "evil%3C%2Fscript%3E%23%25")
    ready(page)
    sync.expect(page.locator("#query")).to_contain_text("</script><script>window.__xss=1")
    assert "onerror" in page.locator("#answers").inner_text() and "onerror" in page.locator("#findings").inner_text()
    assert page.locator("img").count() == 0
    first = page.locator("#facts").inner_text()
    page.evaluate("location.hash = '#q12'")
    sync.expect(page.locator("#query")).to_have_text("query 12")
    assert page.locator("#facts").inner_text() != first
    page.evaluate("location.hash = '#%E0%A4%A'")
    sync.expect(page.locator("#query")).to_have_text("query 12")


@pytest.mark.parametrize("width", [360, 800, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_every_window(width, scheme, big, opened):
    page = opened(big[0].as_uri() + "#q9", width, 800, scheme)
    ready(page)
    sync.expect(page.locator("canvas[data-done]")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page itself never scrolls sideways"
    for name in ("#text", "#verdict", "#source", "#iou-from"): assert page.locator(name).bounding_box()["width"] > 20
    assert page.evaluate("""() => [...document.querySelectorAll('input, select, button')].every(e => e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())""")
    contrast = """() => { const rgb = s => s.match(/[\\d.]+/g).slice(0, 3).map(v => (v /= 255) <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4);
      const lum = s => { const [r, g, b] = rgb(s); return .2126*r + .7152*g + .0722*b }, page = lum(getComputedStyle(document.body).backgroundColor);
      return [...document.querySelectorAll('.soft, .name, td, th, label, h1, h2, pre')].map(e => lum(getComputedStyle(e).color)).map(l => (Math.max(l, page) + .05)/(Math.min(l, page) + .05)) }"""
    assert min(page.evaluate(contrast)) >= 4.5, "texts are readable"


def test_it_works_inside_a_notebook_s_frame(opened, tmp_path):
    page = browser_page(sample_rows(read_samples(ROOT/"tests/data/world/train.jsonl"), "training"), "six", tmp_path)
    (tmp_path/"page.html").write_text("<!doctype html><meta charset=utf-8>" + Frame(page)._repr_html_())
    root = opened((tmp_path/"page.html").as_uri()).frame_locator("iframe")
    sync.expect(root.locator("body[data-ready='6']")).to_be_attached()
    root.locator("#list tbody tr").nth(2).click()
    loaded(root.locator("#detail video"))
    sync.expect(root.locator("#query")).to_have_text("the purple cross stays still")
    assert root.locator("#list tbody tr").count() == 6


def test_a_small_set_travels_as_one_file(opened, tmp_path):
    samples = read_samples(ROOT/"tests/data/world/train.jsonl")
    (tmp_path/"away").mkdir()
    (tmp_path/"away/samples.html").write_text(browser_page(sample_rows(samples, "training"), "six", tmp_path/"elsewhere"))
    page = opened((tmp_path/"away/samples.html").as_uri(), offline=True)
    ready(page)
    page.locator("#list tbody tr").nth(3).click()
    loaded(page.locator("#detail video"))
    sync.expect(page.locator("canvas[data-done]")).to_be_visible()
    assert not list((tmp_path/"away").glob("*.mp4")), "nothing but the page travels"
    assert page.locator("#list tbody tr").count() == len(samples)


def scored(folder, late):
    "Two models of a run on the videos of the test world, as the stages leave them: `late` seconds late"
    samples = read_samples(ROOT/"tests/data/world/heldout.jsonl")
    done = lambda job, params, **more: [write_atomic(folder/job/f"{k}.json", json.dumps(v)) for k, v in dict(
        params=params, metrics=more.pop("metrics", {}), run=dict(commit="c", code="c", versions={}, seeds={"settings.seed": 0}, command=EVIL, attempts=[dict(started=0., wall_s=1.)])).items()] and write_atomic(folder/job/"SUCCESS", "{}")
    done("prepare", dict(source=EVIL), metrics=dict(train_samples=1, heldout_samples=len(samples)))
    for name in ("heldout", "train"): write_samples(folder/f"prepare/{name}.jsonl", samples)
    for key, by in (("base", 0.), ("grpo", late)):
        said = [[(a + by, e + by) for a, e in s.spans[:1]] for s in samples]
        with Ledger(folder/f"evaluate-{key}/predictions.jsonl", dict(weights=key, samples="s", settings=dict(seed=0), frames=dict(fps=1., decoder=EVIL))) as ledger:
            for s, o in zip(samples, said, strict=True): ledger.append(dict(qid=s.qid, raw=EVIL, spans=o, choice=None, miss_reason=""))
        rows = sample_scores(samples, [dict(qid=s.qid, spans=o, miss_reason="") for s, o in zip(samples, said, strict=True)])
        write_jsonl(folder/f"evaluate-{key}/scores.jsonl", rows)
        mean = sum(r["iou"] for r in rows)/len(rows)
        done(f"evaluate-{key}", dict(model=EVIL), metrics=dict(n=len(rows), videos=3, mIoU=mean, lo=0., hi=1., **{f"R1@{m}": .5 for m in (.3, .5, .7)}))
    return folder


def test_report_and_comparison_fold_out_and_run_nothing(opened, tmp_path):
    a, b = scored(tmp_path/"runs/new", .5), scored(tmp_path/"runs/old", 5.)
    page = opened((build_report(dict(run="new"), a, tmp_path/"report")/"index.html").as_uri(), 900, offline=True)
    cards = page.locator(".cards details")
    assert cards.count() == 2 and not page.locator("dl").first.is_visible()
    page.locator(".cards summary", has_text="GRPO").focus()
    page.keyboard.press("Enter")
    sync.expect(page.locator(".cards details[open] dd", has_text="fps 1.0")).to_be_visible()
    page.locator(".cards summary", has_text="zero-shot").click()
    assert page.locator(".cards details[open]").count() == 1, "one card at a time"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and page.locator("img:not([alt])").count() == 0
    write_browser(a)
    page = opened(write_explanation(explain(a, b), a).as_uri(), 900, scheme="dark", offline=True)
    sync.expect(page.locator(".claim")).to_contain_text("GRPO: mIoU")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and page.locator("details[open]").count() == 1
    page.locator("details[open] a").first.click()
    ready(page)
    sync.expect(page.locator("#facts")).to_contain_text(page.url.split("#")[1])


# JupyterLab

READY = """() => { const p = window.jupyterapp?.shell?.currentWidget, c = p?.sessionContext;
    return p?.revealed !== undefined && c?.isReady && c.session?.kernel?.connectionStatus === 'connected' && c.session.kernel.status === 'idle' }"""
DONE = """() => { const cells = [...window.jupyterapp.shell.currentWidget.content.model.cells].filter(c => c.type === 'code');
    for (const c of cells) for (const o of c.outputs.toJSON()) if (o.output_type === 'error') return {error: o.ename + ': ' + o.evalue};
    return cells.length && cells.every(c => c.executionCount != null && c.executionState === 'idle') && {ok: cells.length} }"""


@contextlib.contextmanager
def jupyter_lab(root, home):
    "JupyterLab on this machine alone: a free port, a token, settings of its own; ends with all that it started"
    token = secrets.token_hex(16)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(os.environ, HOME=str(home), JUPYTER_TOKEN=token, JUPYTER_CONFIG_DIR=f"{home}/config", JUPYTER_DATA_DIR=f"{home}/data", JUPYTER_RUNTIME_DIR=f"{home}/run",
               IPYTHONDIR=f"{home}/ipython", MPLCONFIGDIR=f"{home}/mpl", JUPYTERLAB_SETTINGS_DIR=f"{home}/settings", JUPYTERLAB_WORKSPACES_DIR=f"{home}/spaces",
               HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    for name, values in (("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}), ("notebook-extension/tracker", {"windowingMode": "none"})):
        file = Path(f"{home}/settings/@jupyterlab/{name}.jupyterlab-settings")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    log = open(home/"lab.log", "w")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={root}", "--allow-root",
               "--expose-app-in-browser", "--LabApp.news_url=None", "--LabApp.extension_manager=readonly"]
    process, base = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=root), f"http://127.0.0.1:{port}"
    ask = lambda path, method="GET": urllib.request.urlopen(urllib.request.Request(f"{base}/api/{path}", method=method, headers={"Authorization": f"token {token}"}), timeout=10).read()
    try:
        for _ in range(600):
            assert process.poll() is None, (home/"lab.log").read_text()[-3000:]
            with contextlib.suppress(OSError):
                ask("status")
                break
            time.sleep(.2)
        yield base, token
        for k in json.loads(ask("kernels")): ask(f"kernels/{k['id']}", "DELETE")
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGTERM)
        try: process.wait(20)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("notebooks")
    for p in EXPLORE: shutil.copy(p, root)
    with jupyter_lab(root, tmp_path_factory.mktemp("home")) as found: yield found


@pytest.mark.parametrize("notebook", EXPLORE if os.environ.get("VTG_EXPLORE") else EXPLORE[:1], ids=lambda p: p.stem)
def test_explore_in_jupyterlab(notebook, lab, opened):
    base, token = lab
    page = opened(None, 1200, 1000, allow=base)
    page.goto(f"{base}/lab/tree/{notebook.name}?token={token}&reset")
    page.wait_for_function(READY)
    t = time.time()
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    result = page.wait_for_function(DONE).json_value()
    assert "error" not in result, result
    page.wait_for_function(READY)
    print(f"\n{notebook.stem}: {result['ok']} cells in {time.time() - t:.1f} s")
    outputs = page.evaluate("[...window.jupyterapp.shell.currentWidget.content.model.cells].flatMap(c => c.type == 'code' ? c.outputs.toJSON() : [])")
    assert not [o for o in outputs if o.get("name") == "stderr"], "no warnings for a newcomer"
    sliders = page.locator(".jp-OutputArea .widget-slider .noUi-handle")
    for i in range(sliders.count()):
        box = page.locator(".widget-vbox").filter(has=page.locator(".noUi-handle")).nth(i)
        before = box.locator("img").get_attribute("src")
        sliders.nth(i).scroll_into_view_if_needed()
        sliders.nth(i).focus()
        last = sliders.nth(i).evaluate("e => e.getAttribute('aria-valuenow') == e.getAttribute('aria-valuemax')")
        page.keyboard.press("ArrowLeft" if last else "ArrowRight")
        page.wait_for_function("([e, was]) => e.querySelector('img')?.src != was", arg=[box.element_handle(), before])
        assert box.locator("img").get_attribute("alt")
    fields = page.locator(".jp-OutputArea .widget-text input[list]")
    for i in range(fields.count()):
        box = page.locator(".widget-vbox").filter(has=page.locator("input[list]")).nth(i)
        before = box.locator("img").get_attribute("src")
        fields.nth(i).fill(EVIL.replace("\0", "").replace("\u2028", ""))
        page.keyboard.press("Enter")
        page.wait_for_function("([e, was]) => e.querySelector('img')?.src != was", arg=[box.element_handle(), before])
    if folder := os.environ.get("VTG_SHOTS"):
        page.evaluate("document.querySelectorAll('.jp-WindowedPanel-outer')[0].scrollTo(0, 0)")
        tall = page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollHeight")
        page.set_viewport_size(dict(width=1200, height=min(16000, tall + 200)))
        page.screenshot(path=f"{folder}/lab_{notebook.stem}.png")

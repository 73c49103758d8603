"What the explore notebooks promise a newcomer; that they run is for nbdev_test (two in the gate, all by `make explore`) and test_browser.py"
import json
import re
import subprocess
from itertools import combinations
from pathlib import Path

import pytest

from videotg_r1.plots import COLORS

ROOT = Path(__file__).parents[1]
EXPLORE = sorted((ROOT/"nbs/explore").glob("*.ipynb"))
source = lambda cell: "".join(cell["source"])


def test_all_are_there():
    assert {p.stem for p in EXPLORE} == {"one_sample", "reflection", "difficulty", "curriculum", "training_run", "your_own_data", "your_own_reward", "swap_the_model"}


@pytest.mark.parametrize("path", EXPLORE, ids=lambda p: p.stem)
def test_form(path):
    cells = json.loads(path.read_text())["cells"]
    code, prose = ([c for c in cells if c["cell_type"] == kind] for kind in ("code", "markdown"))
    assert re.match(r"# .+\n\n> .+", source(cells[0])), "title and one line"
    assert cells[1]["cell_type"] == "markdown" and "Run All Cells" in source(cells[1]), "prose first: what it is, how to run it, how long it takes"
    assert source(cells[-1]).startswith("## Go on"), "ends with where to go"
    assert len(prose) >= .4*len(cells)
    for c in code:
        assert not source(c).startswith("#|"), "a newcomer's notebook has no directives"
        assert len(source(c).splitlines()) <= 25 and max(map(len, source(c).splitlines())) <= 108, source(c)[:80]
    outputs = [o for c in code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    data = [o["data"] for o in outputs if "data" in o]
    assert not any("widget-view" in mime for d in data for mime in d), "a stored widget shows as an error: store the still pictures"
    assert not any("image/png" in d for d in data), "figures go through Picture or Slides, which carry words"
    pages = ["".join(d.get("text/html", "")) for d in data]
    images = re.findall(r"<img [^>]*>", "".join(p for p in pages if "<iframe" not in p))
    assert len(images) >= 3, "a picture for each idea"
    for image in images: assert len(re.search(r'alt="([^"]*)"', image)[1]) > 10, "each picture has words"


@pytest.mark.parametrize("code, ends", [(0, 0), (5, 0), (1, 2)], ids=["passed", "no browser", "failed"])
def test_make_explore_asks_for_a_browser_only_where_there_is_one(code, ends, tmp_path):
    "pytest ends with 5 where it collects nothing, as without playwright; make itself with 2 where a command failed"
    for name, text in (("nbdev_test", "exit 0"), ("python", f"exit {code}"), ("stamp", "")):
        (tmp_path/name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path/name).chmod(0o755)
    r = subprocess.run(["make", "explore", f"BIN={tmp_path}", f"STAMP={tmp_path/'stamp'}"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert r.returncode == ends, r.stderr


def distance(a, b):
    "Difference of two sRGB colours as seen, CIE76"
    def lab(rgb):
        lin = [v/12.92 if v <= .04045 else ((v + .055)/1.055)**2.4 for v in rgb]
        xyz = [sum(m*v for m, v in zip(row, lin, strict=True)) for row in ((.4124, .3576, .1805), (.2126, .7152, .0722), (.0193, .1192, .9505))]
        f = [t**(1/3) if t > .008856 else 7.787*t + 16/116 for t in (v/w for v, w in zip(xyz, (.9505, 1, 1.089), strict=True))]
        return 116*f[1] - 16, 500*(f[0] - f[1]), 200*(f[1] - f[2])
    return sum((x - y)**2 for x, y in zip(lab(a), lab(b), strict=True))**.5


# Machado, Oliveira and Fernandes 2009, severity 1, on linear rgb
SEEN_BY = {
    "everybody": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((.152286, 1.052583, -.204868), (.114503, .786281, .099216), (-.003882, -.048116, 1.051998)),
    "deuteranopia": ((.367322, .860646, -.227968), (.280085, .672501, .047413), (-.011820, .042940, .968881)),
    "a grey print": ((.2126, .7152, .0722),)*3,
    "tritanopia": ((1.255528, -.076749, -.178779), (-.078411, .930809, .147602), (.004733, .691367, .303900)),
}


@pytest.mark.parametrize("who", SEEN_BY)
def test_kinds_of_spans_differ_for(who):
    def seen(color):
        lin = [v/12.92 if (v := int(color[i:i + 2], 16)/255) <= .04045 else ((v + .055)/1.055)**2.4 for i in (1, 3, 5)]
        out = [min(1., max(0., sum(m*v for m, v in zip(row, lin, strict=True)))) for row in SEEN_BY[who]]
        return [12.92*v if v <= .0031308 else 1.055*v**(1/2.4) - .055 for v in out]
    for a, b in combinations(COLORS, 2):
        d = distance(seen(COLORS[a]), seen(COLORS[b]))
        assert d > (10 if "grey" in who else 15), f"{a} and {b} are {d:.0f} apart for {who}; 2 is just seen"

"""Parsers given what nobody would write: `python tests/fuzz/targets.py 10000`

One target for each thing that is read from outside: it may refuse with a ValueError of one message, and nothing else. hypothesis makes
the inputs and shrinks what fails. `--atheris` drives the targets that take bytes by coverage, where atheris is installed."""
import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from videotg_r1.config import from_params, load_params, scrub, sections, to_params
from videotg_r1.difficulty import DifficultyConfig
from videotg_r1.ledger import Ledger, read_ledger, seal_line, unseal_line
from videotg_r1.records import Sample, printable, read_jsonl, read_samples, safe_name, to_json, write_jsonl
from videotg_r1.stages import check_params, stage_notebook
from videotg_r1.video import FrameSpec

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))


def put(data, name):
    path = FOLDER/name
    path.write_bytes(data)
    return path


def params_file(data):
    "Bytes as a params file: plain values, or one message that names the file"
    path = put(data, "a.yaml")
    try: got = load_params(path)
    except ValueError as e:
        assert "a.yaml" in str(e), e
        return
    def plain(o): return o is None or type(o) in (bool, int, float, str) or (type(o) is list and all(map(plain, o))) or (
        type(o) is dict and all(type(k) is str for k in o) and all(map(plain, o.values())))
    assert plain(got), got


def settings_of(values):
    "Any mapping as settings: what is accepted goes out and in again unchanged"
    for cls in (FrameSpec, DifficultyConfig):
        try: cfg = from_params(cls, values)
        except ValueError as e:
            assert cls.__name__ in str(e), e
            continue
        assert from_params(cls, to_params(cfg)) == cfg
    try: assert list(sections(values, ["fps", "train"])) == ["fps", "train"]
    except ValueError as e: assert str(e).startswith("params:")


def stage_parameters(values):
    "Any mapping as the parameters of a stage: only declared names get through, with values that a notebook can hold"
    for stage in ("estimate", "train"):
        try: got = check_params(stage_notebook(stage), values)
        except ValueError: continue
        assert all(k.isidentifier() for k in got) and set(values) <= set(got)


def jsonl_file(data):
    "Bytes as jsonl: objects, or one message that names file and line"
    path = put(data, "a.jsonl")
    for read in (read_jsonl, read_samples):
        try: rows = read(path)
        except ValueError as e:
            assert re.search(r"a\.jsonl, line \d+", str(e)), e
            continue
        assert all(isinstance(r, (dict, Sample)) for r in rows)


def sample_row(row):
    "Any mapping as a sample: what is accepted has an order in time, and is written and read as it was"
    try: s = Sample.from_dict(row)
    except ValueError as e:
        assert "qid" in str(e)
        return
    assert s.qid.strip() and s.duration_s > 0 and all(0 <= a < b and a < s.duration_s for a, b in s.spans)
    assert Sample.from_dict(json.loads(to_json(s))) == s
    assert read_jsonl(write_jsonl(FOLDER/"row.jsonl", [s]))[0]["qid"] == s.qid


def ledger_file(data):
    "Bytes as a ledger: rows whose checksums fit, or one message that names the file"
    path = put(data, "l.jsonl")
    try: meta, rows = read_ledger(path)
    except ValueError as e:
        assert "l.jsonl" in str(e), e
        return
    assert isinstance(meta, dict) and all(seal_line(r) in data + b"\n" for r in rows)


def ledger_damage(how):
    "A ledger of three rows with something done to its bytes: never a row that was not written, never one changed"
    at, new, cut = how
    path, want = FOLDER/"d.jsonl", [dict(qid=f"q{i}", x=i) for i in range(3)]
    path.unlink(missing_ok=True)
    with Ledger(path, dict(a=1)) as o:
        for r in want: o.append(r)
    data = path.read_bytes()
    at %= len(data)
    path.write_bytes(data[:at] + new + data[at + (cut or len(new)):])
    try:
        with Ledger(path, dict(a=1)) as o: rows = o.rows()
    except ValueError as e:
        assert "d.jsonl" in str(e), e
        return
    assert rows == want[:len(rows)]


def sealed_line(data):
    "Bytes as a line of a ledger"
    row = unseal_line(data)
    assert row is None or seal_line(row)[:-1] == data or json.loads(data)


def video_name(text):
    "Any text as the name of a video: a file name that stays in its folder, and a path that does, or a refusal"
    name = safe_name(text)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", name) and (FOLDER/name).resolve().parent == FOLDER.resolve()
    try: write_jsonl(FOLDER/"v.jsonl", [dict(qid="q", vid="v", video=text, duration_s=3, query="x")])
    except ValueError: return
    try: s, = read_samples(FOLDER/"v.jsonl", video_root=FOLDER)
    except ValueError as e:
        assert "v.jsonl, line 1" in str(e)
        return
    assert not s.video or Path(s.video).resolve().is_relative_to(FOLDER.resolve())


def shown_text(text):
    "Any text on a terminal, and in what is kept"
    line = printable(text)
    assert line.isprintable() and len(line) <= 12*1000 and "\n" not in line
    assert scrub(scrub(text, {}), {}) == scrub(text, {})


words = st.text(max_size=40) | st.sampled_from(["fps", "decoder", "k", "seed", "max_pixels", "__class__", "x=1\nimport os", "grpo", "samples", "model", "run_dir", "{x.__class__}"])
values = st.recursive(st.none() | st.booleans() | st.integers(-10**30, 10**30) | st.floats() | words, lambda o: st.lists(o, max_size=4) | st.dictionaries(words, o, max_size=4), max_leaves=8)
yaml = st.lists(st.sampled_from(["a: ", "b", "- ", "{", "}", "[", "]", ", ", ": ", "\n", "  ", "&x ", "*x", "!!python/object/apply:os.system [", "!!binary ", "'", '"', "|\n", "? ", "1e-6", ".nan",
                                 "0x1F", "<<: ", "---\n", "%TAG ! x\n", "\t", "\0", "\ud7ff", "é", "# ", "on", "2026-11-22", "1:30"]), max_size=25).map(lambda o: "".join(o).encode())
json_text = st.lists(st.sampled_from(['{"qid": "q", ', '"vid": "v", ', '"video": "../x", ', '"duration_s": 3, ', '"query": "a"', '"spans": [[0, 1]]', "}", "\n", "{", "[", "]", ",", ":", '"', "NaN", "1e999",
                                      "-", "0", "\\u0000", "\\ud800", "null", "true", "\ufeff", "\u2028"]), max_size=20).map(lambda o: "".join(o).encode("utf-8", "surrogatepass"))
span = st.tuples(st.floats(), st.floats()) | st.lists(st.floats(0, 20), min_size=2, max_size=2) | values
row = st.fixed_dictionaries(dict(qid=words | st.integers(), vid=words, video=words, duration_s=st.floats() | st.integers(0, 99) | values, query=words),
                            optional=dict(spans=st.lists(span, max_size=3), options=st.lists(words, max_size=3), answer=st.integers(-1, 3) | values, source=words, extra=values))
lines = st.lists(values.filter(lambda o: isinstance(o, dict) and "_crc" not in o), max_size=3).map(lambda rows: b"".join(seal_line(r) for r in rows if sealable(r)))
hostile = st.lists(st.sampled_from(["..", "/", "\\", "\0", "a", ".", "~", "%2e", "\u2024", "\uff0f", "\u202e", "://", "file", "-", "\n", "CON", "$(x)", "x"*300, "\ud800", " "]), max_size=8).map("".join)


def sealable(r):
    try: seal_line(r)
    except ValueError: return False
    return True


TARGETS = {params_file: st.binary(max_size=300) | yaml, settings_of: st.dictionaries(words, values, max_size=4), stage_parameters: st.dictionaries(words, values, max_size=3),
           jsonl_file: st.binary(max_size=300) | json_text, sample_row: row, ledger_file: st.binary(max_size=200) | lines | lines.flatmap(lambda b: st.binary(max_size=9).map(lambda x: b + x)),
           ledger_damage: st.tuples(st.integers(0, 10**4), st.binary(max_size=6), st.integers(0, 40)), sealed_line: st.binary(max_size=200) | lines, video_name: st.text(max_size=300) | hostile,
           shown_text: st.text(max_size=400) | hostile}
BYTES = (params_file, jsonl_file, ledger_file, sealed_line)


def drive(target, n):
    "Run one target on `n` inputs; the number that were run"
    count = [0]
    @settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(TARGETS[target])
    def each(x):
        count[0] += 1
        target(x)
    each()
    return count[0]


def covered(name, n):
    "Run one target by coverage in a process of its own; how it went"
    code = f"import sys, atheris; sys.path.insert(0, {str(Path(__file__).parent)!r})\nwith atheris.instrument_imports(include=['videotg_r1', 'yaml', 'json']): import targets\n" \
           f"atheris.Setup(['x', '-runs={n}', '-verbosity=0', '-timeout=20', '-max_len=400'], targets.{name}); atheris.Fuzz()"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FOLDER)
    return r.returncode, (r.stdout + r.stderr)[-1500:]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("n", type=int, nargs="?", default=10_000)
    p.add_argument("--atheris", action="store_true", help="also by coverage, if atheris is installed")
    a = p.parse_args()
    for target in TARGETS:
        began = time.time()
        print(f"{target.__name__:18} {drive(target, a.n):7} inputs in {time.time() - began:5.0f} s: no complaint", flush=True)
    if not a.atheris: return 0
    if not find_spec("atheris"):
        print("atheris is not installed: pip install atheris drives the targets by coverage as well")
        return 0
    for target in BYTES:
        code, said = covered(target.__name__, a.n)
        print(f"{target.__name__:18} {a.n:7} inputs by coverage: {'no complaint' if code == 0 else said}", flush=True)
        if code: return 1
    return 0


if __name__ == "__main__": sys.exit(main())

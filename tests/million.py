"""What a set of so many samples asks of the parts that hold it whole: files, memory, seconds. No model works here; rows are made up.

    python tests/million.py OUT --rows 100000 1000000

Each part runs in a process of its own, so that its memory is its own. Rows go to OUT/rows.jsonl; `docs/running.md` has those of one machine and what follows for 10 million.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
WORDS = "person opens the door of a fridge and takes out milk then walks away with it while another one looks on".split()


def sample_dict(i):
    v = i//3 # three queries a video
    words = [WORDS[(i*7 + k*(1 + i % 5)) % len(WORDS)] for k in range(9)]
    return dict(qid=f"set_{v:08}_{i % 3}", vid=f"v_{v:08}", video=f"/data/videos_3fps_480_noaudio/v_{v:08}.mp4", duration_s=20. + v*37 % 1600/10, query=f"{' '.join(words)} {i}",
                spans=[[1. + i % 10, 6. + i % 10]], source="set", split="train")


def finding(i):
    ious = [round((i*13 + k*7) % 100/100, 4) for k in range(8)]
    return dict(qid=sample_dict(i)["qid"], k=8, ious=ious, mean_iou=sum(ious)/8, std_iou=.2, hit_rate=.5, unparsable=0, difficulty=1 - sum(ious)/8, bin=("easy", "medium", "hard")[i % 3],
                compute=dict(samples=1, prompts=1, prompt_tokens=2200, visual_tokens=2048, generated_tokens=160, flops=1.7e13, seconds=.16))


def verdict(i): return dict(qid=sample_dict(i)["qid"], verdict=("clean", "partial", "clean")[i % 3], p_annotated=.8, p_event=.1, proposals=[dict(span=[1., 2.], p=.1)]*2, compute=finding(i)["compute"])


def write_ledger(path, n, row):
    from videotg_r1.ledger import Ledger
    with Ledger(path, dict(stage="estimate", settings=dict(k=8)), sync_every=32) as ledger:
        for i in range(n): ledger.append(row(i))


def read_ledgers(out, *names):
    from videotg_r1.ledger import read_ledger
    return [read_ledger(out/f"{o}.jsonl")[1] for o in names]


def samples_of(out):
    from videotg_r1.records import read_samples
    return read_samples(out/"train.jsonl")


def write_set(out, n):
    from videotg_r1.records import Sample, write_samples
    write_samples(out/"train.jsonl", [Sample.from_dict(sample_dict(i)) for i in range(n)])
    return out/"train.jsonl"


def plan(out, n):
    from videotg_r1.batches import longest_first, plan_units
    s = samples_of(out)
    t = time.perf_counter()
    plan_units(longest_first(s), 16)
    return t


def reopen(out, n):
    from videotg_r1.compute import total_cost
    from videotg_r1.ledger import Ledger
    with Ledger(out/"difficulties.jsonl", dict(stage="estimate", settings=dict(k=8))) as ledger: total_cost(ledger.rows())


def merge(out, n):
    from videotg_r1.ledger import merge_ledgers
    (out/"merged.jsonl").unlink(missing_ok=True)
    merge_ledgers([out/"difficulties.jsonl"], out/"merged.jsonl")
    return out/"merged.jsonl"


def choose(out, n):
    from videotg_r1.selection import SelectConfig, select
    s, (d, r) = samples_of(out), read_ledgers(out, "difficulties", "reflections")
    t = time.perf_counter()
    select(s, d, r, SelectConfig(policy="videotg", share=.1))
    return t


def begin_training(out, n):
    from videotg_r1.batches import task_prompt
    from videotg_r1.ledger import fingerprint
    from videotg_r1.training import prompt_order, samples_digest
    s = samples_of(out)
    t = time.perf_counter()
    samples_digest(s); fingerprint([task_prompt(o) for o in s]); prompt_order(n, 8*500, 0)
    return t


def hashing(out, n):
    from videotg_r1.stages import file_sha
    file_sha(out/"difficulties.jsonl")


PARTS = dict(write_samples=write_set, read_samples=lambda out, n: samples_of(out) and None, plan=plan,
             write_ledger=lambda out, n: write_ledger(out/"difficulties.jsonl", n, finding) or out/"difficulties.jsonl",
             write_ledger_2=lambda out, n: write_ledger(out/"reflections.jsonl", n, verdict) or out/"reflections.jsonl",
             reopen_ledger=reopen, merge_ledgers=merge, select=choose, begin_training=begin_training, hash_ledger=hashing)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    p.add_argument("--part", default="", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.part:
        import videotg_r1.batches  # noqa: F401 (imports are not part of the time)
        before, t = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20, time.perf_counter()
        got = PARTS[a.part](a.out, a.rows[0])
        seconds = time.perf_counter() - (got if isinstance(got, float) else t)
        size = got.stat().st_size/1e9 if isinstance(got, Path) else 0.
        print(json.dumps(dict(part=a.part, rows=a.rows[0], seconds=round(seconds, 2), gb_memory=round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20 - before)*1.0737, 3), gb_file=round(size, 4))))
        return
    for n in a.rows:
        folder = a.out/str(n)
        folder.mkdir(parents=True, exist_ok=True)
        for f in folder.glob("*.jsonl"): f.unlink()
        for part in PARTS:
            r = subprocess.run([sys.executable, __file__, str(folder), "--rows", str(n), "--part", part], capture_output=True, text=True)
            line = r.stdout.strip() or json.dumps(dict(part=part, rows=n, failed=r.stderr[-500:]))
            with open(a.out/"rows.jsonl", "a") as f: f.write(line + "\n")
            print(line, flush=True)


if __name__ == "__main__": main()

"The dress rehearsal of params/rehearsal.yaml: a model folder, annotations of real clips, `vtg run` killed once and called again"
import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("VTG_SHARED_DATA", ROOT.parent/"shared/data"))
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
REAL = dict(max_position_embeddings=32768, initializer_range=.02, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
FIRST = int(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or 0)    # GPU that works, as the driver counts
HELDOUT = ("charades", "yoga", "hmdb51")    # parts of file names; the other videos train


def write_model(folder, shape="", device="cpu"):
    "Random weights with the real tokenizer, as stock transformers stores them"
    import torch
    import transformers

    from videotg_r1.policy import FAMILIES, Policy, build_config, save_policy
    from videotg_r1.prediction import PUBLISHED
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHARED/"tokenizer/qwen2_5", padding_side="left")
    if not shape: family, text, vision = "qwen2_5_vl", SMALL | dict(vocab_size=151936), {}
    else:
        sizes = PUBLISHED[shape]
        family, deep = sizes["model_type"], shape.startswith("Qwen3")
        text = REAL | sizes["text_config"] | dict(tie_word_embeddings=sizes["tie_word_embeddings"])
        if deep: text["rope_parameters"] = REAL["rope_parameters"] | dict(mrope_section=[24, 20, 20], mrope_interleaved=True)
        more = dict(num_heads=16, num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17] if sizes["vision_config"]["depth"] == 24 else [8, 16, 24]) if deep \
            else dict(num_heads=16, fullatt_block_indexes=[7, 15, 23, 31])
        vision = dict(initializer_range=.02) | more | {k: v for k, v in sizes["vision_config"].items() if k != "out_hidden_size"}
    config = build_config(family, tokenizer, text, vision)
    torch.manual_seed(0)
    with torch.device(device): model = getattr(transformers, FAMILIES[family].model)._from_config(config, dtype=torch.bfloat16)
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    save_policy(Policy(model.eval(), tokenizer, FAMILIES[family].pixels, family, shape or "small"), folder)
    return sum(p.numel() for p in model.parameters())


def write_model_apart(folder, shape="", device="cpu", env=None):
    "`write_model` in a process of its own, which gives the GPU back"
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT/'tests')]}; from rehearsal import write_model; print(write_model(*sys.argv[1:]), 'parameters', flush=True)"
    subprocess.run([sys.executable, "-c", code, str(folder), shape, device], check=True, env=env)


def write_copy(video, folder, k):
    "The k-th copy of a clip; stored frames get a shade lighter each time, so that what the tower made of one copy is of no use for another"
    path = folder/f"{k}-{video.name}"
    if path.is_file(): return path
    if not k or video.suffix != ".npz": return shutil.copyfile(video, path)
    import numpy as np

    from videotg_r1.video import write_frames
    with np.load(video) as z: frames, times, end = z["frames"], z["times"], float(z["duration_s"])
    write_frames(path, np.minimum(frames, 255 - k) + np.uint8(k), times, end)
    return path


def write_annotations(folder, repeat=1):
    "train.jsonl and heldout.jsonl about the clips that are there; `repeat`: so many copies of each clip, each asked all its queries"
    rows = dict(train=[], heldout=[])
    (folder/"clips").mkdir(exist_ok=True)
    for i, line in enumerate((SHARED/"annotated_clips.jsonl").read_text().splitlines()):
        r, video = json.loads(line), SHARED/json.loads(line)["video"]
        if not video.is_file(): continue
        role = "heldout" if any(o in video.name for o in HELDOUT) else "train"
        spans = [[a, min(b, r["duration"])] for a, b in r["spans"]]
        rows[role] += [dict(qid=f"{r['vid']}_{i}_{k}", vid=f"{r['vid']}_{k}", video=str(write_copy(video, folder/"clips", k).resolve()), duration_s=r["duration"],
                            query=r["query"], spans=spans, source="clips", split=role) for k in range(repeat)]
    for role, found in rows.items(): (folder/f"{role}.jsonl").write_text("".join(json.dumps(o) + "\n" for o in found))
    return {k: len(v) for k, v in rows.items()}


def shared_or_exit(*names):
    "Stop with what to do where shared data is missing"
    if missing := [n for n in names if not (SHARED/n).exists()]:
        sys.exit(f"{SHARED} has no {' and no '.join(missing)}: set VTG_SHARED_DATA to a folder with Qwen2.5's tokenizer in tokenizer/qwen2_5"
                 + (" and clips with their annotated_clips.jsonl, as docs/running.md says" if len(names) > 1 else ""))


def carry(folder):
    "What the rehearsal reads of the shared data, small enough to take along: the tokenizer, annotations, and frames of the clips for a machine that cannot decode"
    import numpy as np

    from videotg_r1.video import FrameSpec, read_clip
    shutil.copytree(SHARED/"tokenizer/qwen2_5", folder/"tokenizer/qwen2_5", dirs_exist_ok=True)
    (folder/"clips").mkdir(parents=True, exist_ok=True)
    rows = [json.loads(o) for o in (SHARED/"annotated_clips.jsonl").read_text().splitlines()]
    for video in sorted({r["video"] for r in rows if (SHARED/r["video"]).is_file()}):
        c = read_clip(str(SHARED/video), FrameSpec(fps=2., max_frames=64, min_pixels=112**2, max_pixels=224**2, total_pixels=64*224**2))
        np.savez_compressed(folder/"clips"/f"{Path(video).name}.npz", frames=c.frames, times=c.frame_ts - c.frame_ts[0], duration_s=c.duration_s)
    (folder/"annotated_clips.jsonl").write_text("".join(json.dumps(r | dict(video=f"clips/{Path(r['video']).name}.npz")) + "\n" for r in rows))


def write_params(folder, device="cpu", steps=0, given=()):
    "params/rehearsal.yaml with places and sizes filled in; `given` are section.name=value, as in shared.grpo={...}; null leaves it out"
    config = yaml.safe_load((ROOT/"params/rehearsal.yaml").read_text())
    config["shared"] |= dict(model=str(folder/"model"), device=device)
    config["prepare"] |= dict(train=str(folder/"train.jsonl"), heldout=str(folder/"heldout.jsonl"), videos=str(folder/"clips"))
    for o in ("grpo", "sft"): config["shared"][o] |= dict(steps=steps) if steps else {}
    for o in given:
        name, value = o.split("=", 1)
        section, key = name.split(".")
        value = yaml.safe_load(value)
        if value is None: config[section].pop(key, None)
        else: config[section][key] = config[section].get(key, {}) | value if isinstance(value, dict) else value
    (folder/"params.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder/"params.yaml"


class Trace:
    "What the driver says about the GPUs, five times a second, and how files of rows grow"
    def __init__(self, device, root=None):
        self.rows, self.grown, self.root, self.device = [], [], root, device
        if device != "cpu" or root: threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        cards, known = [], {}
        if self.device != "cpu":
            import pynvml
            pynvml.nvmlInit()
            cards = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        while True:
            time.sleep(.2)
            if cards: self.rows.append((time.time(), [pynvml.nvmlDeviceGetUtilizationRates(c).gpu for c in cards],
                                        [round(pynvml.nvmlDeviceGetMemoryInfo(c).used/2**30, 2) for c in cards]))
            for p in [*self.root.glob("*/*.jsonl"), *self.root.glob("*/training/history.jsonl")] if self.root else ():
                try: n = p.read_bytes().count(b"\n")
                except OSError: continue
                if n != known.get(p, 0): self.grown.append((time.time(), str(p.relative_to(self.root)), n)); known[p] = n

    def over(self, since, until, gpus=(FIRST,)): # time.time(); of these GPUs
        rows, at = [r for r in self.rows if since <= r[0] <= until], list(gpus)
        if not rows: return {}
        return dict(util=[round(statistics.mean(r[1][i] for r in rows), 1) for i in at], peak_gib=[max(r[2][i] for r in rows) for i in at])

    def work(self, job, since, until): # from the end of its first batch, or step, to that of its last one in that time, or None
        at = [t for t, p, n in self.grown if p.startswith(f"{job}/") and n > 1 and since <= t <= until] # row 1 is a ledger's head, or the first step
        return (at[0], at[-1]) if len(at) > 1 else None


def vtg(folder, *more):
    main = [sys.executable, "-c", "import sys; from videotg_r1.cli import main; sys.exit(main())", "run", str(folder/"params.yaml"),
            "--runs", str(folder/"runs"), "--reports", str(folder/"reports"), *more]
    return subprocess.Popen(main, cwd=ROOT, start_new_session=True)


def rehearse(folder, kill_after="train-videotg_r1", timeout_s=3600., after_each=lambda: None, jobs=1):
    "Run; kill -9 in the first step behind that stage's first checkpoint; run again. Returns the report's folder and where training went on"
    done, saved = set(), yaml.safe_load((folder/"params.yaml").read_text())["shared"]["grpo"]["save_steps"]
    def look():
        time.sleep(.1)
        if new := {p.parent.name for p in (folder/"runs/rehearsal").glob("*/SUCCESS")} - done: done.update(new); after_each()
    run, end = vtg(folder, "--jobs", "1"), time.monotonic() + timeout_s
    history = folder/"runs/rehearsal"/kill_after/"training/history.jsonl"
    try:
        while run.poll() is None and time.monotonic() < end:
            if history.is_file() and history.read_bytes().count(b"\n") > saved: break
            look()
        assert run.poll() is None, f"`vtg run` ended with {run.returncode} before it was killed"
    finally:
        if run.poll() is None: os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert history.is_file(), f"{kill_after} had not begun after {timeout_s:.0f} s"
    print(f"{kill_after} killed behind step {len(history.read_text().splitlines())}", flush=True)
    again = vtg(folder, "--jobs", str(jobs))
    try:
        while again.poll() is None and time.monotonic() < end:
            look()
        assert again.poll() == 0, f"`vtg run`, called again, ended with {again.returncode} (None: not within {timeout_s:.0f} s)"
    finally:
        if again.poll() is None: os.killpg(again.pid, signal.SIGKILL)
    result = json.loads((folder/"runs/rehearsal"/kill_after/"training/final/complete.json").read_text())["info"]
    return folder/"reports/rehearsal", result["resumed_from"]


@cache
def planned(folder):
    "(params, jobs, sizes of the data); looked at once"
    from videotg_r1.config import load_params
    from videotg_r1.preflight import check_data
    from videotg_r1.stages import Job, check_params, plan_run, stage_notebook
    config = load_params(folder/"params.yaml")
    jobs = [Job(j.name, j.stage, check_params(stage_notebook(j.stage), j.params), j.needs) for j in plan_run(config, folder/"runs")]
    return config, jobs, check_data(next(j for j in jobs if j.stage == "prepare").params)[1]


def measured(folder, trace):
    "Every stage: what preflight says it needs beside what it took, and how busy the GPU was"
    from videotg_r1.doctor import gpus
    from videotg_r1.prediction import RATES
    from videotg_r1.preflight import CPU, CPU_RATES, card_of, outlook
    (config, jobs, sizes), rows = planned(folder), []
    cpu = config["shared"]["device"] == "cpu"
    for j in jobs:
        at = folder/"runs/rehearsal"/j.name
        if not (at/"run.json").is_file(): continue
        run, look = json.loads((at/"run.json").read_text()), outlook(j, sizes, CPU if cpu else card_of(gpus()[0].name), 1, CPU_RATES if cpu else RATES, to_limit=True) # random weights do not end their answers
        row = dict(stage=j.name, attempts=run["attempts"], compute=run.get("compute", {}), predicted=look and dict(seconds=look.seconds, gb=look.gb, how=look.how))
        ends = [o["started"] for o in run["attempts"][1:]] + [1e12]
        for o, end in zip(run["attempts"], ends, strict=True):
            o |= trace.over(o["started"], o["started"] + (o["wall_s"] or 0))
            if w := trace.work(j.name, o["started"], min(end, o["started"] + (o["wall_s"] or 1e12))): o["work"] = dict(seconds=round(w[1] - w[0], 2), **trace.over(*w))
        if (h := at/"training/history.jsonl").is_file():
            steps = [json.loads(o) for o in h.read_text().splitlines()]
            row["steps"] = [{k: o.get(k) for k in ("step", "elapsed_s", "step_time", "loss", "reward", "grad_norm", "at_once")} for o in steps]
        rows.append(row)
    return dict(sizes=sizes, shared=config["shared"], rows=rows, grown=[(round(t - trace.begun, 1), p, n) for t, p, n in trace.grown],
                trace=[(round(t - trace.begun, 1), u[FIRST], m[FIRST]) for t, u, m in trace.rows])


def table(found):
    "Lines for people"
    for r in found["rows"]:
        last, p, gib = r["attempts"][-1], r["predicted"] or {}, r["compute"].get("peak_gpu_gb", 0)
        yield (f"{r['stage']:22} {'+'.join(str(round(o['wall_s'] or 0)) for o in r['attempts']):>9} s  predicted {p.get('seconds', 0):5.0f} s   {gib*1.0737:5.1f} GB  predicted {p.get('gb', 0):5.1f}   "
               f"GPU busy {last.get('util', ['-'])[0]} % in all, {last.get('work', {}).get('util', ['-'])[0]} % in {last.get('work', {}).get('seconds', 0)} s of work")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("folder", type=Path, help="for the model, the annotations, the run and its report")
    p.add_argument("--shape", default="", help="of a released model, as Qwen2.5-VL-3B (default: a small one)")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--steps", type=int, default=0, help="of training (default: as in params/rehearsal.yaml)")
    p.add_argument("--repeat", type=int, default=1, help="copies of each clip, to make a run longer")
    p.add_argument("--set", nargs="*", default=[], metavar="section.name=value", help="over params/rehearsal.yaml, as shared.frames='{max_frames: 64}'")
    p.add_argument("--jobs", type=int, default=1, help="stages at a time after the kill")
    p.add_argument("--until", type=float, default=3600., help="seconds after which it is given up")
    p.add_argument("--carry", action="store_true", help="only write to the folder what VTG_SHARED_DATA has to hold on a machine without decoders")
    a = p.parse_args()
    shared_or_exit("tokenizer/qwen2_5", "annotated_clips.jsonl")
    a.folder = a.folder.resolve()
    a.folder.mkdir(parents=True, exist_ok=True)
    if a.carry:
        carry(a.folder)
        sys.exit()
    print(f"{write_annotations(a.folder, a.repeat)} samples", flush=True)
    if not (a.folder/"model/videotg.json").is_file(): write_model_apart(a.folder/"model", a.shape, a.device)
    write_params(a.folder, a.device, a.steps, a.set)
    began, trace = time.monotonic(), Trace(a.device, a.folder/"runs/rehearsal")
    trace.begun = time.time()
    def keep(): # whoever ends this early has what was measured so far
        from videotg_r1.records import write_atomic
        found = measured(a.folder, trace)
        write_atomic(a.folder/"measured.json", json.dumps(found))
        return found
    try: report, resumed = rehearse(a.folder, timeout_s=a.until, after_each=keep, jobs=a.jobs)
    finally: print(*table(keep()), sep="\n", flush=True)
    print(f"{report}/index.html after {time.monotonic() - began:.0f} s; killed once, training went on from step {resumed}")

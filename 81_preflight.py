# %% [markdown]
# preflight

> What a run lacks, how long it will take and what it needs, said before anything starts

# %%
#| default_exp preflight

# %%
#| export
import json
import shutil
import tempfile
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import videotg_r1
from videotg_r1.config import from_params
from videotg_r1.datasets import FilterConfig, data_parts, repo_path
from videotg_r1.dataset_checks import Finding, check_between, check_part, unusable
from videotg_r1.doctor import gpus, hub_cache, ram_gb
from videotg_r1.prediction import (
    ANSWER_TOKENS,
    CARDS,
    RATES,
    Card,
    Load,
    ModelSize,
    Rates,
    Training,
    agent_gb,
    agent_s,
    asking_fits,
    card_of,
    load_of,
    published,
    saving_s,
    size_of,
    step_s,
    training_gb,
    what_fits,
)
from videotg_r1.records import write_jsonl
from videotg_r1.stages import check_params, plan_run, stage_notebook

# %%
#| hide
import pandas as pd
from fastcore.test import *

from videotg_r1.config import load_params
from videotg_r1.stages import Job

# %% [markdown]
A run on a rented machine that fails after an hour because a folder was named wrongly costs more than this module. It loads no model and no torch. Each *finding* has a level: `ok`, `missing` (the run cannot work), or `note` (an estimate, or something to know).

# %% [markdown]
## The model

A name is looked up where `load_policy` would: inside the package, as a folder, in the cache of downloaded models.

# %%
#| export
def check_model(
    name:str, # tiny, random-<family>, a folder, or a hub id
)->Finding: # ok or missing
    "Whether a model can be loaded without the network"
    if name.startswith("random-"): return Finding("ok", "model", f"{name}: made on the spot, random weights")
    shipped, folder = Path(videotg_r1.__file__).parent/"models"/name, repo_path(name)
    for path in (shipped, folder):
        if list(path.glob("*.safetensors")): return Finding("ok", "model", f"{name}: {path}")
    found = list(hub_cache().glob(f"models--{name.replace('/', '--')}/snapshots/*/*.safetensors"))
    if found: return Finding("ok", "model", f"{name}: {found[0].parent}")
    return Finding("missing", "model", f"{name}: no folder with .safetensors, and not among the downloaded models: fetch it with `hf download {name}`, "
                   "or give the folder where it lies")

# %%
test_eq(check_model("random-qwen2_5_vl").level, "ok")
check_model("Qwen/Qwen9-VL-1T")

# %% [markdown]
## Annotations and videos

Each file of the run is read as the run will read it: how many samples come out, what was cut or left out, how many of the videos are there. Each video is opened once, which finds those that cannot be decoded; all that are missing or broken are listed in `runs/<run>/unusable.jsonl`. Then training and reporting are compared: a video on both sides stops the run, unless it says `allow_leak: true`. `vtg data` says more about each set, down to the query.

# %%
#| export
NOTHING = dict(train=0, heldout=0, videos=0, mean_s=60., longest_s=60.)

def check_data(
    p:dict, # parameters of the prepare stage
)->tuple: # (list of Finding, {train, heldout: how many samples; videos; mean_s, longest_s: of them; lengths: of some samples' videos, by role}, rows of `unusable`)
    "Annotation files, videos, and whether training touches what is reported on"
    if p["source"] == "synthetic":
        w = p["world"]
        videos = w.get("train_videos", 320), w.get("heldout_videos", 200)
        sizes = dict(train=videos[0], heldout=videos[1]*w.get("heldout_queries", 2), videos=sum(videos), mean_s=32., longest_s=64.)
        return [Finding("ok", "videos", "synthetic: rendered by the run")], sizes, []
    try: parts = data_parts(*(p[k] for k in ("source", "train", "heldout", "videos", "root", "report_on")))
    except ValueError as e: return [Finding("missing", "annotations", str(e))], NOTHING, []
    with tempfile.TemporaryDirectory() as d:
        checked = [check_part(o, p["policy"], from_params(FilterConfig, p["filters"]), Path(d)/"videos.jsonl") for o in parts]
    less = lambda f, c: replace(f, level="note") if f.what == "rows" and f.level == "missing" and c.samples else f # a part of a set may be run on
    found = [less(f, c) for c in checked for f in c.findings] + check_between(checked, p["allow_leak"])
    sizes = {role: sum(len(c.kept) for c in checked if c.part.role == role) for role in ("train", "heldout")}
    seconds = {s.video: s.duration_s for c in checked for s in c.kept} or {"": 60.}
    every = {role: sorted(s.duration_s for c in checked for s in c.kept if c.part.role == role) for role in ("train", "heldout")}
    sizes |= dict(videos=len(seconds), mean_s=sum(seconds.values())/len(seconds), longest_s=max(seconds.values()),
                  lengths={role: [o[int((i + .5)/64*len(o))] for i in range(64)] for role, o in every.items() if o})
    return found, sizes, [o for c in checked for o in unusable(c)]

# %%
data = dict(source="jsonl", train="tests/data/world/train.jsonl", heldout="tests/data/world/heldout.jsonl", videos="tests/data/world", root="", report_on="",
            policy="clip", filters={}, allow_leak=False)
bad = lambda **kw: [o.what for o in check_data(data | kw)[0] if o.level == "missing"]
test_eq(bad(), [])
test_eq(bad(videos="tests/data"), ["videos", "videos"])
test_eq(bad(heldout="x.jsonl"), ["annotations"])
check_data(data)[0][0]

# %% [markdown]
A copy of that set, in which one video is empty and another is gone:

# %%
world = Path(tempfile.mkdtemp(prefix="vtg-"))/"world"
shutil.copytree(repo_path("tests/data/world"), world)
(world/"videos/heldout_00000.mp4").write_bytes(b"")
(world/"videos/heldout_00001.mp4").unlink()
found, _, useless = check_data(data | dict(heldout=str(world/"heldout.jsonl"), videos=str(world)))
test_eq([o.what for o in found if o.level == "missing"], ["videos", "videos"])
[(Path(o["video"]).name, o["what"]) for o in useless]

# %% [markdown]
Training on the file that is reported on:

# %%
test_eq((bad(heldout=data["train"], allow_leak=True), bad(heldout=data["train"])), ([], ["leak"]))
next(o for o in check_data(data | dict(heldout=data["train"]))[0] if o.what == "leak")

# %% [markdown]
## Memory and time

`35_prediction` does the arithmetic: sizes of the model, tokens of the videos, and one table of measured rates. What is said here is therefore a prediction, and says where its rates come from.

# %%
#| export
CPU, CPU_RATES = Card(7e10, 1e10, 0), Rates(1., .72, part_s=.05, step_s=.004, plain_bytes=0., adapters_bytes=0., compile_s=0., least_s=0., answer_s=0., adapters_least_s=0., adapters_step_s=0., update_bytes=0., load_s=10., source="the quick start on idle CPU cores, one a stage")

def told_by(
    name:str, # tiny, random-<family>, a folder, or a hub id
    file:str, # config.json, or videotg.json
)->dict: # {} where there is none
    "A small file of a model"
    shipped = Path(videotg_r1.__file__).parent/"models"
    if name.startswith("random-"): name = "tiny" # made on the spot, smaller than that
    folders = shipped/name, repo_path(name), *hub_cache().glob(f"models--{name.replace('/', '--')}/snapshots/*")
    return next((json.loads((o/file).read_text()) for o in folders if (o/file).is_file()), {})

def model_size(
    name:str, # tiny, random-<family>, a folder, or a hub id
)->ModelSize|None: # None where nothing is known about it
    "Sizes of a model, from its config or its name"
    return size_of(config) if (config := told_by(name, "config.json")) else published(name)

def frames_of(
    p:dict, # parameters of a stage, resolved
)->dict: # FrameSpec fields
    "How a stage takes frames: as its model wants them, unless told otherwise"
    return told_by(p["model"], "videotg.json").get("frame_spec", {}) | p.get("frames", {})

def training_of(
    p:dict, # parameters of a training stage, resolved
    gpus:int, # of the machine
    given:dict|None=None, # settings over those of the stage
)->Training: # what memory and time depend on
    "How a stage trains"
    method = p.get("method", "grpo")
    s, grpo = p[method] | (given or {}), method == "grpo"
    return Training(method, s.get("prompts_per_step" if grpo else "batch_size", 8), s.get("G", 8) if grpo else 1, s.get("grad_accum", 1), s.get("lora_r", 0),
                    s.get("freeze_vision", False), s.get("gradient_checkpointing", False), min(ANSWER_TOKENS, s.get("max_completion_length", 32)),
                    s.get("max_completion_length", 32) if grpo else ANSWER_TOKENS, s.get("save_steps", 50), s.get("beta", 0.), "fsdp" in p.get("launch", "") or "zero3" in p.get("launch", ""),
                    (p.get("processes") or gpus) if p.get("launch") else 1, s.get("compile", False))

def variants_of(
    job, # Job, parameters resolved
    gpus:int, # of the machine
)->list: # of (Training, steps), one for each training run of the stage; empty where it trains nothing
    "The training runs of a stage"
    p = job.params
    if job.stage == "train": return [(training_of(p, gpus), p[p["method"]].get("steps", 100))]
    if job.stage not in ("ablation", "data_efficiency"): return []
    method = lambda v: v.get("method", "grpo")
    return [(training_of(p | dict(method=method(v)), gpus, v.get("settings")), (p[method(v)] | v.get("settings", {})).get("steps", 100)) for v in p["variants"].values()]

# %%
test_eq(model_size("random-qwen3_vl"), model_size("tiny"))
test_eq(model_size("someone/else"), None)
test_close(model_size("Qwen/Qwen2.5-VL-7B-Instruct").total/1e9, 8.29, eps=.01)
training_of(dict(method="sft", sft=dict(batch_size=16), launch="params/accelerate/fsdp2.yaml"), 8)

# %% [markdown]
A stage has a time, and a need for memory on each GPU. What does not fit is told with the change under which it would.

# %%
#| export
def typical(
    size:ModelSize, # of the model
    frames:dict, # FrameSpec fields
    sizes:dict, # of `check_data`
    role:str="train", # or heldout
)->Load: # the mean of many
    "What a video of a set costs: the mean over videos, which is less than that of a video of mean length, because long ones are cut to max_frames"
    loads = [load_of(size, frames, o) for o in sizes.get("lengths", {}).get(role) or [sizes["mean_s"]]]
    return Load(*(sum(o)/len(loads) for o in zip(*(astuple(o) for o in loads), strict=True)))

# %%
mixed = dict(mean_s=60., lengths=dict(train=[20., 100.]))
one, two = typical(published("Qwen2.5-VL-3B"), dict(max_frames=64, max_pixels=224*224), mixed), typical(published("Qwen2.5-VL-3B"), dict(max_frames=64, max_pixels=224*224), dict(mean_s=60.))
assert one.tokens < two.tokens
f"{one.tokens:.0f} tokens for videos of 20 and of 100 s, {two.tokens:.0f} for one of 60 s"

# %%
#| export
@dataclass(frozen=True)
class Outlook:
    "What a stage is predicted to need"
    name: str # of the job
    seconds: float # wall time
    gpus: int # that work
    gb: float # on each of them
    how: str # what the memory is made of
    advice: str = "" # what to change where it does not fit

# %% [markdown]
An agent reads and writes; a training does so too, learns, and saves. Each begins with a start, which short stages consist of.

# %%
#| export
def outlook(
    job, # Job, parameters resolved
    sizes:dict, # of `check_data`
    card:Card, # each GPU
    gpus:int=1, # of the machine
    rates:Rates=RATES, # what was measured
    to_limit:bool=False, # answers are as long as they may be and propose nothing, as those of random weights
)->Outlook|None: # None for a stage without a model of its own, or of unknown size
    "Time and memory of a stage"
    p = job.params
    if "model" not in p or p.get("judge") or not (size := model_size(p["model"])): return None
    frames, s = frames_of(p), p.get("settings", {})
    mean, longest = typical(size, frames, sizes, "heldout" if job.stage == "evaluate" else "train"), load_of(size, frames, sizes["longest_s"])
    n, runs = gpus if p.get("runner", "in_process") != "in_process" else 1, variants_of(job, gpus)
    k = dict(reflect=s.get("k", 4), estimate=s.get("k", 8)).get(job.stage, 1)
    batch, limit, compile = s.get("batch_size", 8), s.get("max_new_tokens", 64), s.get("compile", False)
    asked = dict(batch=batch, G=k, longest=limit, held=2 if job.stage == "reflect" else 1)
    need = agent_gb(size, longest, **asked)
    queries = (sizes["train"] + sizes["heldout"])/max(sizes["videos"], 1)
    tokens = limit if to_limit else ANSWER_TOKENS
    load_for = lambda pixels: load_of(size, frames | dict(total_pixels=pixels), sizes["longest_s"])
    pixels = frames.get("total_pixels", 3584*size.factor**2)
    ask = lambda stage, m, k, v: m*agent_s(stage, size, mean, card, k, v, batch, rates, queries, tokens, compile)/n
    if to_limit: runs = [(replace(t, tokens=t.longest), steps) for t,steps in runs]
    if not runs:
        samples = p.get("max_samples") or sizes["heldout" if job.stage == "evaluate" else "train"]
        negatives = min(s.get("calibrate_n", 200), samples) if job.stage == "reflect" and s.get("threshold") is None else 0
        seconds = ask(job.stage, samples, k, 0 if to_limit else s.get("max_proposals", 3)) + (ask(job.stage, negatives, 0, 0) if negatives else 0)
        return Outlook(job.name, seconds + rates.load_s + compile*rates.compile_s, n, sum(need.values()), words(need), asking_fits(size, load_for, asked, card.gb, pixels))
    judged = len(runs)*ask("evaluate", p.get("max_samples") or sizes["heldout"], 1, 0) if job.stage != "train" else 0
    worst, need = max(((t, training_gb(size, longest, t)) for t,_ in runs), key=lambda o: sum(o[1].values()))
    fits = what_fits(size, load_for, worst, card.gb, pixels)
    train = lambda t, steps: steps*step_s(size, mean, t, card, rates) + saving_s(size, t, steps, rates) + rates.load_s + t.compile*rates.compile_s
    return Outlook(job.name, sum(train(t, steps) for t,steps in runs) + judged, max(t.gpus for t,_ in runs),
                   sum(need.values()), words(need), fits)

# %%
#| export
def words(
    need:dict, # GB by what they are for
)->str: # the largest first
    "A need for memory in words"
    return ", ".join(f"{k} {v:.1f}" for k,v in sorted(need.items(), key=lambda o: -o[1]) if v >= .05)

def duration_text(
    seconds:float, # how long
)->str: # for people
    "A time in words"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds/60:.0f} min" if seconds < 7200 else f"{seconds/3600:.1f} h"

# %%
test_eq([duration_text(o) for o in (5, 600, 36000)], ["5 s", "10 min", "10.0 h"])
seven = Job("train-x", "train", dict(model="Qwen/Qwen2.5-VL-7B", method="grpo", grpo=dict(steps=500, freeze_vision=True, gradient_checkpointing=True)))
some = dict(train=1000, heldout=100, videos=500, mean_s=30., longest_s=60.)
tight = outlook(seven, some, CARDS["H100"])
test_eq(outlook(Job("select", "select", {}), some, CARDS["H100"]), None)
assert tight.gb > 79 and "adapters" in tight.advice
f"{tight.gb:.0f} GB ({tight.how}): {tight.advice}; {duration_text(tight.seconds)}"

# %% [markdown]
A judge on a server needs no memory here. It costs requests and tokens, and money where the params file says what a token costs.

# %%
#| export
def judge_cost(
    job, # Job with a judge, parameters resolved
    sizes:dict, # of `check_data`
)->Finding: # a note
    "What a stage asks of its judge, at most"
    p, j = job.params, job.params["judge"]
    s, size = p.get("settings", {}), published("Qwen2.5-VL-7B") # a server tells its tokens only afterwards: these are Qwen2.5-VL's
    frames = dict(fps=1., max_frames=64, max_pixels=256*28*28) | p.get("frames", {})
    k, load = s.get("k", 4 if job.stage == "reflect" else 8), load_of(size, frames, sizes["mean_s"])
    asked = sizes["train"]*(3 + s.get("max_proposals", 3)) + 2*s.get("calibrate_n", 200) if job.stage == "reflect" else sizes["train"]
    tokens, written = asked*load.tokens, sizes["train"]*k*ANSWER_TOKENS
    money = (tokens*j.get("price_in", 0) + written*j.get("price_out", 0))/1e6
    return Finding("note", "judge", f"{job.name}: at most {asked:,.0f} questions to {j.get('model', '?')}, {tokens/1e6:,.1f} M tokens read and {written/1e6:,.2f} M written, "
                   + (f"{money:,.2f} at its prices" if money else "price_in and price_out are not given") + f"; {j.get('concurrency', 16)} at a time; nothing is loaded here for it")

# %%
asks = Job("reflect", "reflect", dict(judge=dict(model="big", price_in=1., price_out=4.), settings=dict(k=4)))
judge_cost(asks, some).text

# %% [markdown]
## A whole run, predicted and measured

The dress rehearsal, from prepare to report in one call, killed in its training and called again (`reports/2026-11-23_rehearsal`): 3B on one H200 and 7B with adapters on another, and later 3B on an H100. 3B on the H200 gave two rates their value, `load_s` (from its four agents' stages) and `save_s` (from the end of its training); the others gave none. Memory is what the driver said, at most.

# %%
def whole_run(name, card):
    found = json.loads((repo_path("reports/2026-11-23_rehearsal")/f"whole-{name}.json").read_text())
    model, shared, asked = f"Qwen2.5-VL-{name[:2].upper()}", found["shared"], dict(max_new_tokens=64, batch_size=16)
    own = dict(reflect=asked | dict(k=4, calibrate_n=50), estimate=asked | dict(k=8), evaluate=asked)
    for r in found["rows"]:
        stage, last = r["stage"].split("-")[0], r["attempts"][-1]
        if stage not in (*own, "train"): continue
        params = dict(settings=own[stage]) if stage in own else dict(method="grpo", grpo=shared["grpo"] | dict(steps=8)) # of 12 steps 4 were done before the kill
        o = outlook(Job(r["stage"], stage, dict(model=model, frames=shared["frames"]) | params), found["sizes"], CARDS[card], to_limit=True)
        before = 0 if stage == "train" or card == "H100" else model_size(model).joined_bytes/1e9 # gate and up were two matrices in the calls on H200
        alone = float("nan") if card == "H100" and r["stage"] == "evaluate-base" else min(o["work"]["peak_gib"][0] for o in r["attempts"])*1.0737 # of stages that had the card for themselves
        yield dict(model=model, card=card, stage=r["stage"] + " (resumed)"*(stage == "train"), seconds=last["wall_s"], predicted_s=o.seconds, gb=alone, predicted_gb=o.gb - before,
                   fitted={"3b": "save_s" if stage == "train" else "load_s"}.get(name, ""))

runs = pd.DataFrame([*whole_run("3b", "H200"), *whole_run("7b", "H200"), *whole_run("3b-h100", "H100")])
off = runs[["predicted_s", "predicted_gb"]].to_numpy()/runs[["seconds", "gb"]].to_numpy() - 1
free = off[runs.fitted == ""]
runs.insert(5, "off", [f"{o:+.0%}" for o in off[:, 0]])
runs["off_gb"] = [f"{o:+.0%}".replace("+nan%", "") for o in off[:, 1]]
assert (abs(free[:, 0]) <= .15).mean() >= .7 and abs(free[:, 0]).max() < .3
runs.round(1)

# %% [markdown]
On the H100 all five stages are within 15 %, of 7B four of five. The other one, 7B's second evaluation, is over in 24 s, because by then all its kernels are known: one number for the start of every stage is too coarse for stages that do little else. On the H100 the first evaluation ran beside the rest of the training (two stages at a time), which made both longer; its memory is not counted, and that of the training is that of its part before the kill. The same calls without compiled files of Python's libraries (`PYTHONDONTWRITEBYTECODE`, and none installed) take 10 s more for each stage: then `load_s` is 35 to 40.

Before the H100 was tried these stages had been predicted with 42, 33, 73 and twice 29 s. That was nearer than it deserved: reading and steps were taken to be as fast as with compiled layers (15 to 25 % too fast in longer work, see [35_prediction](35_prediction.ipynb)), and finding and saving what short runs consist of was taken to be slower than it is by now.

# %% [markdown]
## All of it

# %%
#| export
def price(
    seconds:float, # of one card
    card:str, # its name
)->Finding: # a note
    "What a run will cost, in the unit that is paid for"
    return Finding("note", "cost", f"you are about to spend about {seconds/3600:.{0 if seconds > 36000 else 1}f} GPU-hours ({card})")

# %%
price(41.2*3600, "NVIDIA H100 80GB HBM3").text

# %%
#| export
def estimates(
    jobs, # of Job, parameters resolved
    sizes:dict, # of `check_data`
    asked:int=0, # GPUs to plan for; 0: those of this machine
    asked_card:str="", # their kind, as H100; empty: those of this machine
)->list: # of Finding
    "Memory and time of a run, against what this machine has or is asked about"
    cards = gpus()
    cpu = not (cards or asked or asked_card) or any(j.params.get("device") == "cpu" for j in jobs)
    name = asked_card or (cards[0].name if cards else "H100")
    card = replace(CPU, gb=ram_gb()) if cpu else card_of(name) if asked_card or not cards else replace(card_of(name), gb=min(c.total_gb for c in cards))
    big = any((s := model_size(j.params["model"])) and s.total > 1e9 for j in jobs if "model" in j.params and not j.params.get("judge"))
    if lost := cpu and big: card = CARDS["H100"]
    found = [o for j in jobs if (o := outlook(j, sizes, card, asked or len(cards) or 1, CPU_RATES if cpu and not lost else RATES))]
    out = [judge_cost(j, sizes) for j in jobs if j.params.get("judge")]
    if not found: return out
    known = sizes["train"] + sizes["heldout"] > 0
    worst, total = max(found, key=lambda o: o.gb), sum(o.seconds*o.gpus for o in found)
    if lost: out.append(Finding("missing", "memory", f"no GPU here: on a single one {worst.name} would need about {worst.gb:.0f} GB ({worst.how}). "
                            "To plan for the machine that will run it, say what it has, as --gpus 8 --card H100"))
    else: out.append(Finding("ok", "memory", f"about {worst.gb:.1f} GB for {worst.name} ({worst.how}), {card.gb:.0f} GB {'memory' if cpu else f'GPU memory on {name}'}"))
    tight = [] if lost else [o for o in found if o.gb > card.gb]
    if tight: out = out[:-1]
    out += [Finding("missing", "memory", f"{o.name} does not fit: about {o.gb:.0f} of {card.gb:.0f} GB ({o.how}): {o.advice}") for o in tight]
    out += [Finding("note", "stage", f"{o.name}: {'at most ' if o.name == 'reflect' else ''}{duration_text(o.seconds)} on {o.gpus} {'process' if cpu and not lost else 'GPU'}{'s'*(o.gpus > 1)}, {o.gb:.1f} GB each") for o in found if known]
    if not known: return [*out, Finding("note", "time", "no sample was found, so nothing is known about time; memory is that of a minute of video")]
    if not cpu or lost: out.append(price(total, f"{name}, if there were one" if lost else name))
    rates = CPU_RATES if cpu and not lost else RATES
    return out + [Finding("note", "time", f"about {duration_text(sum(o.seconds for o in found))} for {len(found)} stages with a model, {sizes['train']} training and {sizes['heldout']} "
                          f"held-out samples of {sizes['mean_s']:.0f} s, one stage after the other: a prediction from measured rates ({rates.source})"
                          + ("; several GPUs are taken to lose only what sending gradients costs (measured on two)" if any(o.gpus > 1 for o in found) else ""))]

# %%
#| export
def disk_need(
    jobs, # of Job, parameters resolved
    sizes:dict, # of `check_data`
)->tuple: # (GB of checkpoints and models, GB of decoded frames)
    "What a run writes that is large"
    weights, largest, frames = 1., 0., 0.
    for j in jobs:
        if "model" not in j.params or j.params.get("judge") or not (size := model_size(j.params["model"])): continue
        for t,_ in variants_of(j, 1): # two checkpoints with AdamW's moments while it trains, then the result alone
            trained = size.adapters(t.lora_r) if t.lora_r else size.total
            weights, largest = weights + (2 if t.lora_r or t.sharded else 4)*size.total/1e9, max(largest, 2*12*trained/1e9)
        frames = max(frames, sizes["videos"]*load_of(size, frames_of(j.params), sizes["mean_s"]).cache_bytes/1e9)
    return weights + largest, frames

# %%
#| export
def listed(
    rows, # of `unusable`
    path, # jsonl to write
)->Finding: # where the list is
    "Every video that cannot be used, in a file to work through"
    write_jsonl(path, rows)
    missing = sum(r["what"] == "missing" for r in rows)
    return Finding("note", "videos", f"{missing} missing and {len(rows) - missing} undecodable videos are listed in {path}")

# %%
#| export
def preflight(
    config:dict, # params file
    root="runs", # where the runs are
    cards:int=0, # GPUs to plan for; 0: those of this machine
    card:str="", # their kind, as H100; empty: those of this machine
)->list: # of Finding; nothing is missing if none has level `missing`
    "Everything that can be known before a run starts"
    plan = plan_run(config, root)
    base = (config.get("shared") or {}).get("model", "tiny") # what is trained has the size of its base
    fill = lambda p: p | ({"model": base} if str(p.get("model", "")).endswith("/training/final") else {})
    jobs = [type(j)(j.name, j.stage, fill(check_params(stage_notebook(j.stage), j.params)), j.needs) for j in plan]
    first = next((j for j in jobs if j.stage == "prepare"), None)
    out = [Finding("ok", "params", f"{len(jobs)} stages, all parameters known")]
    models = {j.params["model"] for j in jobs if "model" in j.params and not j.params.get("judge")}
    out += [check_model(m) for m in sorted(models)]
    found, sizes, useless = check_data(first.params) if first else ([], NOTHING, [])
    if useless: found.append(listed(useless, repo_path(root)/config["run"]/"unusable.jsonl"))
    out += found + estimates(jobs, sizes, cards, card)
    free, (weights, frames) = shutil.disk_usage(repo_path()).free/1e9, disk_need(jobs, sizes)
    said = f"{free:.0f} GB free, about {weights:.0f} GB for checkpoints and {frames:.1f} GB for decoded frames"
    return out + [Finding("ok" if free > weights + frames else "missing", "disk", said)]

# %%
found = preflight(load_params(repo_path("params/smoke.yaml")))
assert not [o for o in found if o.level == "missing"]
[(o.level, o.what) for o in found]

# %% [markdown]
A real run on this machine: what it lacks is named, and nothing was started.

# %%
found = preflight(load_params(repo_path("params/charades_qwen2_5_vl_3b.yaml")))
[o.what for o in found if o.level == "missing"]

# %% [markdown]
A params file with a mistake fails here as it would in the run:

# %%
with expect_fail(ValueError, "did you mean 'train'"): preflight(dict(run="x", trian={}))

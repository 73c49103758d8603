"The dress rehearsal of params/rehearsal.yaml: a model folder, annotations of real clips, `vtg run` killed once and called again"
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("VTG_SHARED_DATA", ROOT.parent/"shared/data"))
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
REAL = dict(max_position_embeddings=32768, initializer_range=.02, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
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


def write_annotations(folder, repeat=1):
    "train.jsonl and heldout.jsonl about the clips that are there; `repeat` asks each query so often"
    rows = dict(train=[], heldout=[])
    for i, line in enumerate((SHARED/"annotated_clips.jsonl").read_text().splitlines()):
        r, video = json.loads(line), SHARED/json.loads(line)["video"]
        if not video.is_file(): continue
        role = "heldout" if any(o in video.name for o in HELDOUT) else "train"
        spans = [[a, min(b, r["duration"])] for a, b in r["spans"]]
        rows[role] += [dict(qid=f"{r['vid']}_{i}_{k}", vid=r["vid"], video=str(video.resolve()), duration_s=r["duration"], query=r["query"], spans=spans,
                            source="clips", split=role) for k in range(repeat if role == "train" else 1)]
    for role, found in rows.items(): (folder/f"{role}.jsonl").write_text("".join(json.dumps(o) + "\n" for o in found))
    return {k: len(v) for k, v in rows.items()}


def write_params(folder, device="cpu", steps=0, given=()):
    "params/rehearsal.yaml with places and sizes filled in; `given` are section.name=value, as in shared.grpo={...}"
    config = yaml.safe_load((ROOT/"params/rehearsal.yaml").read_text())
    config["shared"] |= dict(model=str(folder/"model"), device=device)
    config["prepare"] |= dict(train=str(folder/"train.jsonl"), heldout=str(folder/"heldout.jsonl"), videos=str(SHARED/"clips"))
    for o in ("grpo", "sft"): config["shared"][o] |= dict(steps=steps) if steps else {}
    for o in given:
        name, value = o.split("=", 1)
        section, key = name.split(".")
        value = yaml.safe_load(value)
        config[section][key] = config[section].get(key, {}) | value if isinstance(value, dict) else value
    (folder/"params.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder/"params.yaml"


def vtg(folder, *more):
    main = [sys.executable, "-c", "import sys; from videotg_r1.cli import main; sys.exit(main())", "run", str(folder/"params.yaml"),
            "--runs", str(folder/"runs"), "--reports", str(folder/"reports"), *more]
    return subprocess.Popen(main, cwd=ROOT, start_new_session=True)


def rehearse(folder, kill_after="train-videotg_r1", timeout_s=3600.):
    "Run; kill -9 when that stage's history has two rows; run again. Returns the report's folder"
    run, end = vtg(folder, "--jobs", "1"), time.monotonic() + timeout_s
    history = folder/"runs/rehearsal"/kill_after/"training/history.jsonl"
    while run.poll() is None and time.monotonic() < end:
        if history.is_file() and history.read_bytes().count(b"\n") >= 3:
            os.killpg(run.pid, signal.SIGKILL)
            break
        time.sleep(.1)
    run.wait()
    assert run.returncode == -signal.SIGKILL, f"`vtg run` ended with {run.returncode} before it was killed"
    again = vtg(folder, "--jobs", "1")
    assert again.wait(timeout_s) == 0, f"`vtg run`, called again, ended with {again.returncode}"
    result = json.loads((folder/"runs/rehearsal"/kill_after/"training/final/complete.json").read_text())["info"]
    return folder/"reports/rehearsal", result["resumed_from"]


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("folder", type=Path, help="for the model, the annotations, the run and its report")
    p.add_argument("--shape", default="", help="of a released model, as Qwen2.5-VL-3B (default: a small one)")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--steps", type=int, default=0, help="of training (default: as in params/rehearsal.yaml)")
    p.add_argument("--repeat", type=int, default=1, help="how often each query is asked, to make a run longer")
    p.add_argument("--set", nargs="*", default=[], metavar="section.name=value", help="over params/rehearsal.yaml, as shared.frames='{max_frames: 64}'")
    a = p.parse_args()
    a.folder = a.folder.resolve()
    a.folder.mkdir(parents=True, exist_ok=True)
    print(f"{write_annotations(a.folder, a.repeat)} samples", flush=True)
    if not (a.folder/"model/config.json").is_file(): print(f"{write_model(a.folder/'model', a.shape, a.device)/1e9:.3f} G parameters", flush=True)
    write_params(a.folder, a.device, a.steps, a.set)
    began = time.monotonic()
    report, resumed = rehearse(a.folder)
    print(f"{report}/index.html after {time.monotonic() - began:.0f} s; killed once, training went on from step {resumed}")

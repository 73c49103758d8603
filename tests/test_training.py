"""Training through TRL: the same update as a plain loop, and a resumed run that is the uninterrupted run."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from videotg_r1 import grpo, sft
from videotg_r1.curriculum import Curriculum, CurriculumConfig
from videotg_r1.engine import sample, token_logps
from videotg_r1.grpo import GRPOSettings, train_grpo
from videotg_r1.ledger import fingerprint
from videotg_r1.policy import encode, frame_spec, load_policy, random_policy
from videotg_r1.prediction import size_of
from videotg_r1.records import Sample
from videotg_r1.sft import SFTSettings, train_sft
from videotg_r1.synthetic import write_video
from videotg_r1.training import History, checkpoints, prompt_order, read_sample, weights_digest
from videotg_r1.video import FrameCache

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
SIZES = {"qwen2_5_vl": 28, "qwen3_vl": 32}


def letters(text, s): return sum(c.isalpha() for c in text)/20 + len(text)/50  # dense: a random policy gets spread
FNS = {"letters": letters}


def write_clip(path, span, seconds=6, fps=2, size=64):
    "A square that is bright during a span"
    frames = np.full((seconds*fps, size, size, 3), 40, np.uint8)
    frames[[span[0] <= i/fps <= span[1] for i in range(seconds*fps)], 16:48, 16:48] = 220
    write_video(path, frames, fps)


def make_samples(folder):
    out = []
    for i, span in enumerate([(1., 3.), (2., 5.), (0., 2.), (3., 5.5)]):
        write_clip(folder/f"v{i}.mp4", span)
        out.append(Sample(qid=f"q{i}", vid=f"v{i}", video=str(folder/f"v{i}.mp4"), duration_s=6., query="a square is bright", spans=(span,)))
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return make_samples(folder), FrameCache(folder/"cache", 10**8)


def spec_for(policy): return frame_spec(policy, fps=1., min_pixels=4*SIZES[policy.family]**2, max_pixels=4*SIZES[policy.family]**2)


def settings(**kw):
    base = dict(steps=2, prompts_per_step=2, G=4, lr=1e-2, max_completion_length=6, rewards={"letters": 1.}, save_steps=0, seed=3)
    return GRPOSettings(**{**base, **kw})


def run(world, out_dir, cfg, family="qwen2_5_vl", curriculum=None, policy=None, **kw):
    policy = policy or random_policy(family)
    out = train_grpo(policy, world[0], cfg, out_dir, curriculum=curriculum, frame_spec=spec_for(policy), cache=world[1],
                     progress=False, **{"reward_fns": FNS, **kw})
    return policy, out


def rows_of(out): return History(out["history"]).rows()


# ---------------------------------------------------------------- one update, two ways
def advantages(rewards, scale="group"):
    spread = {"group": rewards.std(1, keepdim=True), "batch": rewards.std(), "none": 1 - 1e-4}[scale]
    return (rewards - rewards.mean(1, keepdim=True))/(spread + 1e-4)


def plain_update(world, cfg):
    "One step of GRPO written out: each answer behind its own copy of the prompt, one SGD step"
    policy, (samples, cache) = random_policy(), world
    chosen = [samples[i] for i in prompt_order(4, cfg.prompts_per_step, cfg.seed)]
    encs = [encode(policy, read_sample(s, spec_for(policy), cache), grpo.task_prompt(s)) for s in chosen]
    seeds = [int(fingerprint([cfg.seed, 0, s.qid]), 16) for s in chosen]
    r = sample(policy, encs, G=cfg.G, max_new_tokens=cfg.max_completion_length, seed=seeds)
    adv = advantages(torch.tensor([[letters(t, None) for t in g] for g in r.texts]), cfg.scale_rewards)
    logps = token_logps(policy, encs, r.ids, r.mask, packed=False)
    terms, m = -(logps - logps.detach()).exp()*adv[..., None], r.mask.float()
    likely = -logps*adv[..., None]                                    # on policy the weights of cispo and vespo are 1
    loss = {"grpo": lambda: ((terms*m).sum(-1)/m.sum(-1)).mean(), "bnpo": lambda: (terms*m).sum()/m.sum(),
            "dapo": lambda: (terms*m).sum()/m.sum(), "cispo": lambda: (likely*m).sum()/m.sum(), "vespo": lambda: (likely*m).sum()/m.sum(),
            "luspo": lambda: (terms*m).sum(-1).mean(),
            "sapo": lambda: ((terms*m).sum(-1)/m.sum(-1)).mean(),     # its sigmoid has the slope of the ratio where that is 1
            "dr_grpo": lambda: (terms*m).sum()/(m[..., 0].numel()*cfg.max_completion_length)}[cfg.loss_type]()
    loss.backward()
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.grad is not None: p -= cfg.lr*p.grad
    return policy, loss.item()


def gap(a, b): return max(float((x - y).abs().max()) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))


@pytest.mark.parametrize(("loss_type", "scale"), [("grpo", "group"), ("dapo", "batch"), ("dr_grpo", "none"), ("bnpo", "group"), ("cispo", "group"),
                                                  ("sapo", "batch"), ("luspo", "none"), ("vespo", "group")])
def test_one_step_is_the_plain_one(world, tmp_path, loss_type, scale):
    cfg = settings(steps=1, loss_type=loss_type, scale_rewards=scale, epsilon_high=5. if loss_type == "cispo" else .2, optim="sgd", max_grad_norm=0.)
    ours, out = run(world, tmp_path, cfg)
    plain, _ = plain_update(world, cfg)
    assert gap(ours, random_policy()) > 1e-4, "the step must move the weights"
    assert gap(ours, plain) < 1e-6
    row = rows_of(out)[0]
    assert row["sampling/sampling_logp_difference/max"] < 1e-5
    assert row["reward_std"] > 0 and row["step"] == 1


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_accumulation_changes_nothing(world, tmp_path, loss_type):
    cfg = settings(steps=1, loss_type=loss_type, optim="sgd", max_grad_norm=0.)
    whole, _ = run(world, tmp_path/"a", cfg)
    parts, _ = run(world, tmp_path/"b", replace(cfg, grad_accum=2))
    split, _ = run(world, tmp_path/"c", replace(cfg, grad_accum=4))    # half a group at a time
    assert gap(whole, parts) < 1e-6
    assert gap(whole, split) < 1e-6


def test_dead_groups_cost_nothing_and_change_nothing(world, tmp_path):
    def half_dead(text, s): return letters(text, s) if s.qid in ("q0", "q1") else 1.
    out = {}
    for skip in (True, False):
        policy, cfg = random_policy(), settings(steps=1, prompts_per_step=4, optim="sgd", max_grad_norm=0., skip_dead=skip)
        s = train_grpo(policy, world[0], cfg, tmp_path/str(skip), frame_spec=spec_for(policy), cache=world[1],
                       reward_fns={"letters": half_dead}, progress=False)
        out[skip] = policy, rows_of(s)[0]
    assert gap(out[True][0], out[False][0]) < 1e-6 < gap(out[True][0], random_policy())
    (_, a), (_, b) = out[True], out[False]
    assert a["frac_reward_zero_std"] == b["frac_reward_zero_std"] == .5
    assert a["total/flops"] < .7*b["total/flops"] and abs(a["loss"] - b["loss"]) < 1e-6


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_equal_rewards_are_equal_whatever_their_mean_rounds_to(world, tmp_path, loss_type):
    "The mean of eight times .9 is not .9 in 32 bits: what is left must neither teach nor count as a preference"
    assert (torch.full((8,), .9).mean() != torch.tensor(.9)).item()
    same = {"letters": lambda text, s: .9}
    for scale in ("group", "none"):
        cfg = settings(steps=1, G=8, loss_type=loss_type, scale_rewards=scale, optim="sgd", lr=1., max_grad_norm=0.)
        policy, out = run(world, tmp_path/scale, cfg, reward_fns=same)
        assert gap(policy, random_policy()) == 0 and rows_of(out)[0]["frac_reward_zero_std"] == 1


@pytest.mark.parametrize("beta", [0., .1])
def test_a_step_whose_answers_are_all_cut_off_moves_nothing(world, tmp_path, beta):
    policy, out = run(world, tmp_path, settings(steps=1, max_completion_length=2, mask_truncated=True, beta=beta, optim="sgd"))
    row = rows_of(out)[0]
    assert row["completions/clipped_ratio"] == 1 and row["loss"] == 0 and gap(policy, random_policy()) == 0


# ---------------------------------------------------------------- options keep working
def test_reference_model_is_the_starting_policy(world, tmp_path):
    start = random_policy(seed=5)                                     # not what any name in a config would load
    _, out = run(world, tmp_path, settings(steps=3, beta=.1), policy=start)
    kl = [r["kl"] for r in rows_of(out)]
    assert kl[0] < 1e-9 and kl[2] > 1e-6


def test_several_iterations(world, tmp_path):
    _, out = run(world, tmp_path, settings(steps=4, num_iterations=2, grad_accum=2, beta=.02, save_steps=2, loss_type="dapo"))
    rows = rows_of(out)
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert rows[1]["total/samples"] == rows[0]["total/samples"] == 2 < rows[2]["total/samples"]    # second pass over the same answers
    assert "sampling/sampling_logp_difference/max" in rows[0] and "sampling/sampling_logp_difference/max" not in rows[1]
    assert all(np.isfinite(r["loss"]) for r in rows)


def test_lora(world, tmp_path):
    cfg = settings(steps=4, lora_r=2, freeze_vision=True, beta=.1, save_steps=2, lr=1e-2)
    ours, out = run(world, tmp_path/"a", cfg)
    names = [k for k, v in ours.model.state_dict().items() if not torch.equal(v, random_policy().model.state_dict()[k])]
    assert names and all("language_model" in n for n in names)
    assert not any("lora" in k for k in ours.model.state_dict())
    assert rows_of(out)[0]["kl"] < 1e-9 < rows_of(out)[3]["kl"]
    stop_at(world, tmp_path/"b", cfg, 3)
    again, out = run(world, tmp_path/"b", cfg)
    assert out["resumed_from"] == 2 and gap(again, ours) == 0


def test_gradient_checkpointing_and_frozen_vision(world, tmp_path):
    cfg = settings(steps=1, optim="sgd", max_grad_norm=0., freeze_vision=True)
    a, _ = run(world, tmp_path/"a", cfg)
    b, _ = run(world, tmp_path/"b", replace(cfg, gradient_checkpointing=True))
    assert gap(a, b) < 1e-6
    assert not any(getattr(m, "gradient_checkpointing", False) for m in b.model.modules()) and all(p.requires_grad for p in b.model.parameters())
    assert torch.equal(b.model.model.visual.blocks[0].attn.qkv.weight, random_policy().model.model.visual.blocks[0].attn.qkv.weight)


def hard(transfer="none", how="blank", schedule="linear"):
    rows = [dict(qid=f"q{i}", difficulty=.9, bin="hard") if i % 2 else dict(qid=f"q{i}", difficulty=.1, bin="easy") for i in range(4)]
    return Curriculum(CurriculumConfig(schedule=schedule, start=1., until=1., transfer=transfer, how=how, reach_s=1., margin_s=.5), rows), rows


@pytest.mark.parametrize("how", ["blank", "drop"])
def test_curriculum_at_the_exact_step(world, tmp_path, how):
    cur, rows = hard(how=how)
    _, out = run(world, tmp_path, settings(steps=4, prompts_per_step=4), curriculum=cur, difficulties=rows)
    got = rows_of(out)
    for i, r in enumerate(got):                                       # every step sees all four samples, two of them hard
        assert abs(r["curriculum/ratio"] - cur.ratio(i, 4)) < 1e-6 and r["curriculum/masked"] == .5
        assert "dead_groups/hard" in r and "dead_groups/easy" in r
    assert got[0]["sampling/sampling_logp_difference/max"] < 1e-5
    if how == "drop": assert got[0]["total/visual_tokens"] < got[3]["total/visual_tokens"] - got[2]["total/visual_tokens"]


def test_hint_transfer_trains_on_the_whole_video(world, tmp_path):
    cur, rows = hard(transfer="all")
    _, out = run(world, tmp_path, settings(steps=2, prompts_per_step=4), curriculum=cur, difficulties=rows)
    r = rows_of(out)[0]
    assert r["curriculum/hint_logp_difference"] > 1e-4 > r["sampling/sampling_logp_difference/max"]


@pytest.mark.parametrize("how", ["all", "one"])
def test_hints_carry_importance_weights(world, tmp_path, how):
    "A weight of nothing moves nothing; one answer in four is a hint; both kinds of weight differ from none."
    rows = [dict(qid=f"q{i}", difficulty=.9, bin="hard") for i in range(4)]
    def trained(name, **kw):
        cur = Curriculum(CurriculumConfig(start=1., until=1., transfer=how, reach_s=1., margin_s=.5, **kw), rows)
        return run(world, tmp_path/name, settings(prompts_per_step=4, optim="sgd", lr=1., max_grad_norm=0.), curriculum=cur, difficulties=rows)
    plain, out = trained("none", transfer_weight="none")
    assert rows_of(out)[0]["curriculum/hint_logp_difference"] > 1e-4 and "curriculum/hint_weight" not in rows_of(out)[0]
    token, out = trained("token")
    sequence, _ = trained("sequence", transfer_weight="sequence")
    nothing, _ = trained("cap", transfer_cap=1e-9)
    assert .3 < rows_of(out)[0]["curriculum/hint_weight"] <= 2
    assert gap(plain, token) > 1e-7 and gap(plain, sequence) > 1e-7 and gap(token, sequence) > 1e-7
    moved = gap(nothing, random_policy())
    assert moved < 1e-7 if how == "all" else moved > 1e-7


def test_a_parity_break_ends_the_run(world, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "token_logps", lambda *a, **k: tuple(x*1.1 for x in token_logps(*a, **k)))
    with pytest.raises(RuntimeError, match="do not see the same inputs"): run(world, tmp_path, settings())


def test_bf16_keeps_fp32_weights(world, tmp_path):
    policy, out = run(world, tmp_path, settings(steps=2, precision="bf16", lr=1e-3))
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32} and gap(policy, random_policy()) > 0
    assert rows_of(out)[0]["sampling/sampling_logp_difference/mean"] < .05


def test_a_reward_nobody_can_give_moves_nothing(world, tmp_path):
    policy = random_policy()
    train_grpo(policy, world[0], settings(rewards={"none": 1.}), tmp_path, frame_spec=spec_for(policy), cache=world[1],
               reward_fns={"none": lambda t, s: None}, progress=False)
    assert gap(policy, random_policy()) == 0


# ---------------------------------------------------------------- resume
class Stop(Exception): pass


def stop_at(world, out_dir, cfg, step, family="qwen2_5_vl", curriculum=None, **kw):
    "Train until the given step begins"
    look, seen = grpo.VideoGRPO.look, []
    def stopping(self, qids):
        if self.state.global_step == step: raise Stop
        seen.append(self.state.global_step)
        return look(self, qids)
    grpo.VideoGRPO.look = stopping
    try:
        with pytest.raises(Stop): run(world, out_dir, cfg, family, curriculum, **kw)
    finally: grpo.VideoGRPO.look = look
    return seen


TIMES = ("elapsed_s", "step_time")
def strip(rows): return [{k: v for k, v in r.items() if k not in TIMES} for r in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_grpo_resumes_exactly(world, tmp_path, family):
    cfg = settings(steps=4, save_steps=2, schedule="linear", warmup_steps=1, beta=.05)
    make = lambda: hard(schedule="adaptive")[0]
    ours, out = run(world, tmp_path/"a", cfg, family, make())
    assert stop_at(world, tmp_path/"b", cfg, 3, family, make()) == [0, 1, 2]
    assert [r["step"] for r in History(tmp_path/"b"/"history.jsonl").rows()] == [1, 2, 3]
    again, out2 = run(world, tmp_path/"b", cfg, family, make())
    assert out2["resumed_from"] == 2
    assert strip(rows_of(out)) == strip(rows_of(out2))
    assert gap(ours, again) == 0
    assert {k: out2[k] for k in ("tokens", "n", "fingerprint")} == {k: out[k] for k in ("tokens", "n", "fingerprint")}
    assert weights_digest(load_policy(out2["final"]).model) == weights_digest(ours.model)


@pytest.mark.parametrize("lora_r", [0, 2])
def test_a_policy_in_16_bits_resumes_exactly(world, tmp_path, monkeypatch, lora_r):
    "As on a GPU: what is frozen stays in 16 bits, and what is trained is held in 32"
    cfg, look = settings(steps=3, save_steps=2, precision="bf16", freeze_vision=True, lr=1e-4, lora_r=lora_r), grpo.VideoGRPO.look
    def types(self, qids):
        assert {p.dtype for p in self.model.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in self.model.parameters() if not p.requires_grad} == {torch.bfloat16}
        size = size_of(self.policy.model.config.to_dict())                # what preflight says weights take
        if lora_r: assert sum(p.nbytes for p in self.model.parameters()) == 2*size.total + 4*size.adapters(lora_r)
        return look(self, qids)
    monkeypatch.setattr(grpo.VideoGRPO, "look", types)
    def low():
        policy = random_policy(); policy.model.to(torch.bfloat16)
        return policy
    ours, out = run(world, tmp_path/"a", cfg, policy=low())
    stop_at(world, tmp_path/"b", cfg, 2, policy=low())
    again, out2 = run(world, tmp_path/"b", cfg, policy=low())
    for rows in ((one := strip(rows_of(out))), (two := strip(rows_of(out2)))):
        for r in rows: r.pop("total/flops") # a frozen tower's features are kept by a process, so the second one looks at the clips again
    assert out2["resumed_from"] == 2 and one == two and gap(ours, again) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_resumes_exactly(world, tmp_path, family, monkeypatch):
    cfg = SFTSettings(steps=4, batch_size=2, lr=1e-2, save_steps=2, warmup_steps=1)
    def go(where, policy): return train_sft(policy, world[0], cfg, where, frame_spec=spec_for(policy), cache=world[1], progress=False)
    ours = random_policy(family); out = go(tmp_path/"a", ours)
    loss = sft.VideoSFT.compute_loss
    with monkeypatch.context() as m:
        def stopping(self, *a, **k):
            if self.state.global_step == 3: raise Stop
            return loss(self, *a, **k)
        m.setattr(sft.VideoSFT, "compute_loss", stopping)
        with pytest.raises(Stop): go(tmp_path/"b", random_policy(family))
    again = random_policy(family); out2 = go(tmp_path/"b", again)
    assert out2["resumed_from"] == 2 and gap(ours, again) == 0
    assert strip(rows_of(out)) == strip(rows_of(out2))


def test_other_settings_data_or_weights_are_refused(world, tmp_path):
    cfg = settings(steps=1)
    run(world, tmp_path, cfg)
    with pytest.raises(ValueError, match="settings.lr: 0.01 -> 0.02"): run(world, tmp_path, replace(cfg, lr=2e-2))
    with pytest.raises(ValueError, match="weights"): run(world, tmp_path, cfg, policy=random_policy(seed=1))
    with pytest.raises(ValueError, match="samples"): run((world[0][:3], world[1]), tmp_path, cfg)
    before = (tmp_path/"history.jsonl").stat().st_mtime_ns
    _, out = run(world, tmp_path, cfg)                              # finished: nothing is trained
    assert (tmp_path/"history.jsonl").stat().st_mtime_ns == before and out["steps"] == 1


# ---------------------------------------------------------------- what lies on disk
def test_a_checkpoint_holds_no_pickle_that_is_loaded_unsafely(world, tmp_path, monkeypatch):
    cfg = settings(steps=2, save_steps=1, keep_checkpoints=3)
    _, out = run(world, tmp_path, cfg)
    kept = checkpoints(tmp_path)
    assert sorted(kept) == [1, 2]
    files = {p.name for p in kept[2].iterdir()}
    assert "model.safetensors" in files and not files & {"training_args.bin", "pytorch_model.bin"}
    for name in ("optimizer.pt", "scheduler.pt"): torch.load(kept[2]/name, weights_only=True)
    run_json = json.loads((tmp_path/"run.json").read_text())
    assert run_json["fingerprint"] == out["fingerprint"] and run_json["meta"]["settings"]["beta"] == 0.

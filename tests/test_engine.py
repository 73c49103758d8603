"The engine against the plain path, for both families: shared prompts, features, masks, dropped frames, adapters"
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from videotg_r1.attention import compile_layers
from videotg_r1.engine import (
    STEPS_A_ROUND,
    Prompts,
    answer_probability,
    go_on,
    prefill,
    prompt_plan,
    sample,
    token_logps,
)
from videotg_r1.ledger import Ledger, read_ledger
from videotg_r1.policy import (
    FAMILIES,
    TEST_CORPUS,
    FeatureCache,
    build_policy,
    collate,
    encode,
    load_policy,
    prepare,
    random_policy,
    see,
    train_tokenizer,
    unwrap,
)
from videotg_r1.records import read_samples

WORLD = Path(__file__).parent/"data/world"

# Traps that public trainers or the libraries below us fell into, each with its test:
# the time between frames reaches sampling but not scoring, or is cut to whole seconds ... test_time_reaches_sampling_and_scoring_alike
# frames without a rate of their own are taken for 24 a second ......................... the same
# answers are scored without the video that they were drawn with ...................... test_scores_depend_on_the_video
# a drawn answer holds a vision token, to which no pixels belong ...................... test_vision_tokens_are_never_drawn
# a frozen tower is back-propagated, since checkpointing hooks its input ............... test_a_frozen_tower_is_not_back_propagated
# a curriculum moves one step too early; a resumed training loads no weights ........... tests/test_training.py


def clip(n, side, seed=0, fps=2.):
    frames = np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    return SimpleNamespace(frames=frames, frame_ts=np.arange(n)/fps, fps=fps, duration_s=n/fps)


def prompts(p):
    "Four prompts of different length: whole, half blank, short, and the half blank one with pairs dropped"
    a, b, c = (clip(n, 2*p.factor, n) for n in (8, 16, 4))
    b.frames[4:10] = 0
    return [encode(p, a, "Does it rain?"), encode(p, b, "When does it end? Give start and end."), encode(p, c, "Hi"),
            encode(p, b, "Hi", drop=np.arange(8) % 3 == 1)]


def with_lora(p):
    from peft import LoraConfig, get_peft_model
    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(): # some draws make the shipped model so rough that rounding shows at 1e-5
        torch.manual_seed(0)
        p.model = get_peft_model(p.model, LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)", init_lora_weights=False))
    return p


@pytest.fixture(scope="module", params=[(f, lora) for f in ("qwen2_5_vl", "qwen3_vl", "tiny") for lora in (False, True)],
                ids=lambda o: o[0] + ("+lora" if o[1] else ""))
def policy(request):
    family, lora = request.param
    p = load_policy("tiny", device="cpu") if family == "tiny" else random_policy(family)
    return with_lora(p) if lora else p


def gradients(p, logps, weight):
    p.model.zero_grad()
    (logps*weight).sum().backward()
    return {n: x.grad.clone() for n, x in p.model.named_parameters() if x.grad is not None}


def close(a, b, p, eps=1e-6):
    "Equal to eps times the size of the logits (whose last bit is what 32 bits can tell)"
    with torch.no_grad(): size = float(prefill(p, prompts(p)).logits.abs().max())
    return float((a - b).detach().abs().max()) <= eps*max(1., size)


def ragged(r):
    "Masks as training makes them: one answer cut, one left out, one with a hole"
    r.mask[0, 0, 4:] = False
    if r.mask.shape[1] > 2: r.mask[1, 1] = False; r.mask[2, 2, 2] = False
    return r


@pytest.mark.parametrize("G", [3, 1])
def test_shared_equals_plain(policy, G):
    "Log-probabilities to 1e-6, every parameter's gradient to 1e-5, by one row and by prompts read once"
    es = prompts(policy)
    r = ragged(sample(policy, es, G=G, max_new_tokens=10, seed=1))
    weight = torch.randn(r.mask.shape, generator=torch.Generator().manual_seed(0))
    plain, entropy = token_logps(policy, es, r.ids, r.mask, packed=False, with_entropy=True)
    want = gradients(policy, plain, weight)
    for read in (None, prefill(policy, es)):
        logps, ent = token_logps(policy, es, r.ids, r.mask, with_entropy=True, prompts=read)
        assert close(logps, plain, policy)
        assert (ent - entropy).abs().max() < 5e-5
        got = gradients(policy, logps, weight)
        assert set(got) == set(want)
        assert max(float((got[k] - want[k]).norm()/want[k].norm()) for k in want if want[k].norm() > 0) < 1e-5


def test_sure_tokens_have_the_gradient_of_the_plain_path():
    "At a low temperature the shipped model is all but sure of every token, and what is left is the gradient; from logits of 60 it was 1 % off"
    p = load_policy("tiny", device="cpu")
    es = prompts(p)
    r = sample(p, es, G=3, temperature=.1, max_new_tokens=10, seed=1)
    want, got = (gradients(p, token_logps(p, es, r.ids, r.mask, packed=packed, temperature=.1), 1.) for packed in (False, True))
    assert max(float((got[k] - want[k]).norm()/want[k].norm()) for k in want) < 1e-4


def test_a_language_model_thinner_than_its_deepstack_is_read():
    p = build_policy("qwen3_vl", train_tokenizer(TEST_CORPUS*4, 400), dict(num_hidden_layers=1))
    es = prompts(p)
    with torch.no_grad(): assert (prefill(p, es).logits - p.model(**collate(p, es)).logits[:, -1]).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [1., .7])
def test_sampled_equals_teacher_forced(policy, temperature):
    es = prompts(policy)
    r = sample(policy, es, G=3, max_new_tokens=10, temperature=temperature, seed=2)
    with torch.no_grad(): again = token_logps(policy, es, r.ids, r.mask, packed=False, temperature=temperature)
    assert close(again, r.logps, policy, 1e-6/temperature)


def test_features_are_as_good_as_patches(policy):
    es = prompts(policy)
    seen, n = see(policy, es)
    assert n < sum(int(e.grid_thw[0, 0]) for e in es)                   # blank and repeated pairs once
    r = sample(policy, es, G=2, max_new_tokens=8)
    assert sample(policy, seen, G=2, max_new_tokens=8).texts == r.texts
    with torch.no_grad(): a, b = (token_logps(policy, o, r.ids, r.mask) for o in (es, seen))
    assert close(a, b, policy)


def test_blocks_of_one_size_change_nothing(policy):
    "Prompts read side by side with fillers that nobody sees: the same answers, scores and further questions"
    es = prompts(policy)[:3]
    want, size = sample(policy, es, G=2, max_new_tokens=8, seed=1), max(map(len, es)) + 5
    with torch.no_grad():
        read = prefill(policy, es, even=size)
        assert read.layout.lengths == [n for e in es for n in (len(e), size - len(e))]
        got = sample(policy, es, G=2, max_new_tokens=8, seed=1, prompts=read)
        assert got.texts == want.texts and (got.logps - want.logps).abs().max() < 1e-4
        a, b = (token_logps(policy, es, want.ids, want.mask, prompts=o) for o in (read, None))
        assert close(a, b, policy)
        other = [replace(encode(policy, clip(n, 2*policy.factor, n), "And now?"), frames=e.frames) for n, e in zip((8, 16, 4), es, strict=True)]
        assert (go_on(policy, read, other).logits - prefill(policy, other).logits).abs().max() < 1e-4


def test_the_queue_changes_nothing(policy, monkeypatch):
    "More prompts than slots, answers that end at different times: the same answers in any number of slots and any order, asked as seldom as on a GPU too"
    es = prompts(policy)*2
    want = sample(policy, es, G=2, max_new_tokens=12, temperature=2., seed=list(range(8)))
    for slots in (1, 3):
        r = sample(policy, es, G=2, max_new_tokens=12, temperature=2., seed=list(range(8)), batch_size=slots)
        assert r.texts == want.texts and (r.logps - want.logps).abs().max() < 1e-4
    monkeypatch.setitem(STEPS_A_ROUND, "cpu", STEPS_A_ROUND["cuda"])
    back = sample(policy, es[::-1], G=2, max_new_tokens=12, temperature=2., seed=list(range(8))[::-1], batch_size=3)
    assert back.texts == want.texts[::-1] and (back.logps.flip(0) - want.logps).abs().max() < 1e-4


def test_empty_slots_change_nothing(policy, monkeypatch):
    "A GPU's decoder has more slots than there are prompts in flight"
    from videotg_r1 import engine
    es = prompts(policy)
    want = sample(policy, es, G=2, max_new_tokens=8, seed=3)
    monkeypatch.setattr(engine, "decoder_for", lambda policy, model, slots, *how: engine.Decoder(policy, engine.room_for(slots + 8), *how))
    for most in (3, 4):
        r = sample(policy, es, G=2, max_new_tokens=8, seed=3, batch_size=most)
        assert r.texts == want.texts and (r.logps - want.logps).abs().max() < 1e-4
    assert [engine.room_for(n) for n in (1, 7, 8, 9, 32, 33)] == [1, 7, 8, 16, 32, 40]


def test_the_last_layer_goes_on_at_the_ends_alone(policy):
    "Reading prompts, its MLP sees one token of each; the logits are those of the plain path, and what follows a failure too"
    es, seen_rows = prompts(policy)[:3], []
    layers = unwrap(policy.model).model.language_model.layers
    last = layers[-1]
    with torch.no_grad():
        want = policy.model(**collate(policy, es)).logits[:, -1]
        watch = last.mlp.register_forward_hook(lambda mlp, given, out: seen_rows.append(out.shape[1]))
        got = prefill(policy, es).logits
        watch.remove()
        with pytest.raises(RuntimeError): prefill(policy, [replace(es[0], features=torch.zeros(es[0].n_video_tokens, 3))])
    assert seen_rows == [3] and layers[-1] is last and "get_placeholder_mask" not in vars(unwrap(policy.model).model)
    assert close(got, want, policy)
    with torch.enable_grad(): assert close(prefill(policy, es).logits, want, policy)


def test_answers_stop_where_they_end(policy):
    "Nothing is drawn after an end token, and what ended by itself says so"
    eos = policy.eos_ids[0]
    r = sample(policy, prompts(policy), G=8, max_new_tokens=24, temperature=20., seed=0)
    for ids, mask, ended in zip(r.ids.flatten(0, 1), r.mask.flatten(0, 1), r.ended.flatten(), strict=True):
        n = int(mask.sum())
        assert mask[:n].all() and (ids[n:] == policy.pad_id).all() and eos not in ids[:n - 1].tolist()
        assert bool(ended) == (int(ids[n - 1]) in policy.eos_ids)


def test_vision_tokens_are_never_drawn(policy):
    r = sample(policy, prompts(policy), G=8, max_new_tokens=16, temperature=50.)
    assert not set(r.ids[r.mask].tolist()) & set(policy.suppressed_ids)


def test_questions_about_one_clip_share_it(policy):
    "The clip's tokens are read once, and every question gets the answer that it gets alone"
    c = clip(8, 2*policy.factor, 5)
    es = [encode(policy, c, q) for q in ("Does it rain?", "Does it rain or snow?", "Hi")] + prompts(policy)[:1]
    segments, _, chains, videos = prompt_plan(policy, es)
    assert len(videos) == 2 and [len(o) for o in chains] == [2, 2, 2, 1]
    assert sum(b - a for _, a, b in segments) < sum(map(len, es)) - es[0].n_video_tokens
    alone = torch.cat([answer_probability(policy, [e], ("yes", "no")) for e in es])
    assert (answer_probability(policy, es, ("yes", "no")) - alone).abs().max() < 1e-5
    r = sample(policy, es, G=2, max_new_tokens=8, seed=[1, 2, 3, 4])
    assert r.texts == [sample(policy, [e], G=2, max_new_tokens=8, seed=[i]).texts[0] for i, e in enumerate(es, 1)]
    w = torch.randn(r.mask.shape, generator=torch.Generator().manual_seed(0))
    a, b = (gradients(policy, token_logps(policy, es, r.ids, r.mask, packed=o), w) for o in (True, False))
    assert max(float((a[k] - b[k]).norm()/b[k].norm()) for k in b if b[k].norm() > 0) < 1e-5


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_answers_are_those_of_generate(family):
    "Dropped and blanked prompts too, against stock attention and the stock tower"
    from videotg_r1.engine import generate_kwargs
    p = random_policy(family)
    es = prompts(p)
    ours = sample(p, es, greedy=True, max_new_tokens=12)
    stock = prepare(random_policy(family), fast=False)
    for i, e in enumerate(es):
        theirs = stock.model.generate(**generate_kwargs(stock, e), max_new_tokens=12)[0, len(e):]
        assert theirs.tolist() == ours.ids[i, 0][ours.mask[i, 0]].tolist()


def test_a_frozen_tower_is_not_back_propagated():
    "Gradient checkpointing hooks the tower's input in some versions; features end the graph there"
    p = random_policy()
    for n, w in p.model.named_parameters(): w.requires_grad_("visual" not in n)
    es = see(p, prompts(p))[0]
    assert all(e.features is not None and not e.features.requires_grad for e in es)
    r = sample(p, es, G=2, max_new_tokens=6)
    token_logps(p, es, r.ids, r.mask).sum().backward()
    assert all(w.grad is None for n, w in p.model.named_parameters() if "visual" in n)


def test_a_trained_tower_refuses_features():
    p = random_policy()
    es = see(p, prompts(p))[0]
    r = sample(p, es, G=1, max_new_tokens=4)
    with pytest.raises(ValueError, match="vision tower is trained"): token_logps(p, es, r.ids, r.mask)


def test_gradient_checkpointing_recomputes_the_same():
    p, q = random_policy(), random_policy()
    es = prompts(p)
    r = sample(p, es, G=3, max_new_tokens=8)
    q.model.train()
    with warnings.catch_warnings(action="ignore"): q.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    a, b = (gradients(o, token_logps(o, es, r.ids, r.mask), 1.) for o in (p, q))
    assert set(a) == set(b) and max(float((a[k] - b[k]).norm()/a[k].norm()) for k in a if a[k].norm() > 0) < 1e-5


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_time_reaches_sampling_and_scoring_alike(family):
    "At a rate that is not 2 frames a second, times matter, and both see the same ones"
    p = random_policy(family)
    slow, fast = (encode(p, clip(16, 2*p.factor, 1, fps), "When?") for fps in (.7, 2.))
    r = sample(p, [slow], G=2, max_new_tokens=8)
    with torch.no_grad():
        assert (token_logps(p, [slow], r.ids, r.mask) - r.logps).abs().max() < 1e-5
        assert (token_logps(p, [fast], r.ids, r.mask) - r.logps).abs().max() > 1e-3


def test_scores_depend_on_the_video(policy):
    a, b = (encode(policy, clip(8, 2*policy.factor, seed), "When?") for seed in (1, 2))
    r = sample(policy, [a], G=2, max_new_tokens=8)
    with torch.no_grad(): assert (token_logps(policy, [b], r.ids, r.mask) - r.logps).abs().max() > 1e-3


def test_features_outlive_a_step_but_not_a_change_of_the_tower():
    p, held = random_policy(), FeatureCache()
    es = prompts(p)
    n = see(p, es, held)[1]
    assert n > 0 and see(p, es, held)[1] == 0
    with torch.no_grad(): p.model.model.language_model.norm.weight.add_(1)      # a step that leaves the tower alone
    assert see(p, es, held)[1] == 0
    with torch.no_grad(): p.model.model.visual.patch_embed.proj.weight.add_(1)
    assert see(p, es, held)[1] == n


def test_an_answer_without_a_counted_token_scores_nothing():
    p = random_policy()
    es = prompts(p)[:2]
    out = token_logps(p, es, torch.full((2, 2, 3), 7), torch.zeros(2, 2, 3, dtype=torch.bool))
    assert out.shape == (2, 2, 3) and not out.any()


def test_prompts_can_be_taken_apart():
    p = random_policy()
    es = prompts(p)
    with torch.no_grad(): read = prefill(p, es)
    r = sample(p, es, G=2, max_new_tokens=6, prompts=read)
    some = read.part([3, 1])
    assert isinstance(some, Prompts) and len(some) == 2
    with torch.no_grad(): logps = token_logps(p, [es[3], es[1]], r.ids[[3, 1]], r.mask[[3, 1]], prompts=some)
    assert (logps - r.logps[[3, 1]]).abs().max() < 1e-5


def exact_flash(q, k, v, part, scale):
    "What PyTorch's flash attention gives, by matrix products"
    out, norm = torch.zeros_like(q), torch.zeros(q.shape[1], len(q))
    for a, b, c, d in zip(part.cu_q, part.cu_q[1:], part.cu_k, part.cu_k[1:], strict=False):
        kk, vv = (x[c:d].repeat_interleave(q.shape[1]//k.shape[1], 1) for x in (k, v))
        s = torch.einsum("qhd,khd->hqk", q[a:b], kk)*scale
        if part.causal: s = s.masked_fill(~torch.ones(b - a, d - c, dtype=torch.bool).tril(), -torch.inf)
        norm[:, a:b], out[a:b] = s.logsumexp(-1), torch.einsum("hqk,khd->qhd", s.softmax(-1), vv)
    return out, norm


def test_a_compiled_layer_is_one_graph_for_all_rows(monkeypatch):
    "As on a GPU in 16 bits, with the kernels replaced: no break, the same numbers, and other rows compile nothing anew"
    from torch._dynamo.utils import counters

    from videotg_r1 import attention
    p = random_policy()
    es = prompts(p)
    r = sample(p, es, G=3, max_new_tokens=6)
    score = lambda which: token_logps(p, [es[i] for i in which], r.ids[which], r.mask[which]).detach()
    with torch.no_grad():
        want = {which: score([*which]) for which in ((0, 1, 2), (3,), (2, 1))}
        monkeypatch.setattr(attention, "flashes", lambda policy: True)
        monkeypatch.setattr(attention, "flash", exact_flash)
        attention.compile_layers(p, backend="eager")
        torch._dynamo.reset(); counters.clear()
        graphs, got = [], []
        for which in want:
            got.append(score([*which]))
            graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert all(close(a, b, p) for a, b in zip(got, want.values(), strict=True))
    assert len(set(graphs)) == 1 and graphs[0] <= 3, graphs     # a layer; the tower with windows and without


def test_agents_find_the_same_with_compiled_layers(tmp_path, monkeypatch):
    "Clips of every length go through one graph a kind of layer, and what is found does not change; the compiler itself needs a GPU to be worth its minute"
    from videotg_r1 import runners
    opened, made = runners.open_model, torch._dynamo.utils.counters["stats"]
    found = {}
    for compiled in (False, True):
        def open_model(*given, compiled=compiled):
            policy, spec = opened(*given)
            return (compile_layers(policy, backend="eager") if compiled else policy), spec
        monkeypatch.setattr(runners, "open_model", open_model)
        before = made["unique_graphs"]
        for fps in (1., .7, 2.):
            job = runners.AgentJob("estimate", str(tmp_path/f"{compiled}-{fps}.jsonl"), "tests/data/world/train.jsonl", "tiny", dict(k=3, max_new_tokens=16, batch_size=4), dict(fps=fps), device="cpu")
            runners.run_agent(job, progress=False)
            found[compiled, fps] = [{k: r[k] for k in ("qid", "ious", "bin")} for r in read_ledger(job.path)[1]]
    assert all(found[True, fps] == found[False, fps] and found[True, fps] for fps in (1., .7, 2.))
    assert made["unique_graphs"] - before <= 6


def test_layers_are_compiled_where_it_is_asked_for_on_a_gpu(monkeypatch):
    from videotg_r1 import runners
    made = []
    monkeypatch.setattr(runners, "compile_layers", made.append)
    monkeypatch.setattr(runners, "clip_reader", lambda *_: None)
    for device, compile in (("cuda", True), ("cuda", False), ("cpu", True)):
        monkeypatch.setattr(runners, "open_model", lambda *_, d=device: (SimpleNamespace(device=torch.device(d)), None))
        runners.Opening("m", {}, device, "", compile).open()
    assert [p.device.type for p in made] == ["cuda"]


@pytest.mark.parametrize("agent", ["reflect", "estimate", "predict"])
def test_an_agent_whose_tower_looks_ahead_finds_the_same(agent, tmp_path, monkeypatch):
    "Agents let a GPU do it; here the CPU does, so that the way from the agent to the decoder is taken"
    from videotg_r1 import difficulty, engine, evaluation, reflection
    from videotg_r1.policy import look_ahead
    work, cfg = dict(reflect=(reflection.reflect, reflection.ReflectConfig(k=2, threshold=.5, propose_from=0., max_new_tokens=24, batch_size=2)),
                     estimate=(difficulty.estimate, difficulty.DifficultyConfig(k=2, max_new_tokens=24, batch_size=2)),
                     predict=(evaluation.predict, evaluation.EvalConfig(max_new_tokens=24, batch_size=2)))[agent]
    samples = [replace(s, video=str(WORLD/s.video)) for s in read_samples(WORLD/"train.jsonl")]
    def rows(name):
        policy = load_policy("tiny", "cpu")
        with Ledger(tmp_path/name, {}) as ledger:
            work(policy, samples, cfg, ledger, progress=False)
            return sorted(({k: v for k, v in r.items() if k not in ("compute", "seconds", "latency_s")} for r in ledger.rows()), key=lambda r: r["qid"])
    looked, turns = [], engine.Decoder.turns
    def slow(*args):                                                    # the next batch is prepared by then
        for i, waiting in enumerate(turns(*args)):
            if i < 4: time.sleep(.1)
            yield waiting
    def ahead(policy, encodeds, between):
        looked.append(len(encodeds))
        return look_ahead(policy, encodeds, between)
    plain = rows("plain.jsonl")
    assert not looked
    for module in (difficulty, evaluation, reflection): monkeypatch.setattr(module, "looks_ahead", lambda policy: partial(ahead, policy))
    monkeypatch.setattr(engine.Decoder, "turns", slow)
    assert rows("ahead.jsonl") == plain and looked

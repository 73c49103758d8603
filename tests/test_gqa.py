"Grounded QA end to end on the synthetic world: answered, scored, and trained with the three-part reward"
import json
from pathlib import Path

import pytest

from videotg_r1.evaluation import EvalConfig, evaluate, query_blind
from videotg_r1.grpo import GRPOSettings, train_grpo
from videotg_r1.policy import load_policy
from videotg_r1.records import read_jsonl, read_samples
from videotg_r1.rewards import score_completion
from videotg_r1.training import weights_digest
from videotg_r1.variants import judge

ROOT = Path(__file__).parents[1]
PARTS = ("union_iou", "answer", "format")


@pytest.fixture(scope="module")
def questions(): return read_samples(ROOT/"tests/data/world/heldout_qa.jsonl")


@pytest.fixture(scope="module")
def trained(questions, tmp_path_factory):
    "Two GRPO steps of the shipped model on three questions"
    policy = load_policy("tiny", device="cpu")
    before = weights_digest(policy.model)
    cfg = GRPOSettings(steps=2, prompts_per_step=3, G=8, rewards="gqa", lr=1e-4, max_completion_length=24, save_steps=0, seed=1)
    out = train_grpo(policy, questions, cfg, tmp_path_factory.mktemp("gqa"), progress=False)
    return policy, before, out


def test_the_three_parts_are_logged_and_add_up(trained):
    policy, before, out = trained
    rows = read_jsonl(out["history"])
    assert len(rows) == 2 and out["n"] == 3
    for row in rows:
        parts = [row[f"rewards/{p}/mean"] for p in PARTS]
        assert all(0 <= p <= 1 for p in parts), row
        assert abs(row["reward"] - sum(parts)) < 1e-5, row
    assert rows[0]["rewards/format/mean"] > .9, "the base was taught this form"
    assert any(r["frac_reward_zero_std"] < 1 and r["grad_norm"] > 0 for r in rows), "no group had a preference"
    assert weights_digest(policy.model) != before, "nothing was learnt"


def test_the_reward_of_one_answer_by_hand(questions):
    q = questions[0]
    (start, end), letter = q.spans[0], chr(65 + q.answer)
    half = f"<answer>{letter}, {start} to {(start + end)/2}</answer>"
    assert score_completion(half, q, "gqa") == pytest.approx(dict(union_iou=.5, answer=1., format=1., total=2.5))
    two = f"{letter}: {start} to {(start + end)/2}; {(start + end)/2} to {end}"
    assert score_completion(two, q, "gqa") == pytest.approx(dict(union_iou=1., answer=1., format=0., total=2.)), "spans are merged first"


def test_the_trained_policy_is_judged_beside_the_query_blind_answer(trained, questions, tmp_path):
    metrics, rows, _ = judge(trained[0], questions, EvalConfig(max_new_tokens=24), tmp_path, train=questions)
    assert metrics["n"] == 3 and set(metrics["intervals"]) >= {"Acc@QA", "Acc@GQA", "mIoU", "mIoP"}
    assert [r["gqa"] for r in rows] == [r["right"] and r["iop"] >= .5 for r in rows]
    blind = evaluate(questions, query_blind(questions, questions))
    assert metrics["blind"]["Acc@QA"] == blind["Acc@QA"] >= 1/3, "the most frequent letter is right at least once"
    assert json.loads((tmp_path/"scores.jsonl").read_text().splitlines()[0])["qid"] == questions[0].qid

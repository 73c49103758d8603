"The shipped checkpoint: stock transformers loads it, and gives the same answers once it is handed the right positions"
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import videotg_r1
from videotg_r1.engine import generate_kwargs, sample, token_logps
from videotg_r1.policy import encode, load_policy
from videotg_r1.prompts import vtg_prompt
from videotg_r1.synthetic import SIDE, concept_text, draw_scenes, render
from videotg_r1.tiny import tiny_policy, whole_seconds

FOLDER = Path(videotg_r1.__file__).parent/"models"/"tiny"


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny", device="cpu")


def prompts(policy, n, duration_s=16):
    scenes = draw_scenes(np.random.default_rng(11), n, duration_s)
    return [encode(policy, whole_seconds(render(scenes, i, 1., SIDE, i)), vtg_prompt(concept_text(scenes["concept"][i, 0]))) for i in range(n)]


def test_size_and_dtype():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 12e6
    with safe_open(FOLDER/"model.safetensors", "pt") as f:
        assert {f.get_tensor(k).dtype for k in f.keys()} == {torch.bfloat16}


def test_tokenizer_is_the_one_the_notebook_trains(policy):
    assert policy.tokenizer.get_vocab() == tiny_policy().tokenizer.get_vocab()


def test_stock_generate_gives_token_identical_greedy_answers_on_200_prompts(policy):
    from transformers import Qwen2_5_VLForConditionalGeneration
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    encodeds = prompts(policy, 200)
    ours = sample(policy, encodeds, greedy=True, max_new_tokens=20, batch_size=50)
    same = 0
    for a in range(0, 200, 50):
        batch = encodeds[a:a+50]
        with torch.no_grad(): out = stock.generate(**generate_kwargs(policy, batch), max_new_tokens=20)
        out = out[:, max(map(len, batch)):]
        for row, ids, mask in zip(out, ours.ids[a:a+50, 0], ours.mask[a:a+50, 0]):
            n = int(mask.sum())
            same += row[:n].tolist() == ids[:n].tolist()
    assert same == 200


def test_unpatched_positions_differ(policy):
    "What the model card says of transformers 5.x: text after a video starts too early"
    e = prompts(policy, 1)[0]
    core = policy.model.model
    stock, _ = core.get_rope_index(e.input_ids[None], mm_token_type_ids=(2*(e.input_ids == policy.video_token_id)).int()[None],
                                   video_grid_thw=e.grid_thw, second_per_grid_ts=[e.second_per_grid_s], attention_mask=torch.ones(1, len(e), dtype=torch.long))
    assert e.next_position > int(stock.max())+1


@pytest.mark.parametrize("temperature", [1., .7])
def test_sampled_and_teacher_forced_logps_agree(policy, temperature):
    encodeds = prompts(policy, 8)
    out = sample(policy, encodeds, G=4, max_new_tokens=20, temperature=temperature, seed=3)
    with torch.no_grad(): again = token_logps(policy, encodeds, out.ids, out.mask, temperature=temperature)
    assert (again-out.logps).abs().max() < 2e-5

"""Suites and ``crd eval``: GenEval's averages against plain counting, intervals against scipy, noise of its own per prompt."""

import hashlib
import json
import math
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from scipy import stats
from tiny import tiny_pipeline

from crd.config import CRDConfig, RewardConfig
from crd.errors import CRDError
from crd.lora_settings import lora_settings
from crd.model_source import find_model
from crd.prompt_sets.ocr import ocr_prompts
from crd.prompts import make_prompt_set
from crd.rewards.geneval.prompts import generate
from crd.rewards.geneval.rules import TAGS
from crd.suite_run import Drawing, evaluate_suites
from crd.suite_scores import interval, mean_of_tasks, task_scores
from crd.suites import Suite, chosen_suites, in_turn, named_suite, noise_ids, prompts_digest

SMALL = ("--count", 4, "--pictures", 2, "--steps", 2)


# -------------------------------------------------------------------------------------------- statistics


@pytest.fixture
def judged():
    """Tags of 40 prompts, tasks of unequal sizes, and correctness of 4 pictures each."""
    rng = np.random.default_rng(0)
    tags = [TAGS[i] for i in rng.choice(6, size=40, p=[0.05, 0.1, 0.15, 0.2, 0.2, 0.3])]
    return tags, (rng.random((40, 4)) < 0.4).astype(float)


def test_official_averages_against_plain_counting(judged):
    tags, correct = judged
    scores = task_scores(tags, correct)
    right, total, any_right = {}, {}, 0
    for tag, row in zip(tags, correct, strict=True):
        for picture in row:
            right[tag] = right.get(tag, 0) + int(picture)
            total[tag] = total.get(tag, 0) + 1
        any_right += 1 in row
    assert {tag: value.mean for tag, value in scores.tasks.items()} == pytest.approx({t: right[t] / total[t] for t in total})
    assert list(scores.tasks) == [tag for tag in TAGS if tag in total]
    assert scores.overall.mean == pytest.approx(sum(right[t] / total[t] for t in total) / len(total))
    assert scores.pictures.mean == pytest.approx(sum(right.values()) / sum(total.values()))
    assert scores.any_correct.mean == pytest.approx(any_right / 40)
    assert abs(scores.overall.mean - scores.pictures.mean) > 1e-3  # so the two cannot be mixed up here
    assert scores.overall.count == scores.pictures.count == 40


def test_pictures_without_a_score_are_left_out(judged):
    tags, correct = judged
    correct[3, 1], correct[5] = math.nan, math.nan
    assert interval(correct).count == 39
    assert task_scores(tags, correct).any_correct.count == 39
    assert interval(correct).mean == pytest.approx(np.nanmean(np.delete(correct, 5, axis=0), axis=1).mean())
    assert interval(np.full((2, 2), math.nan)) is None and task_scores(tags[:1], np.full((1, 2), math.nan)) is None


@pytest.mark.parametrize("prompts", [2, 5, 31])
def test_an_interval_is_students_over_the_means_of_prompts(prompts):
    values = np.random.default_rng(prompts).normal(size=(prompts, 3))
    found, means = interval(values), values.mean(axis=1)
    low, high = stats.t.interval(0.95, prompts - 1, loc=means.mean(), scale=stats.sem(means))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-4)


def test_many_prompts_have_an_interval_at_most_4_percent_too_wide():
    values = np.random.default_rng(0).normal(size=(553, 4))
    means = values.mean(axis=1)
    half = stats.t.ppf(0.975, 552) * stats.sem(means)
    assert half < interval(values).half < 1.042 * half


@pytest.mark.parametrize("sizes", [(4, 9), (12, 12), (2, 30)])
def test_the_interval_of_a_mean_of_tasks_is_welchs(sizes):
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.3, 0.1, sizes[0]), rng.normal(0.6, 0.4, sizes[1])
    expected = stats.ttest_ind(a, -b, equal_var=False)  # of a + b
    band = expected.confidence_interval(0.95)
    found = mean_of_tasks([list(a), list(b)])
    assert found.mean == pytest.approx((a.mean() + b.mean()) / 2)
    exact = (band.high - band.low) / 4
    whole = exact * stats.t.ppf(0.975, math.floor(expected.df)) / stats.t.ppf(0.975, expected.df)  # degrees are rounded down
    assert found.half == pytest.approx(whole, rel=1e-4) and found.half >= exact


def test_one_prompt_of_a_task_leaves_the_interval_open():
    assert mean_of_tasks([[1.0], [0.0, 1.0]]).half == math.inf
    assert mean_of_tasks([[1.0, 1.0], [0.0, 0.0]]).half == 0


# ------------------------------------------------------------------------------------------------ suites


def test_the_official_suite():
    suite = named_suite("geneval")
    assert sorted(suite.prompts.texts) == sorted(row["prompt"] for row in generate())
    assert [entry["tag"] for entry in suite.prompts.metadata[:12]] == list(TAGS) * 2
    assert suite.rewards[0].options["mode"] == "reference"
    lines = "".join(json.dumps(row) + "\n" for row in in_turn(generate()))
    assert prompts_digest(suite.members(None)) == hashlib.sha256(lines.encode()).hexdigest()


def test_the_texts_suite_has_words_that_training_files_do_not():
    suite = named_suite("ocr")
    train = {word for prompt in ocr_prompts("train", 20_000) for word in prompt.split('"')[1].split()}
    assert len(suite.prompts) == 250
    assert not train & {word for text in suite.prompts.texts for word in text.split('"')[1].split()}


def test_noise_follows_from_the_text_and_the_number_of_the_picture():
    prompts = named_suite("ocr-nano").members(5)
    whole = noise_ids(prompts, 4)
    assert len(set(whole)) == 20
    assert noise_ids(prompts[::-1], 4)[:4] == whole[-4:]
    assert noise_ids(prompts[2:3], 2) == whole[8:10]


def test_options_and_judges():
    config = CRDConfig(rewards=(RewardConfig(name="ocr", options={"detect": False}), RewardConfig(name="blue", weight=3)))
    (own,) = chosen_suites(config)
    assert own.rewards == config.rewards and own.source == "nano/text/heldout"
    (own,) = chosen_suites(config, rewards=["ocr"], judges=["blue"])
    assert [(r.name, r.weight, r.options) for r in own.rewards] == [("ocr", 1.0, {"detect": False}), ("blue", 0.0, {})]
    (suite,) = chosen_suites(config, ["ocr"], options='{"ocr_exact": {"detect": true}}')
    assert [r.options for r in suite.rewards] == [{}, {"detect": True}]
    for mixture in ({"prompts": "p.txt"}, {"rewards": ["blue"]}):
        with pytest.raises(CRDError, match="--suite"):
            chosen_suites(config, ["ocr"], **mixture)
    for options, pieces in (("{", "not JSON"), ("[1]", "expected"), ('{"ocr": 1}', "expected"), ('{"blue": {}}', "blue is not")):
        with pytest.raises(CRDError, match=pieces):
            chosen_suites(config, ["ocr"], options=options)


# ------------------------------------------------------------------------------------------------ running


@pytest.fixture
def quiet(tiny_folder):
    """The tiny model without the judges that run by themselves."""
    source = find_model(str(tiny_folder))
    evaluation = source.config.evaluation.model_copy(update={"held_out_judges": False})
    model = source.config.model.model_copy(update={"max_sequence_length": 1})
    return replace(source, config=source.config.model_copy(update={"evaluation": evaluation, "model": model}))


def own(name, texts):
    return Suite(name, "list", make_prompt_set(texts, "list"), (RewardConfig(name="saturation"),))


def test_batches_and_other_prompts_change_nothing(quiet):
    texts = ["a photo of a ring", "a photo of a cross", "a photo of a circle"]
    suites = [own("all", texts), own("second", texts[1:2]), own("third", texts[2:]), own("turned", texts[:0:-1])]
    (one,) = evaluate_suites(quiet, suites[:1], Drawing(pictures=3, steps=2, batch_size=2))
    two, second, third, turned = evaluate_suites(quiet, suites, Drawing(pictures=3, steps=2, batch_size=32))
    assert two.metrics == pytest.approx(one.metrics, abs=1e-6)
    assert two.scores["saturation"].half == pytest.approx(one.scores["saturation"].half, abs=1e-6)
    for name in ("saturation", "drift", "diversity"):
        assert (second.metrics[name] + third.metrics[name]) / 2 == pytest.approx(turned.metrics[name], rel=1e-4)
    (other,) = evaluate_suites(quiet, suites[1:2], Drawing(pictures=3, steps=2, seed=7))
    assert other.metrics["saturation"] != second.metrics["saturation"]


def test_the_embedded_model_on_both_nano_suites(crd, tmp_path):
    code, printed = crd("eval", "nano", "--suite", "geneval-nano,ocr-nano", *SMALL, "--judges", "blue", "--output", tmp_path)
    assert code == 0, printed
    for piece in ("GenEval, mean of the tasks", "  colors", "prompts with a correct picture", "ocr_exact", "blue", "±"):
        assert piece in printed, printed
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["model"]["base"] == "nano" and report["model"]["pipeline"] == "StableDiffusion3Pipeline"
    assert report["settings"]["seed"] == 1234 and report["versions"]["torch"] == version("torch")
    geneval, ocr = report["suites"]["geneval-nano"], report["suites"]["ocr-nano"]
    assert geneval["prompts"]["count"] == 4 and len(geneval["prompts"]["sha256"]) == 64
    assert [r["name"] for r in ocr["rewards"]] == ["ocr", "ocr_exact", "blue"]
    assert ocr["intervals"]["ocr"]["mean"] == pytest.approx(ocr["metrics"]["ocr"]) and ocr["intervals"]["ocr"]["prompts"] == 4
    assert geneval["official"]["tasks"].keys() == {"single_object", "two_object", "counting", "colors"}
    assert geneval["official"]["overall"]["half_width_95"] is None  # one prompt of each task
    for name in ("geneval-nano", "ocr-nano"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0
    assert not list(tmp_path.glob(".*"))


# -------------------------------------------------------------------------------------------- LoRA files


@pytest.fixture
def lora_file(tmp_path):
    """Random LoRA weights of another rank and other targets than the defaults, written by diffusers alone."""
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline = tiny_pipeline()
    torch.manual_seed(1)
    settings = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=["attn.to_q", "attn.to_v"])
    pipeline.transformer.add_adapter(settings)
    layers = get_peft_model_state_dict(pipeline.transformer)
    facts = {**settings.to_dict(), "target_modules": sorted(settings.target_modules)}
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=facts)
    return tmp_path / "pytorch_lora_weights.safetensors"


def test_a_lora_of_ones_own_draws_what_diffusers_draws(lora_file, tiny_folder):
    found = lora_settings(lora_file)
    assert (found["lora_rank"], found["lora_alpha"], len(found["lora_targets"])) == (3, 6, 4)
    source = find_model(str(tiny_folder), lora_file.parent)
    assert source.weights == "student"
    policy = source.load(torch.device("cpu"))
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(lora_file.parent)
    inputs = {
        "hidden_states": torch.randn(2, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)),
        "pooled_projections": torch.randn(2, 32, generator=torch.Generator().manual_seed(2)),
    }
    with torch.no_grad(), policy.using("student"):
        ours = policy.model.backbone(**inputs, return_dict=False)[0]
        theirs = pipeline.transformer(**inputs, return_dict=False)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        with policy.using("pretrained"):
            assert (policy.model.backbone(**inputs, return_dict=False)[0] - theirs).abs().max() > 1e-3


def test_lora_files_that_do_not_fit(lora_file, tmp_path, crd, tiny_folder):
    from safetensors.torch import load_file, save_file

    def refused(path, *pieces):
        code, printed = crd("eval", tiny_folder, "--suite", "ocr-nano", *SMALL, "--lora", path)
        assert code == 2 and all(str(piece) in printed for piece in pieces), printed

    refused(tmp_path / "none.safetensors", "--lora", "none.safetensors")
    refused(tiny_folder, "--lora", "pytorch_lora_weights")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(lora_file.read_bytes()[:500])
    refused(damaged, "--lora", "cannot be read")
    layers = load_file(lora_file)
    assert lora_settings(save(layers, tmp_path / "plain.safetensors", save_file))["lora_alpha"] == 3  # alpha is the rank
    strange = save({**layers, "transformer.x.alpha": torch.ones(1)}, tmp_path / "kohya.safetensors", save_file)
    refused(strange, "--lora", "not supported", "transformer.x.alpha")
    uneven = {key: value[:2] if "blocks.0" in key and "lora_A" in key else value for key, value in layers.items()}
    refused(save(uneven, tmp_path / "uneven.safetensors", save_file), "ranks [2, 3]")
    other = {key.replace("transformer_blocks.0", "transformer_blocks.7"): value for key, value in layers.items()}
    refused(save(other, tmp_path / "other.safetensors", save_file), "transformer_blocks.7")


def save(tensors, path, save_file):
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        (["--suite", "nope"], ["'nope'", "geneval-nano"]),
        (["--suite", "ocr,ocr"], ["once"]),
        (["--suite", "ocr-nano", "--reward", "blue"], ["--judges"]),
        (["--suite", "ocr-nano", "--judges", "nope"], ["'nope' is not known"]),
        (["--suite", "ocr-nano", "--judges", "ocr"], ["names of their own"]),
        (["--suite", "ocr-nano", "--options", "{"], ["--options", "JSON"]),
        (["--suite", "ocr-nano", "--height", "65"], ["height", "65"]),
    ],
)
def test_mistakes(crd, tiny_folder, words, pieces):
    code, printed = crd("eval", tiny_folder, *words, *SMALL)
    assert code == 2 and all(piece in printed for piece in pieces), printed

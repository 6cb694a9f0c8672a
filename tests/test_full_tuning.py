"""``model.tuning: full``: the whole backbone is trained, and its copies are the other named weights."""

import json

import diffusers
import numpy as np
import pytest
import test_family_flux
import test_family_flux2_klein
import test_family_qwen_image
import test_family_sana
import test_family_sd
import test_family_sdxl
import test_family_zimage
import torch
from family_checks import PROMPTS, STEPS, Case, farthest, levels, noise, perturb
from several import FSDP2, on_processes
from tiny import redness, tiny_config, tiny_pipeline
from train_tiny import same, train_tiny, weights_of

from crd import CRDTrainer
from crd.config import ModelConfig
from crd.errors import CRDError
from crd.log import read_record
from crd.models.load import load_policy
from crd.plan.footprint import footprint
from crd.rollout import draw_latents
from crd.sharding import here
from crd.update import buckets

CPU = torch.device("cpu")
FULL = {"model": {"tuning": "full"}, "train": {"learning_rate": 1e-4}}
SD3 = Case(tiny_pipeline, ModelConfig(max_sequence_length=2), lambda scale: {"guidance_scale": scale})
CASES = {
    "sd3": SD3,
    "flux": test_family_flux.DEV,
    "klein": test_family_flux2_klein.BASE,
    "qwen": test_family_qwen_image.QWEN,
    "sana": test_family_sana.case(),
    "zimage": test_family_zimage.case(),
    "sd": test_family_sd.case(),
    "sdxl": test_family_sdxl.CASE,
}


def full(case, pipeline=None):
    settings = case.settings.model_copy(update={"tuning": "full"})
    return load_policy(pipeline or case.make(), settings, CPU)


@pytest.mark.parametrize("name", CASES)
def test_only_the_student_moves_and_plain_diffusers_draws_what_it_draws(name, tmp_path):
    case = CASES[name]
    pipeline = case.make()
    policy = full(case, pipeline)
    untouched = {key: value.clone() for key, value in policy.sets.backbones()[-1].state_dict().items()}
    x, conditioning = noise(policy), policy.encode(PROMPTS)
    with torch.no_grad():
        start = policy.velocity(x, levels(), conditioning)
        for weights in ("old", "sampler", "pretrained"):
            with policy.using(weights):
                torch.testing.assert_close(policy.velocity(x, levels(), conditioning), start, rtol=0, atol=0)
    policy.velocity(x, levels(), conditioning).square().mean().backward()
    moved = [key for key, parameter in policy.parameters("student") if parameter.grad is not None and parameter.grad.any()]
    assert len(moved) > 0.8 * len(policy.parameters("student"))
    assert not any(p.grad is not None for name in ("old", "sampler", "pretrained") for _, p in policy.parameters(name))

    perturb(policy)
    policy.save(tmp_path)
    plain = case.make()
    component = "unet" if hasattr(plain, "unet") else "transformer"
    own = getattr(plain, component)
    setattr(plain, component, type(own).from_pretrained(tmp_path / "backbone"))
    theirs, pictures = case.own(plain, policy.model, x, 1.0)
    ours = draw_latents(policy, conditioning, x, policy.model.sigmas(STEPS), 1.0)
    # the difference of packing sums of other shapes, for weights far from where training leaves them
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))
    assert farthest(policy.model.decode(ours), pictures) <= 1
    with policy.using("pretrained"):
        assert (policy.velocity(x, levels(), conditioning) - start).abs().max() == 0
    for key, value in policy.sets.backbones()[-1].state_dict().items():
        assert torch.equal(value, untouched[key])

    again = full(case)
    again.load(tmp_path / "backbone")
    for (key, value), (_, expected) in zip(again.parameters("student"), policy.parameters("student"), strict=True):
        assert torch.equal(value, expected), key


def test_gradients_travel_in_messages_of_bounded_size():
    sizes = [3, 4, 5, 20, 1, 1, 8]
    found = [[len(tensor) for tensor in bucket] for bucket in buckets([torch.zeros(size) for size in sizes], 10)]
    assert found == [[3, 4], [5], [20], [1, 1, 8]]


def test_blend_moves_the_copy_alone():
    policy = full(SD3)
    perturb(policy)
    before = [p.clone() for _, p in policy.parameters("old")]
    policy.blend("old", 0.75)
    for (_, got), o, (_, s) in zip(policy.parameters("old"), before, policy.parameters("student"), strict=True):
        torch.testing.assert_close(got, 0.75 * o + 0.25 * s, rtol=1e-6, atol=1e-7)
    for (_, sampler), o in zip(policy.parameters("sampler"), before, strict=True):
        assert torch.equal(sampler, o)


def test_bfloat16_is_only_for_what_is_frozen():
    """A slow average stands still in bfloat16: 0.999 of a number and 0.001 of its neighbour are that number."""
    policy = full(SD3, tiny_pipeline().to(torch.bfloat16))
    kinds = {name: {p.dtype for _, p in policy.parameters(name)} for name in ("student", "old", "sampler", "pretrained")}
    assert kinds == {key: {torch.float32} for key in ("student", "old", "sampler")} | {"pretrained": {torch.bfloat16}}
    x, conditioning = noise(policy), policy.encode(PROMPTS)
    kept = []  # whether autocast keeps the casts of weights, which would hold all of them through a pass
    hook = policy.model.backbone.register_forward_hook(lambda *_: kept.append(torch.is_autocast_cache_enabled()))
    velocity = policy.velocity(x, levels(), conditioning)
    hook.remove()
    assert velocity.dtype == torch.float32 and kept == [False]
    velocity.square().mean().backward()
    with policy.using("pretrained"):
        assert (policy.velocity(x, levels(), conditioning) - velocity).abs().max() < 0.02 * velocity.abs().max()


@pytest.fixture(scope="module")
def smooth(tmp_path_factory):
    """A run of three epochs in one go."""
    folder = tmp_path_factory.mktemp("full") / "run"
    config = tiny_config(folder, **{**FULL, "train": {**FULL["train"], "epochs": 3}})
    trainer = CRDTrainer(model=tiny_pipeline(), reward_funcs=[redness], config=config)
    trainer.train()
    return folder


def test_training_raises_the_reward_of_the_student(smooth):
    rows = [row["reward"] for row in read_record(smooth / "metrics.jsonl") if row["kind"] == "evaluation"]
    assert rows[-1] > rows[0]


def test_resumed_run_is_the_smooth_one(smooth, tmp_path):
    folder = tmp_path / "run"
    for epochs in (1, 3):
        config = tiny_config(folder, **{**FULL, "train": {**FULL["train"], "epochs": epochs}})
        CRDTrainer(model=tiny_pipeline(), reward_funcs=[redness], config=config).train()
    one, two = weights_of(smooth), weights_of(folder)
    assert all((one[key] == two[key]).all() for key in one)
    assert (smooth / "metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["plain", "FSDP2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_two_processes_equal_one(tmp_path, environment, checkpointing):
    """Groups over both processes, in two passes, with failed rewards; then on one process and back on two."""

    def sections(epochs):
        train = {**FULL["train"], "epochs": epochs, "micro_batch": 5, "gradient_checkpointing": checkpointing}
        rollout = {"prompts_per_epoch": 3, "group_size": 3, "batch_size": 4}
        evaluation = {"every": 1, "prompts": 1, "pictures_per_prompt": 1}
        return {**FULL, "train": train, "rollout": rollout, "evaluation": evaluation, "reward_failure_limit": 1.0}

    on_processes(1, train_tiny, tmp_path / "one", sections(3), "some_fail")
    for epochs, processes in ((1, 2), (2, 1), (3, 2)):
        surroundings = environment if processes == 2 else {}
        ran = on_processes(processes, train_tiny, tmp_path / "two", sections(epochs), "some_fail", environment=surroundings)
        assert {done["sharded"] for done in ran} == {environment is FSDP2 and processes == 2}
    same(tmp_path / "one", tmp_path / "two")


def bfloat16_gradients():
    """Of a policy whose frozen weights are bfloat16, with gradient checkpointing: of the same pass, whatever the processes."""
    policy = full(SD3, tiny_pipeline().to(torch.bfloat16))
    policy.model.backbone.enable_gradient_checkpointing()
    velocity = policy.velocity(noise(policy), levels(), policy.encode(PROMPTS))
    with torch.no_grad(), policy.using("pretrained"):
        anchor = policy.velocity(noise(policy), levels(), policy.encode(PROMPTS))
    ((velocity - 1) ** 2 + (velocity - anchor) ** 2).mean().backward()
    wholes = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for _, p in policy.parameters("student")]
    return torch.cat([whole.flatten() for whole in wholes]).numpy()


def test_bfloat16_in_pieces():
    (one,) = on_processes(1, bfloat16_gradients)
    for two in on_processes(2, bfloat16_gradients, environment=FSDP2):
        assert np.abs(two - one).max() < 0.02 * np.abs(one).max() and np.linalg.norm(two - one) < 0.02 * np.linalg.norm(one)


@torch.no_grad()
def velocities_as_weights_move():
    """Of student, old and sampler: at first, and after the student has moved and old has followed it half way."""
    policy, found = full(SD3), []
    arguments = noise(policy), levels(), policy.encode(PROMPTS)
    for _ in range(2):
        for name in ("student", "old", "sampler"):
            with policy.using(name):
                found.append(policy.velocity(*arguments).numpy())
        for _, parameter in policy.parameters("student"):
            here(parameter).add_(0.05)
        policy.sets.changed("student")
        policy.blend("old", 0.5)
    return found


def test_what_processes_put_together_is_never_out_of_date():
    (one,) = on_processes(1, velocities_as_weights_move)
    assert np.abs(one[4] - one[1]).max() > 1e-2 and np.abs(one[5] - one[2]).max() == 0
    for two in on_processes(2, velocities_as_weights_move, environment=FSDP2):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.fixture
def run(recipe, crd):
    """A finished run of the command line, of one strong step."""
    path = recipe(**{**FULL, "train": {"learning_rate": 3e-3, "epochs": 1}})
    assert crd("train", path)[0] == 0
    return path.with_suffix("")


def test_from_the_command_line(run, crd, tmp_path, tiny_folder):
    summary = json.loads((run / "summary.json").read_text())
    names = {"diffusers": diffusers}
    exec("\n".join(summary["how_to_load"]), names)  # the lines that the run prints
    assert any(not torch.equal(a, b) for a, b in zip(
        names["pipe"].transformer.state_dict().values(),
        diffusers.SD3Transformer2DModel.from_pretrained(tiny_folder / "transformer").state_dict().values(), strict=True,
    ))  # fmt: skip

    flags = ("--count", 2, "--pictures", 1, "--steps", 3)
    scores = {}
    for model in (run, tiny_folder):
        prompts = () if model == run else ("--prompts", "nano/text/heldout", "--reward", "blue")
        code, printed = crd("eval", model, *flags, *prompts, "--output", tmp_path / model.name)
        assert code == 0, printed
        scores[model.name] = json.loads((tmp_path / model.name / "metrics.json").read_text())
    assert len(scores["run"]["model"]["tuned"]["sha256"]) == 64 and scores["tiny"]["model"]["tuned"] is None

    assert crd("export", run, "--to", "merged", "--output", tmp_path / "merged")[0] == 0
    merged = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged").transformer.state_dict()
    ours = names["pipe"].transformer.state_dict()
    assert merged.keys() == ours.keys() and all(torch.equal(merged[key], ours[key]) for key in ours)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert 'from_pretrained("merged"' in card and "load_lora" not in card and "lora" not in card.split("---")[1]
    for form in ("lora", "comfyui"):
        code, printed = crd("export", run, "--to", form, "--output", tmp_path / form)
        assert code == 2 and "Use --to merged" in printed


def test_bad_input(run, crd, tmp_path):
    assert "choose one" in crd("train", run.with_suffix(".yaml"), "model.lora_targets=[attn.to_q]")[1]
    assert "choose one" in crd("train", run.with_suffix(".yaml"), "model.int8=true", "train.gradient_checkpointing=true")[1]
    file = run / "backbone" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    code, printed = crd("sample", run, "a ring", "--output", tmp_path / "a.png")
    assert code == 2 and "cannot be read as a SD3Transformer2DModel" in printed
    assert "is damaged" in crd("export", run, "--to", "merged", "--output", tmp_path / "out")[1]
    file.write_bytes(whole)
    (run / "backbone" / "config.json").write_text("{")
    assert "is damaged" in crd("export", run, "--to", "merged", "--output", tmp_path / "out")[1]
    assert not (tmp_path / "out").exists()
    other = tiny_pipeline().transformer
    smaller = type(other).from_config({**other.config, "num_layers": 1})
    smaller.save_pretrained(tmp_path / "smaller")
    with pytest.raises(CRDError, match="another backbone"):
        full(SD3).load(tmp_path / "smaller")


def test_the_plan_counts_copies_and_casts():
    lora, whole = (
        footprint(load_policy(tiny_pipeline(), ModelConfig(tuning=tuning, max_sequence_length=2), CPU))
        for tuning in ("lora", "full")
    )
    assert whole.trained_parameters == whole.backbone_parameters == lora.backbone_parameters
    assert whole.trained_bytes == 6 * 4 * whole.backbone_parameters
    assert whole.pass_bytes == 0 and whole.row_bytes >= lora.row_bytes * 0.8
    cast = footprint(full(SD3, tiny_pipeline().to(torch.bfloat16)))
    assert cast.backbone_bytes == 2 * cast.backbone_parameters
    matrices = sum(p.numel() for _, p in full(SD3).parameters("student") if p.ndim > 1)
    assert 2 * 0.8 * matrices < cast.pass_bytes < 2.2 * cast.backbone_parameters

"""Named weights over one backbone; rollouts that reproduce the pipeline's own."""

import pytest
import torch

from crd.config import ModelConfig
from crd.errors import CRDError
from crd.models.load import load_policy
from crd.rollout import draw_latents

SETTINGS = ModelConfig(max_sequence_length=2, lora_rank=4, lora_alpha=8)
PROMPTS = ["a photo of a red circle", 'a sign that says "STAR"']


@pytest.fixture
def policy(pipeline):
    torch.manual_seed(0)
    return load_policy(pipeline, SETTINGS, torch.device("cpu"))


def point(policy, count=2):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(count, *policy.model.latent_shape, generator=rng)
    return x, torch.rand(count, generator=rng), policy.encode(PROMPTS[:count])


@torch.no_grad()
def perturb(policy, name, seed=1):
    rng = torch.Generator().manual_seed(seed)
    for _, parameter in policy.parameters(name):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_pretrained_rollout_equals_the_pipelines_own(policy, guidance):
    """Same noise, steps and guidance; the students' weights are away from zero, so they must not leak in."""
    perturb(policy, "student")
    pipe, start = policy.model.pipeline, torch.randn(2, *policy.model.latent_shape, generator=torch.Generator().manual_seed(5))
    with policy.using("pretrained"):
        ours = draw_latents(policy, policy.encode(PROMPTS), start, policy.model.sigmas(6), guidance)
        pictures = policy.model.decode(ours)
        common = {"num_inference_steps": 6, "guidance_scale": guidance, "max_sequence_length": 2}
        theirs = pipe(PROMPTS, latents=start.clone(), output_type="latent", **common).images
        theirs_pictures = pipe(PROMPTS, latents=start.clone(), **common).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    for a, b in zip(pictures, theirs_pictures, strict=True):
        assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1


def test_pretrained_equals_the_model_before_adapters(pipeline):
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    states, _, pooled, _ = pipeline.encode_prompt(
        prompt=PROMPTS, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, max_sequence_length=2
    )
    with torch.no_grad():
        before = pipeline.transformer(x, states, pooled, torch.tensor([500.0, 500.0])).sample
        policy = load_policy(pipeline, SETTINGS, torch.device("cpu"))
        perturb(policy, "student")
        with policy.using("pretrained"):
            after = policy.velocity(x, torch.tensor([0.5, 0.5]), policy.encode(PROMPTS))
        student = policy.velocity(x, torch.tensor([0.5, 0.5]), policy.encode(PROMPTS))
    assert torch.equal(before, after)
    assert (student - after).abs().max() > 1e-3


def test_only_the_student_gets_gradients_and_the_scope_restores_it(policy):
    x, sigma, conditioning = point(policy)
    for name in ("old", "sampler", "pretrained"):
        with policy.using(name):
            assert not policy.velocity(x, sigma, conditioning).requires_grad
    with policy.using("old"), policy.using("pretrained"):
        pass
    policy.velocity(x, sigma, conditioning).square().mean().backward()
    trained = {name for name, p in policy.model.backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained and all(".student." in name for name in trained)


def test_the_scope_is_left_when_something_raises(policy):
    with pytest.raises(RuntimeError), policy.using("sampler"):
        raise RuntimeError
    x, sigma, conditioning = point(policy)
    assert policy.velocity(x, sigma, conditioning).requires_grad


def test_blend_against_the_formula(policy):
    perturb(policy, "student")
    perturb(policy, "old", seed=2)
    old = [p.clone() for _, p in policy.parameters("old")]
    student = [p.clone() for _, p in policy.parameters("student")]
    policy.blend("old", 0.25)
    for (_, got), o, s in zip(policy.parameters("old"), old, student, strict=True):
        torch.testing.assert_close(got.data, 0.25 * o + 0.75 * s, rtol=1e-6, atol=1e-7)
    for (_, got), s in zip(policy.parameters("student"), student, strict=True):
        assert torch.equal(got, s)


def test_switching_copies_nothing(policy):
    addresses = [p.data_ptr() for _, p in policy.model.backbone.named_parameters()]
    with policy.using("old"), policy.using("sampler"):
        pass
    assert addresses == [p.data_ptr() for _, p in policy.model.backbone.named_parameters()]


def test_each_prompt_is_encoded_once(policy, monkeypatch):
    encoded = []
    original = policy.model.encode
    monkeypatch.setattr(policy.model, "encode", lambda prompts: encoded.extend(prompts) or original(prompts))
    first = policy.encode(["a photo of a ring", *PROMPTS, *PROMPTS])
    again = policy.encode(PROMPTS)
    assert sorted(encoded) == sorted(["a photo of a ring", *PROMPTS])
    assert torch.equal(first.states[1:3], again.states) and torch.equal(first.pooled[3:5], again.pooled)


def test_lora_file_loads_in_plain_diffusers_and_gives_the_same_pictures(policy, tmp_path):
    from diffusers import StableDiffusion3Pipeline
    from tiny import tiny_pipeline

    perturb(policy, "student")
    policy.save(tmp_path)
    plain: StableDiffusion3Pipeline = tiny_pipeline()
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(str(tmp_path))
    start = torch.randn(2, *policy.model.latent_shape, generator=torch.Generator().manual_seed(5))
    theirs = plain(
        PROMPTS, latents=start.clone(), num_inference_steps=4, guidance_scale=1.0, max_sequence_length=2, output_type="latent"
    )
    ours = draw_latents(policy, policy.encode(PROMPTS), start, policy.model.sigmas(4), 1.0)
    torch.testing.assert_close(ours, theirs.images, rtol=0, atol=2e-5)
    with policy.using("pretrained"):
        without = draw_latents(policy, policy.encode(PROMPTS), start, policy.model.sigmas(4), 1.0)
    assert (ours - without).abs().max() > 1e-2


def test_bfloat16_backbone_keeps_float32_where_it_matters(pipeline):
    """Weights of the backbone in bfloat16 under autocast; LoRA weights, velocities and latents in float32."""
    reference = load_policy(pipeline, SETTINGS, torch.device("cpu"))
    x, sigma, conditioning = point(reference)
    with torch.no_grad():
        expected = reference.velocity(x, sigma, conditioning)
    from tiny import tiny_pipeline

    torch.manual_seed(0)
    half = tiny_pipeline().to(torch.bfloat16)
    policy = load_policy(half, SETTINGS, torch.device("cpu"))
    assert all(p.dtype == torch.float32 for name in ("student", "old", "sampler") for _, p in policy.parameters(name))
    assert next(policy.model.backbone.context_embedder.parameters()).dtype == torch.bfloat16
    velocity = policy.velocity(x, sigma, policy.encode(PROMPTS))
    assert velocity.dtype == torch.float32 and velocity.requires_grad
    assert (velocity - expected).abs().max() < 0.1 * expected.abs().max()
    latents = draw_latents(policy, policy.encode(PROMPTS), x, policy.model.sigmas(3), 1.0)
    assert latents.dtype == torch.float32 and len(policy.model.decode(latents)) == 2


@pytest.mark.parametrize(("targets", "unknown"), [(("o_q",), "o_q"), (("to_q", "_k"), "_k"), (("attn.to_q", "n.to_k"), "n.to_k")])
def test_targets_are_parts_of_names_between_dots(pipeline, targets, unknown):
    """As peft takes them: it would raise for the first, and leave out what the others do not name."""
    with pytest.raises(CRDError, match=rf"model.lora_targets: .* ends with {unknown}\. "):
        load_policy(pipeline, SETTINGS.model_copy(update={"lora_targets": targets}), torch.device("cpu"))


def test_every_accepted_target_is_trained(pipeline):
    targets = ("to_q", "attn.to_k", "context_embedder")  # a part, two parts, a whole name
    policy = load_policy(pipeline, SETTINGS.model_copy(update={"lora_targets": targets}), torch.device("cpu"))
    trained = [name.split(".lora_")[0] for name, _ in policy.parameters("student")]
    assert all(any(name.endswith(target) for name in trained) for target in targets)

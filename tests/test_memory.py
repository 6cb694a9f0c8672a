"""What keeps memory small: the prompt cache, idle components on the host, 8-bit weights, rows that fit."""

import json
import weakref

import pytest
import torch
from tiny import redness, tiny_config, tiny_pipeline

from crd import CRDTrainer
from crd.batch import Conditioning
from crd.config import ModelConfig
from crd.errors import CRDError
from crd.micro_batch import choose_micro_batch, largest_fitting, recorded_micro_batch, rows_per_step
from crd.models.load import load_policy
from crd.models.prompt_cache import PromptCache, fingerprint

CPU = torch.device("cpu")
SETTINGS = ModelConfig(max_sequence_length=2, lora_rank=4, lora_alpha=8)
PROMPTS = ["a photo of a red circle", 'a sign that says "STAR"', "a photo of a ring"]


def row(value, tokens=3):
    return Conditioning(torch.full((1, tokens, 4), float(value)), torch.full((1, 2), float(value)))


def test_the_least_recently_used_prompt_leaves_first():
    size = 4 * (3 * 4 + 2)
    cache = PromptCache(CPU, 2 * size, None)
    for i in range(2):
        cache.put(str(i), row(i))
    assert cache.get("0") is not None  # used again
    cache.put("2", row(2))
    assert cache.get("1") is None and cache.get("0") is not None and cache.get("2") is not None


def test_one_prompt_larger_than_the_limit_is_kept_while_it_is_the_newest():
    cache = PromptCache(CPU, 1, None)
    cache.put("long", row(1))
    assert cache.get("long") is not None


@pytest.mark.parametrize("mask", [False, True])
def test_the_folder_gives_back_what_was_put(tmp_path, mask):
    given = row(0.1)
    if mask:
        given = Conditioning(given.states, None, torch.tensor([[True, True, False]]))
    PromptCache(CPU, 2**20, tmp_path).put('a "quoted" prompt / with \u00fc', given)
    got = PromptCache(CPU, 2**20, tmp_path).get('a "quoted" prompt / with \u00fc')
    assert torch.equal(got.states, given.states)
    assert torch.equal(got.mask, given.mask) if mask else torch.equal(got.pooled, given.pooled)
    assert PromptCache(CPU, 2**20, tmp_path).get("another") is None


def test_a_damaged_file_is_encoded_again(tmp_path):
    PromptCache(CPU, 2**20, tmp_path).put("a", row(1))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert PromptCache(CPU, 2**20, tmp_path).get("a") is None


def test_a_second_run_encodes_nothing(tmp_path, monkeypatch):
    settings = SETTINGS.model_copy(update={"prompt_cache_folder": tmp_path})
    first = load_policy(tiny_pipeline(), settings, CPU).encode(PROMPTS)
    policy = load_policy(tiny_pipeline(), settings, CPU)
    monkeypatch.setattr(policy.model, "encode", lambda prompts: pytest.fail(f"encoded {prompts} again"))
    again = policy.encode(PROMPTS)
    assert torch.equal(first.states, again.states) and torch.equal(first.pooled, again.pooled)


def test_embeddings_of_other_encoders_are_not_taken(tmp_path):
    families = [load_policy(tiny_pipeline(seed), SETTINGS, CPU).model for seed in (0, 0, 1)]
    longer = load_policy(tiny_pipeline(), SETTINGS.model_copy(update={"max_sequence_length": 3}), CPU).model
    same, twin, other = map(fingerprint, families)
    assert same == twin and len({same, other, fingerprint(longer)}) == 3


def test_a_small_cache_encodes_again_and_changes_nothing():
    small = load_policy(tiny_pipeline(), SETTINGS, CPU)
    small._prompts.limit_bytes = 1
    wide = load_policy(tiny_pipeline(), SETTINGS, CPU)
    order = [*PROMPTS, *PROMPTS[::-1]]
    torch.testing.assert_close(small.encode(order).states, wide.encode(order).states, rtol=0, atol=1e-6)


def test_idle_components_visit_the_device_only_while_they_are_used(monkeypatch):
    """There is one device here: what is watched are the journeys."""
    policy = load_policy(tiny_pipeline(), SETTINGS, CPU)
    policy._idle_on_host = True
    journeys = []
    for name in ("text_encoder", "text_encoder_2", "vae"):
        module = policy.model.pipeline.components[name]
        monkeypatch.setattr(module, "to", lambda device, name=name, module=module: journeys.append((name, str(device))) or module)
    policy.encode(PROMPTS)
    assert journeys == [("text_encoder", "cpu"), ("text_encoder_2", "cpu")] * 2  # there and back
    policy.encode(PROMPTS)
    assert len(journeys) == 4, "nothing was encoded, so nothing need travel"
    policy.decode(torch.zeros(1, *policy.model.latent_shape))
    assert [name for name, _ in journeys[4:]] == ["vae", "vae"]


def test_eight_bits_are_near_the_full_precision_and_train():
    pytest.importorskip("torchao")
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 0.8])
    full, eight = (load_policy(tiny_pipeline(), SETTINGS.model_copy(update={"int8": flag}), CPU) for flag in (False, True))
    with torch.no_grad(), full.using("pretrained"):
        expected = full.velocity(x, sigma, full.encode(PROMPTS[:2]))
    with torch.no_grad(), eight.using("pretrained"):
        got = eight.velocity(x, sigma, eight.encode(PROMPTS[:2]))
    difference = float((got - expected).norm() / expected.norm())
    assert 0 < difference < 0.02
    eight.velocity(x, sigma, eight.encode(PROMPTS[:2])).square().mean().backward()
    trained = [name for name, p in eight.model.backbone.named_parameters() if p.grad is not None]
    assert trained and all(".student." in name for name in trained)


def test_eight_bits_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(CRDError, match=r"model.int8 needs torchao: pip install 'crd-diffusion\[int8\]'"):
        load_policy(tiny_pipeline(), SETTINGS.model_copy(update={"int8": True}), CPU)


@pytest.mark.parametrize(
    ("room", "most", "expected"), [(0, 8, 1), (1, 8, 1), (5, 8, 4), (100, 8, 8), (100, 24, 24), (23, 24, 16), (3, 1, 1)]
)
def test_largest_fitting(room, most, expected):
    tried = []
    assert largest_fitting(lambda rows: tried.append(rows) or rows <= room, most) == expected
    assert len(tried) <= 6


def test_the_run_records_the_rows_it_chose_and_keeps_them(tmp_path, pipeline):
    settings = {"train": {"micro_batch": 0, "epochs": 1}}
    config = tiny_config(tmp_path / "run", **settings)
    trainer = CRDTrainer(model=pipeline, reward_funcs=[redness], config=config)
    assert trainer.micro_batch == rows_per_step(config) == 16
    assert choose_micro_batch(trainer.policy, 1000, trainer.accelerator) == 96
    trainer.train()
    found = json.loads((tmp_path / "run" / "found.json").read_text())
    assert found == {"micro_batch": 16, "sigmas": trainer.policy.model.sigmas(3).tolist()}
    (tmp_path / "run" / "found.json").write_text('{"micro_batch": 4}')
    again = CRDTrainer(model=tiny_pipeline(), reward_funcs=[redness], config=config)
    assert again.micro_batch == again.step.config.train.micro_batch == 4


@pytest.mark.parametrize("found", [b"", b"{", b"[]", b'{"micro_batch": 0}', b'{"micro_batch": "a"}', b"\xff"])
def test_a_damaged_record_of_rows_is_as_none(found):
    assert recorded_micro_batch(found) is None
    assert recorded_micro_batch(b'{"micro_batch": 24}') == 24


def test_out_of_memory_names_the_settings_and_loses_nothing(tmp_path, pipeline, monkeypatch):
    trainer = CRDTrainer(model=pipeline, reward_funcs=[redness], config=tiny_config(tmp_path / "run"))

    def fails(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(trainer.step, "_velocity", fails)
    with pytest.raises(CRDError, match=r"epoch 1.*train.micro_batch \(now 16\).*batch_size \(now 8\).*2 GiB"):
        trainer.train()
    again = CRDTrainer(model=tiny_pipeline(), reward_funcs=[redness], config=tiny_config(tmp_path / "run"))
    assert (again.train() / "summary.json").exists()


def test_the_pictures_of_a_rollout_are_gone_when_training_begins(tmp_path, pipeline, monkeypatch):
    seen, alive = [], []

    def watched(images, prompts, **metadata):
        seen.extend(map(weakref.ref, images))
        return redness(images, prompts)

    config = tiny_config(tmp_path, rollout={"batch_size": 3}, train={"epochs": 1}, evaluation={"before": False})
    trainer = CRDTrainer(model=pipeline, reward_funcs=[watched], config=config)
    sigmas = trainer.step._sigmas

    def look(group, step):
        alive.append((len(seen), sum(picture() is not None for picture in seen)))
        return sigmas(group, step)

    monkeypatch.setattr(trainer.step, "_sigmas", look)
    trainer.train()
    assert alive == [(8, 0)]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_compiled_blocks_give_the_same_velocities_of_every_weights(monkeypatch, tuning):
    """Traced and differentiated as on a GPU; only the making of machine code is left out, it takes minutes here."""
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: whole(module, backend="aot_eager", **options))
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 0.8])
    velocities = []
    for flag in (False, True):
        torch.manual_seed(0)
        policy = load_policy(tiny_pipeline(), SETTINGS.model_copy(update={"compile": flag, "tuning": tuning}), CPU)
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in policy.parameters("student"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
        student = policy.velocity(x, sigma, policy.encode(PROMPTS[:2]))
        student.square().mean().backward()
        gradients = [p.grad.norm() for _, p in policy.parameters("student")]
        with torch.no_grad(), policy.using("pretrained"):
            velocities.append((student.detach(), policy.velocity(x, sigma, policy.encode(PROMPTS[:2])), torch.stack(gradients)))
    for plain, compiled in zip(*velocities, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
    assert (velocities[0][0] - velocities[0][1]).abs().max() > 1e-3

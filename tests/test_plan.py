"""The plan's counts against real passes, closed forms and the edges of a GPU's memory."""

import dataclasses

import pytest
import torch
from test_full_tuning import CASES
from tiny import redness, tiny_config, tiny_pipeline
from torch.utils.flop_counter import FlopCounterMode

from crd import CRDTrainer
from crd.batch import PromptGroup
from crd.errors import CRDError
from crd.micro_batch import with_levels
from crd.models.load import load_policy
from crd.plan.counts import (
    evaluation_rows,
    evaluation_scales,
    forwards_per_epoch,
    forwards_per_row,
    rollout_rows,
    training_rows,
)
from crd.plan.footprint import CPU_ATTENTION, footprint
from crd.plan.gpus import GPU, find_gpu
from crd.plan.memory import GIB, OVERHEAD, SLACK, Memory
from crd.rewards.protocol import RewardSet
from crd.rollout import collect, rollout_sampling

CPU = torch.device("cpu")
CONFIG = tiny_config("unused")


@pytest.fixture(scope="module")
def counted():
    return footprint(load_policy(tiny_pipeline(), CONFIG.model, CPU))


def test_parameters_are_counted_exactly(counted):
    pipeline = tiny_pipeline()
    assert counted.backbone_parameters == sum(p.numel() for p in pipeline.transformer.parameters())
    assert counted.backbone_bytes == 4 * counted.backbone_parameters
    assert counted.vae_bytes == 4 * sum(p.numel() for p in pipeline.vae.parameters())
    linear = [
        m
        for n, m in pipeline.transformer.named_modules()
        if n.endswith(tuple(load_policy(tiny_pipeline(), CONFIG.model, CPU).model.lora_targets))
    ]
    lora = sum(CONFIG.model.lora_rank * (m.in_features + m.out_features) for m in linear)
    assert counted.trained_parameters == lora
    assert counted.trained_bytes == 6 * 4 * lora  # student, old, sampler; gradient; two moments


def saved_bytes(policy, rows):
    """What a real pass keeps for its backward pass: every storage once, weights left out."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in policy.model.backbone.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        velocity = real_pass(policy, rows)
    del velocity
    return sum(kept.values())


def real_pass(policy, rows):
    x = torch.randn(rows, *policy.model.latent_shape)
    conditioning = policy.encode([""]).select(torch.zeros(rows, dtype=torch.long))
    return policy.velocity(x, torch.full((rows,), 0.5), conditioning)


def test_kept_bytes_against_a_real_pass(counted):
    policy = load_policy(tiny_pipeline(), CONFIG.model, CPU)
    for rows, tolerance in ((1, 0.1), (2, 0.01), (3, 0.01), (8, 0.1)):  # attention pads its statistics differently for more rows
        assert counted.pass_bytes + rows * counted.row_bytes == pytest.approx(saved_bytes(policy, rows), rel=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_every_family_is_counted(name):
    """Kept bytes and operations of a real pass, by hooks and by a counter on real tensors."""
    policy = CASES[name].policy()
    kept = saved_bytes(policy, 2)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        real_pass(policy, 1)
    counted = footprint(policy)
    assert counted.pass_bytes + 2 * counted.row_bytes == pytest.approx(kept, rel=0.03)
    assert counted.row_flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert counted.decode_bytes > 0 and counted.prompt_bytes > 0 and counted.encoder_bytes > 0


def test_operations_against_a_closed_form(counted):
    """Two per weight and token in every linear layer, and attention."""
    backbone = tiny_pipeline().transformer
    config = backbone.config
    width = config.num_attention_heads * config.attention_head_dim
    picture, text = (8 // config.patch_size) ** 2, load_policy(tiny_pipeline(), CONFIG.model, CPU).encode([""]).states.shape[1]
    total = 0.0
    for name, module in backbone.named_modules():
        if isinstance(module, torch.nn.Linear):
            stream = (
                text if ".add_" in name or "to_add_out" in name or "ff_context" in name or name == "context_embedder" else picture
            )
            once = any(part in name for part in ("norm1", "time_text_embed", "norm_out"))
            tokens = 1 if once else stream
            total += 2 * tokens * module.weight.numel()
        if isinstance(module, torch.nn.Conv2d):
            total += 2 * picture * module.weight.numel()
    total += len(backbone.transformer_blocks) * 4 * (picture + text) ** 2 * width
    lora = 2 * counted.trained_parameters * (picture + text) / 2  # half of the layers see the text
    assert counted.row_flops == pytest.approx(total + lora, rel=0.05)


def test_decoding_takes_the_largest_results_of_a_real_decoder(counted):
    policy, largest = load_policy(tiny_pipeline(), CONFIG.model, CPU), [0]

    def leave(module, arguments, result):
        largest[0] = max(largest[0], result.numel() * result.element_size())

    for module in policy.model.pipeline.vae.decoder.modules():
        if not list(module.children()):
            module.register_forward_hook(leave)
    policy.decode(torch.zeros(1, *policy.model.latent_shape))
    assert counted.decode_bytes == 3 * largest[0]


def test_a_counted_policy_still_computes():
    policy, fresh = (load_policy(tiny_pipeline(), CONFIG.model, CPU) for _ in range(2))
    footprint(policy)
    x, sigma = torch.ones(1, *policy.model.latent_shape), torch.full((1,), 0.5)
    with torch.no_grad(), policy.using("pretrained"), fresh.using("pretrained"):
        assert torch.equal(policy.velocity(x, sigma, policy.encode(["a"])), fresh.velocity(x, sigma, fresh.encode(["a"])))
    assert policy.decode(x)[0].tobytes() == fresh.decode(x)[0].tobytes()


def test_checkpointing_keeps_less_but_not_nothing(counted):
    assert 0 < counted.checkpointed_row_bytes < counted.row_bytes


def test_counts_of_an_epoch():
    config = tiny_config("unused", rollout={"guidance_scale": 2.0, "steps": 5})
    assert rollout_rows(config) == 2 * 4 * 5 * 2
    assert training_rows(config) == 2 * 4 * 2
    assert forwards_per_epoch(config) == 80 + 16 * (3 + 1 + 2)


COSTS = {
    "unguided, drift to the guided model": {},
    "guided as the anchor is": {"evaluation": {"guidance_scale": 4.5}, "train": {"epochs": 3}},
    "guided otherwise": {"evaluation": {"guidance_scale": 2.0}},
    "nothing is guided": {"anchor": {"guidance_scale": 1.0}, "evaluation": {"every": 2}},
    "reference unguided, no evaluation before": {"evaluation": {"reference_guidance_scale": 1.0, "before": False}},
    "levels below the minimum": {"rollout": {"steps": 10}, "noise": {"levels": 10}},
    "a group fits without the levels below the minimum": {
        "rollout": {"steps": 10},
        "noise": {"levels": 10},
        "objective": {"levels": "average"},
        "train": {"micro_batch": 36},
    },
    "two passes": {"objective": {"levels": "average"}, "train": {"micro_batch": 7}},
    "two halves of levels": {"noise": {"levels": 5}, "objective": {"levels": "halves"}, "train": {"micro_batch": 16}},
    "centered over the step, which fits": {"objective": {"centering": "batch"}, "train": {"micro_batch": 8}},
    "centered over the step, which does not fit": {"objective": {"centering": "batch"}, "train": {"micro_batch": 7}},
    "solver and guided rollouts": {"rollout": {"solver": "unipc", "guidance_scale": 2.0}, "algorithm": "nft"},
}


@pytest.mark.parametrize("name", COSTS)
def test_a_run_makes_the_passes_that_were_counted(tmp_path, name):
    config, rows = tiny_config(tmp_path, **COSTS[name]), []
    trainer = CRDTrainer(model=tiny_pipeline(), reward_funcs=[redness], config=config)
    trainer.policy.model.backbone.register_forward_pre_hook(
        lambda module, arguments, named: rows.append(len(named["hidden_states"])), with_kwargs=True
    )
    trainer.train()
    config = with_levels(config, trainer.policy)
    assert config.noise.levels == trainer.step.levels
    epochs = config.train.epochs
    training = epochs * training_rows(config) * (forwards_per_row(config) - 2)  # without the backward passes
    assert trainer.step.forwards == training
    assert sum(rows) == training + epochs * rollout_rows(config) + evaluation_rows(config)
    assert len(trainer.evaluations) == len(evaluation_scales(config))


def test_no_level_to_train_at_is_said(tmp_path):
    policy = load_policy(tiny_pipeline(), CONFIG.model, CPU)
    policy.model.sigmas = lambda steps, shift: torch.tensor([0.5, 0.2, 0.0])
    with pytest.raises(CRDError, match=r"noise.minimum is 0.9, but the highest noise level of this rollout is 0.500"):
        with_levels(tiny_config("unused", noise={"minimum": 0.9}), policy)


def test_stored_paths_are_in_the_plan(counted):
    """Against the paths of a real rollout."""
    config = tiny_config("unused", algorithm="flow_grpo", anchor={"strength": 0.0, "minimum": 0.0}, train={"steps_per_epoch": 2})
    policy = load_policy(tiny_pipeline(), config.model, CPU)
    prompts = [PromptGroup(0, "a ring", {})] * 8
    path = collect(policy, RewardSet([]), prompts, list(range(8)), rollout_sampling(config, 0)).path
    plans = [Memory(counted, c, GPU(100, 100), 2) for c in (config, config.model_copy(update={"algorithm": "rwr"}))]
    assert plans[0].paths == path.points.nbytes and plans[1].paths == 0
    assert plans[0].fixed - plans[1].fixed == path.points.nbytes == plans[0].visiting["joining the paths"]
    assert plans[0].training(1, False) - plans[1].training(1, False) == pytest.approx(path.points.nbytes / 2)
    assert any("paths of the rollout" in line for line in plans[0].lines())
    small = dataclasses.replace(plans[0], gpu=GPU((plans[0].fixed + 0.9 * path.points.nbytes) / GIB, 100))
    assert any("own pictures only" in advice for advice in dataclasses.replace(small, counted=light(counted)).advice())


def light(counted):
    return dataclasses.replace(counted, row_bytes=0, pass_bytes=0, checkpointed_row_bytes=0, transient_bytes=0)


def memory(counted, gib, **train):
    config = tiny_config("unused", train={"micro_batch": 0, **train}, rollout={"batch_size": 1})
    return Memory(counted, config, GPU(gib, 100), 2)


def test_as_many_rows_as_fit(counted):
    big = dataclasses.replace(counted, row_bytes=GIB, transient_bytes=0, checkpointed_row_bytes=GIB // 4)
    base = memory(big, 100).fixed / GIB
    assert memory(big, base + SLACK * 4.5).rows == 4
    assert memory(big, base + SLACK * 4.5, gradient_checkpointing=True).rows == 16
    assert memory(big, base + 1000).rows == 16  # all of the step
    assert base == pytest.approx((OVERHEAD + counted.backbone_bytes + counted.trained_bytes + 2 * counted.prompt_bytes) / GIB)


def test_advice_names_the_setting_that_makes_it_fit(counted):
    big = dataclasses.replace(counted, row_bytes=GIB, transient_bytes=0, checkpointed_row_bytes=GIB // 4, decode_bytes=0)
    base = memory(big, 100).fixed / GIB
    assert memory(big, base + 24).advice() == []
    assert memory(big, base + 4.5 * SLACK, micro_batch=16).advice() == ["train.micro_batch=4 (same result, more passes)"]
    assert memory(big, base + 0.5, micro_batch=1).advice()[0].startswith("train.gradient_checkpointing=true")
    assert memory(big, base + 0.1).advice()[0].startswith("model.int8=true")
    decoding = dataclasses.replace(counted, decode_bytes=GIB)
    config = tiny_config("unused", rollout={"batch_size": 64})
    tight = Memory(decoding, config, GPU(base + 10, 100), 2)
    assert any(advice.startswith("rollout.batch_size=7") for advice in tight.advice())
    assert "DOES NOT FIT" in "\n".join(tight.lines())


def test_the_command(recipe, crd):
    code, out = crd("plan", recipe(), "--gpu", "h100")
    assert code == 0 and "fits" in out and "rows per forward pass  16" in out
    code, out = crd("plan", recipe())
    assert code == 0 and "measured here" in out
    for where in ((), ("--gpu", "h100")):  # nine of the grid's ten levels are above noise.minimum
        code, out = crd("plan", recipe(), "noise.levels=10", "rollout.steps=10", *where)
        assert code == 0 and "(72 sample-timesteps;" in out and "4 of 4 pictures, 216 forwards in all" in out
    code, out = crd("plan", recipe(), "--gpu", "voodoo")
    assert code == 2 and "known are b200" in out


def test_unknown_gpu():
    with pytest.raises(CRDError, match="rtx-4090"):
        find_gpu("abacus")

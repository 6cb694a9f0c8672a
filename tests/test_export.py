"""Leaving with the result: LoRA, merged pipeline, ComfyUI file, model card, hub."""

import json
import os
import resource
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import diffusers
import pytest
import torch
import yaml
from conftest import write_recipe
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.repocard import metadata_load
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crd.errors import CRDError
from crd.export.base_model import hub_id, public_name
from crd.export.card import loading_lines, public_label
from crd.export.comfyui import check_mapped, comfyui_tensors
from crd.export.licence import base_licence
from crd.export.lora_file import read_lora
from crd.export.merged import write_merged
from crd.model_source import find_model
from crd.recipe import build_config
from crd.run_folder import RunFolder
from crd.trainer import CRDTrainer

LICENCE = "---\nlicense: other\nlicense_name: tiny-community\nlicense_link: https://example.org/licence\n---\n# Tiny\n"
PROMPT = "a photo of a ring"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    """A finished run of two strong steps, on a base whose card states a licence."""
    folder = tmp_path_factory.mktemp("export")
    base = shutil.copytree(tiny_folder, folder / "base")
    (base / "README.md").write_text(LICENCE)
    (base / "LICENSE").write_text("text of the licence")
    path = write_recipe(folder, base, "my run", train={"learning_rate": 0.05})
    CRDTrainer(config=build_config(yaml.safe_load(path.read_text()))).train()
    return path.with_suffix("")


@pytest.fixture
def spoilable(run, tmp_path):
    """A copy of the run."""
    return shutil.copytree(run, tmp_path / "run")


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    call = {"num_inference_steps": 3, "guidance_scale": 1.0, "max_sequence_length": 1, "generator": generator}
    return torch.from_numpy(pipe(PROMPT, output_type="np", **call).images)


def test_lora_and_merged_draw_the_same_pictures_and_not_those_of_the_base(run, crd, tmp_path):
    base = run.parent / "base"
    code, printed = crd("export", run, "--to", "lora", "--output", tmp_path / "lora")
    assert code == 0 and "wrote" in printed
    assert crd("export", run, "--to", "merged", "--output", tmp_path / "merged")[0] == 0
    pipe = DiffusionPipeline.from_pretrained(base)
    before = draw(pipe)
    pipe.load_lora_weights(tmp_path / "lora")
    ours = draw(pipe)
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.transformer, "peft_config")
    torch.testing.assert_close(draw(merged), ours, rtol=0, atol=1e-4)
    assert (ours - before).abs().max() > 0.05
    source = find_model(str(tmp_path / "merged"))  # a model, though it has the settings of the run too
    assert source.weights == "pretrained" and source.config.model.path == str(tmp_path / "merged")

    # whatever is not trained is the base's, byte for byte
    for file in ("vae/diffusion_pytorch_model.safetensors", "model_index.json", "LICENSE", "tokenizer/tokenizer.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (base / file).read_bytes()
    assert not list((tmp_path / "merged").rglob("*lora*"))
    for form in ("lora", "merged"):
        for name in ("README.md", "config.yaml", "evaluation_prompts.json", "before_after.png", "curves.png"):
            assert (tmp_path / form / name).stat().st_size > 0


def test_the_lines_of_the_cards_load_what_they_say(run, crd, tmp_path, monkeypatch):
    for form in ("lora", "merged"):
        assert crd("export", run, "--to", form, "--output", tmp_path / form)[0] == 0
        code = (tmp_path / form / "README.md").read_text().split("```python\n")[1].split("```")[0]
        assert str(run) not in code  # nothing of this machine
        code = code.replace("path/to/base", str(run.parent / "base"))
        monkeypatch.chdir(tmp_path)
        names: dict = {}
        exec("\n".join(code.splitlines()[:-1]), names)
        assert isinstance(names["pipe"], diffusers.StableDiffusion3Pipeline)
        assert hasattr(names["pipe"].transformer, "peft_config") == (form == "lora")


def flux_lora(folder):
    """A tiny FLUX backbone with random LoRA weights on everything a user may target, and its file by diffusers' saver."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 0), guidance_embeds=True,
    )  # fmt: skip
    targets = [*FLUX_DOUBLE, "proj_mlp", "proj_out", "norm.linear"]
    add_random_lora(model, LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    save(FluxPipeline, "transformer", model, folder)
    return model


def add_random_lora(model, config):
    model.add_adapter(config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def save(pipeline, backbone, model, folder):
    metadata = model.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    layers = {f"{backbone}_lora_layers": get_peft_model_state_dict(model), f"{backbone}_lora_adapter_metadata": metadata}
    pipeline.save_lora_weights(folder, **layers)


# ------------------------------------------------- ComfyUI's naming of SD3 and FLUX, as a table written for these tests
# diffusers' name within a block -> ComfyUI's own name within the block, and the rows there in units of the width

QKV = {"attn.to_q": (0, 1), "attn.to_k": (1, 2), "attn.to_v": (2, 3)}
ADDED_QKV = {"attn.add_q_proj": (0, 1), "attn.add_k_proj": (1, 2), "attn.add_v_proj": (2, 3)}
SD3_BLOCK = {
    **{name: ("x_block.attn.qkv", rows) for name, rows in QKV.items()},
    **{name: ("context_block.attn.qkv", rows) for name, rows in ADDED_QKV.items()},
    "attn.to_out.0": ("x_block.attn.proj", None),
    "attn.to_add_out": ("context_block.attn.proj", None),
}
FLUX_DOUBLE = {
    **{name: ("img_attn.qkv", rows) for name, rows in QKV.items()},
    **{name: ("txt_attn.qkv", rows) for name, rows in ADDED_QKV.items()},
    "attn.to_out.0": ("img_attn.proj", None),
    "attn.to_add_out": ("txt_attn.proj", None),
    "norm1.linear": ("img_mod.lin", None),
    "norm1_context.linear": ("txt_mod.lin", None),
    "ff.net.0.proj": ("img_mlp.0", None),
    "ff.net.2": ("img_mlp.2", None),
    "ff_context.net.0.proj": ("txt_mlp.0", None),
    "ff_context.net.2": ("txt_mlp.2", None),
}
FLUX_SINGLE = {
    **{name: ("linear1", rows) for name, rows in QKV.items()},
    "proj_mlp": ("linear1", (3, 7)),
    "proj_out": ("linear2", None),
    "norm.linear": ("modulation.lin", None),
}


def table(blocks, count, native, width):
    """Full diffusers name -> (ComfyUI's weight, its rows)."""
    prefix, native_prefix = blocks
    return {
        f"{prefix}.{i}.{name}": (f"{native_prefix}.{i}.{own}", slice(rows[0] * width, rows[1] * width) if rows else slice(None))
        for i in range(count)
        for name, (own, rows) in native.items()
    }


def native_weights(model, names):
    """The model's weights in ComfyUI's own layout."""
    parts: dict = {}
    for name, (native, rows) in names.items():
        layer = dict(model.named_modules()).get(name)
        if layer is not None:
            weight = getattr(layer, "base_layer", layer).weight.detach()
            parts.setdefault(native, []).append((rows.start or 0, weight))
    return {native: torch.cat([w for _, w in sorted(found, key=lambda part: part[0])]) for native, found in parts.items()}


def load_as_comfyui(names, tensors, weights):
    """What a loader does that knows only ``names``: adds alpha / rank * up @ down to the rows; returns keys it did not use."""
    left = set(tensors)
    for name, (native, rows) in names.items():
        keys = [f"transformer.{name}{end}" for end in (".lora_B.weight", ".lora_A.weight", ".alpha")]
        if keys[0] in tensors:
            up, down, alpha = (tensors[key] for key in keys)
            weights[native][rows] += alpha.item() / down.shape[0] * up @ down
            left -= set(keys)
    return left


def test_comfyui_file_of_a_run_gives_the_merged_weights_in_comfyui_layout(run, crd, tmp_path):
    assert crd("export", run, "--to", "comfyui", "--output", tmp_path / "out")[0] == 0
    tensors = load_file(tmp_path / "out" / "my run.safetensors")
    pipe = DiffusionPipeline.from_pretrained(run.parent / "base")
    names = table(("transformer_blocks", "joint_blocks"), 2, SD3_BLOCK, width=32)
    weights = native_weights(pipe.transformer, names)
    before = {key: weight.clone() for key, weight in weights.items()}
    assert load_as_comfyui(names, tensors, weights) == set()
    pipe.load_lora_weights(run)
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    fused = native_weights(pipe.transformer, names)
    assert "joint_blocks.0.x_block.attn.qkv" in fused and fused["joint_blocks.0.x_block.attn.qkv"].shape == (96, 32)
    for key, weight in fused.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-5, atol=1e-6)
        assert (weight - before[key]).abs().max() > 1e-3
    assert "LoraLoaderModelOnly" in (tmp_path / "out" / "README.md").read_text()


def test_comfyui_names_and_scales_of_flux(tmp_path):
    model = flux_lora(tmp_path)
    tensors = comfyui_tensors(read_lora(tmp_path / "pytorch_lora_weights.safetensors"))
    names = table(("transformer_blocks", "double_blocks"), 2, FLUX_DOUBLE, width=8)
    names |= table(("single_transformer_blocks", "single_blocks"), 2, FLUX_SINGLE, width=8)
    names["proj_out"] = ("final_layer.linear", slice(None))
    weights = native_weights(model, names)
    assert load_as_comfyui(names, tensors, weights) == set()
    model.fuse_lora()
    fused = native_weights(model, names)
    assert fused["single_blocks.0.linear1"].shape == (7 * 8, 8)
    for key, weight in fused.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-5, atol=1e-5)


def unet_lora(folder):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    base = folder / "base"
    unet.save_pretrained(base / "unet")
    (base / "model_index.json").write_text(json.dumps({"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}))
    add_random_lora(unet, LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_out.0", "conv1"]))
    save(StableDiffusionPipeline, "unet", unet, folder)
    return unet, base, read_lora(folder / "pytorch_lora_weights.safetensors")


def test_unets_are_merged_and_named_too(tmp_path):
    unet, base, lora = unet_lora(tmp_path)
    (tmp_path / "out").mkdir()
    write_merged(lora, base, tmp_path / "out")
    unet.fuse_lora()
    unet.unload_lora()
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").state_dict()
    for key, weight in unet.state_dict().items():
        torch.testing.assert_close(merged[key], weight, rtol=1e-5, atol=1e-6)
    keys = set(comfyui_tensors(lora))
    for module in ("down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0", "mid_block_resnets_1_conv1"):
        assert {f"lora_unet_{module}.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha")} <= keys
    assert len(keys) == 3 * len(lora.layers)


def test_merging_sums_in_float32_and_keeps_the_precision_of_the_base(run, tmp_path):
    (tmp_path / "out").mkdir()
    base = shutil.copytree(run.parent / "base", tmp_path / "base")
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.transformer.half().save_pretrained(base / "transformer")
    write_merged(read_lora(run / "pytorch_lora_weights.safetensors"), base, tmp_path / "out")
    exact = DiffusionPipeline.from_pretrained(base)  # in float32
    exact.load_lora_weights(run)
    exact.fuse_lora(components=["transformer"])
    exact.unload_lora_weights()
    merged = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    changed = [key for key, weight in pipe.transformer.state_dict().items() if not torch.equal(weight, merged[key])]
    assert changed and all(".attn." in key for key in changed)
    equal = torch.cat([(merged[key] == exact.transformer.get_parameter(key).half()).flatten() for key in changed])
    assert equal.float().mean() > 0.999  # not all: the order of a sum may turn a rounding
    assert all(weight.dtype == torch.float16 for weight in merged.values())


# ------------------------------------------------------------------------------------------------------ card and licence


def test_card_has_the_licence_of_the_base_and_says_what_was_done(run, crd, tmp_path):
    assert crd("export", run, "--to", "lora", "--output", tmp_path / "lora")[0] == 0
    card = (tmp_path / "lora" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["license"], head["license_name"], head["license_link"]) == tuple(
        line.partition(": ")[2] for line in LICENCE.splitlines()[1:4]
    )
    assert head["library_name"] == "diffusers" and "lora" in head["tags"] and "base_model" not in head
    assert "The base model's licence applies: tiny-community" in card
    summary = json.loads((run / "summary.json").read_text())
    for text in ("redness (weight 1)", "nano/text/train", "hack alarm", "Base model: `base`", "curves.png"):
        assert text in card
    for row in ("before", "before_guided", "after"):
        assert f"{summary[row]['reward']:.3f}" in card and f"{summary[row]['diversity']:.3f}" in card
    assert str(run.parent) not in card
    assert metadata_load(run / "README.md")["license_name"] == "tiny-community"


def test_licences_that_are_stated_and_that_are_not(tmp_path):
    assert base_licence("nano").front_matter == {"license": "apache-2.0"}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    assert base_licence(str(tmp_path)).front_matter == {"license": "mit"}
    for text in ("# no head", "---\nlicense: [\n---\n", "---\n- 1\n---\n"):
        (tmp_path / "README.md").write_text(text)
        unknown = base_licence(str(tmp_path))
        assert unknown.front_matter["license"] == "other" and "licence of the base model applies" in unknown.sentence
    (tmp_path / "README.md").unlink()
    assert base_licence(str(tmp_path)) == unknown
    assert base_licence("someone/unknown-here") == unknown  # offline


def test_several_licences_are_listed_and_a_file_of_the_base_is_not_linked(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [mit, apache-2.0]\nlicense_link: LICENSE.md\n---\n")
    licence = base_licence(str(tmp_path))
    assert licence.front_matter == {"license": ["mit", "apache-2.0"]}
    assert licence.sentence == "The base model's licence applies: mit, apache-2.0."


def test_names_that_others_may_see():
    shown = {
        "ocr": "ocr",
        "/home/me/rewards.py:fn": "rewards.py:fn",
        "http://10.0.0.5:8400/x": "x",
        "package.module:fn": "package.module:fn",
        "nano/text/train": "nano/text/train",
        "data/mine.txt": "mine.txt",
    }
    assert {name: public_label(name) for name in shown} == shown


def test_names_of_bases():
    assert hub_id("org/model-1.0") == public_name("org/model-1.0") == "org/model-1.0"
    assert [hub_id(path) for path in ("nano", "/a/b", "./a", "a/b/c", "model", "../b")] == [None] * 6
    assert (public_name("nano"), public_name("/home/me/mine")) == ("nano", "mine")


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("StableDiffusionXLPipeline", "num_inference_steps=40, guidance_scale=2"),
        (
            "FluxPipeline",
            "num_inference_steps=40, true_cfg_scale=2, max_sequence_length=64, guidance_scale=3.5, negative_prompt=''",
        ),
        ("StableDiffusion3Pipeline", "num_inference_steps=40, guidance_scale=2, max_sequence_length=64"),
        (None, None),
    ],
)
def test_loading_lines_of_other_pipelines(tmp_path, kind, arguments):
    if kind:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind, "text_encoder_3": [None, None]}))
    (tmp_path / "evaluation_prompts.json").write_text('["x"]')
    model = {"path": str(tmp_path), "max_sequence_length": 64, "distilled_guidance": 3.5}
    config = build_config({"model": model, "evaluation": {"guidance_scale": 2.0}})
    lines = loading_lines(RunFolder(tmp_path), config, "base", "place")
    if kind:
        assert lines[0] == f'pipe = diffusers.{kind}.from_pretrained("base", text_encoder_3=None)'
        assert lines[2] == f"pipe('x', {arguments}).images[0]"
    else:
        assert lines == [
            'pipe = diffusers.DiffusionPipeline.from_pretrained("base")',
            'pipe.load_lora_weights("place")',
            "pipe('x').images[0]",
        ]


# -------------------------------------------------------------------------------------------------------------- mistakes


def refused(crd, run, *words):
    code, printed = crd("export", run, *words)
    assert code == 2 and "Traceback" not in printed and len(printed) < 1000
    return printed


def test_runs_that_cannot_be_exported(spoilable, crd, tmp_path):
    out = ("--output", tmp_path / "out")
    assert "not the folder of a run" in refused(crd, tmp_path / "nowhere", "--to", "lora", *out)
    file = spoilable / "pytorch_lora_weights.safetensors"
    whole = file.read_bytes()
    for spoilt in (whole[: len(whole) // 2], b"", b"x" * 1000):
        file.write_bytes(spoilt)
        for form in ("lora", "merged", "comfyui"):
            assert "damaged" in refused(crd, spoilable, "--to", form, *out)
    save_file({"transformer.a.lora_A.weight": torch.zeros(1, 1)}, file)
    assert "no LoRA file of a run" in refused(crd, spoilable, "--to", "lora", *out)
    file.unlink()
    assert "is not finished" in refused(crd, spoilable, "--to", "lora", *out)
    file.write_bytes(whole)
    (spoilable / "summary.json").write_text("{")
    assert "crd report" in refused(crd, spoilable, "--to", "lora", *out)
    assert not list(tmp_path.glob("out*"))


def test_a_file_with_foreign_tensors_is_refused(spoilable):
    file = spoilable / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file) | {"transformer.x.lora_magnitude_vector": torch.zeros(1)}, file, metadata)
    with pytest.raises(CRDError, match="lora_magnitude_vector"):
        read_lora(file)


def test_an_output_that_exists_is_left_alone(run, crd, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "exists. Give another folder" in refused(crd, run, "--to", "lora", "--output", tmp_path / "mine")
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert "--push-to-hub" in refused(crd, run, "--to", "lora", "--output", tmp_path / "new", "--private")


def test_the_default_output_lies_in_the_run(spoilable, crd):
    assert crd("export", spoilable, "--to", "lora")[0] == 0
    assert (spoilable / "export" / "lora" / "pytorch_lora_weights.safetensors").exists()


def test_a_base_model_that_is_gone_or_another_one(spoilable, run, crd, tmp_path):
    settings = spoilable / "config.yaml"
    (tmp_path / "empty").mkdir()
    for path in (str(tmp_path / "gone"), "someone/unknown-here", str(tmp_path / "empty")):
        data = yaml.safe_load(settings.read_text())
        data["model"]["path"] = path
        settings.write_text(yaml.safe_dump(data))
        assert "is needed and cannot be had" in refused(crd, spoilable, "--to", "merged", "--output", tmp_path / "out")
        assert "cannot be had" in refused(crd, spoilable, "--to", "comfyui", "--output", tmp_path / "out")
        assert crd("export", spoilable, "--to", "lora", "--output", tmp_path / f"lora-{len(path)}")[0] == 0
    lora = read_lora(run / "pytorch_lora_weights.safetensors")
    other = unet_lora(tmp_path)[1]
    (tmp_path / "out").mkdir()
    with pytest.raises(CRDError, match="not the run's base model"):
        write_merged(lora, other, tmp_path / "out")
    shapes = {f"{module}.weight": torch.zeros(2, 2) for module in lora.layers}
    (tmp_path / "small" / "transformer").mkdir(parents=True)
    save_file(shapes, tmp_path / "small" / "transformer" / "x.safetensors")
    (tmp_path / "small" / "model_index.json").write_text('{"_class_name": "X"}')
    (tmp_path / "out" / "transformer").mkdir()
    with pytest.raises(CRDError, match="does not fit"):
        write_merged(lora, tmp_path / "small", tmp_path / "out")


def test_a_disk_without_room_leaves_nothing_behind(run, crd, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # bytes a file may have, here: too few
    try:
        printed = {form: refused(crd, run, "--to", form, "--output", tmp_path / "out") for form in ("lora", "merged", "comfyui")}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert all("cannot be written" in text for text in printed.values())
    assert not list(tmp_path.iterdir())


def test_kinds_that_comfyui_does_not_know():
    check_mapped("SD3Transformer2DModel")
    with pytest.raises(CRDError, match="SanaTransformer2DModel"):
        check_mapped("SanaTransformer2DModel")


# ------------------------------------------------------------------------------------------------------------------- hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files talks to, on loopback."""

    public = False  # whether the repository is there already, for all to see
    token = "hf_test"

    def do_GET(self):
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/whoami-v2":
            self.answer(200, {"name": "me", "type": "user"})
        else:
            self.answer(200, {"id": "me/mine", "private": not self.public, "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, body))
        if self.path.endswith("/repos/create"):
            self.answer(200, {"url": f"http://{self.headers['Host']}/me/mine"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer(200, {"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            self.answer(200, {"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/1", "commitOid": "1" * 40})
        else:
            self.answer(200, {"errors": [], "warnings": []})  # validate-yaml

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests = []
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    Hub.public = False


def push(port, folder, home, private=True, token=Hub.token):
    """The hub's addresses are read on import, so this is another process; it imports no torch."""
    code = "import sys; from crd.export.hub import check_login, push; from pathlib import Path; check_login()\n"
    code += f"print(push(Path({str(folder)!r}), 'me/mine', {private}))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "NO_PROXY": "*", "no_proxy": "*"}
    environment |= {"HF_TOKEN": token} if token else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def test_uploading_to_a_hub_on_loopback(hub, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "README.md").write_text(LICENCE)
    (folder / "config.yaml").write_text("seed: 0\n")
    code, printed = push(hub.server_port, folder, tmp_path / "home")
    assert code == 0 and "me/mine" in printed, printed
    bodies = dict(hub.requests)
    created = json.loads(bodies["/api/repos/create"])
    assert created["name"] == "mine" and (created.get("private") or created.get("visibility") == "private")
    commit = next(body for path, body in hub.requests if "/commit/" in path).decode()
    sent = [json.loads(line)["value"].get("path") for line in commit.splitlines()]
    assert sorted(filter(None, sent)) == ["README.md", "config.yaml"]

    Hub.public, hub.requests[:] = True, []
    code, printed = push(hub.server_port, folder, tmp_path / "home")
    assert code and "is public. Nothing was uploaded" in printed
    assert not any("/commit/" in path for path, _ in hub.requests)


@pytest.mark.parametrize(("token", "text"), [(None, "you are not logged in"), ("hf_wrong", "the hub refused")])
def test_uploading_without_a_good_login(hub, tmp_path, token, text):
    code, printed = push(hub.server_port, tmp_path, tmp_path / "home", token=token)
    assert code and f"--push-to-hub: {text}" in printed
    assert hub.requests == []


def test_uploading_offline_says_so_before_anything_is_written(run, crd, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", Hub.token)
    printed = refused(crd, run, "--to", "lora", "--output", tmp_path / "out", "--push-to-hub", "me/mine")
    assert "HF_HUB_OFFLINE" in printed and not list(tmp_path.glob("out*"))
    code, printed = push(9, tmp_path, Path(tmp_path / "home"))  # nothing listens there
    assert code and "CRDError: --push-to-hub: it cannot be uploaded" in printed

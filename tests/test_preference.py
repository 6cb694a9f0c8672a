"""Preference, aesthetic and similarity rewards on tiny random models: scales, pairs, batches, and what goes wrong."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from preference_models import SIZE, bert_tokenizer, layered_head, save_clip, save_hpsv2, save_imagereward
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from crd.errors import CRDError
from crd.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from crd.rewards.named import resolve_reward
from crd.rewards.preference.embeddings import as_scores, projected

PROMPTS = ["a cat", "dog", "a cat", "a red dog and a very long prompt that goes on", "", "a cat"]
ALL = ("pickscore", "clipscore", "aesthetic", "hpsv2", "imagereward")


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    sizes = [(8, 8), (20, 14), (9, 30), (64, 64), (8, 16), (33, 20)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that the five rewards load."""
    folder = tmp_path_factory.mktemp("models")
    save_clip(folder / "clip")
    save_hpsv2(folder / "hps")
    save_imagereward(folder / "ir")
    torch.manual_seed(1)
    head = torch.nn.ModuleDict({"layers": layered_head(8)})
    torch.save(head.state_dict(), folder / "clip" / "aesthetic-model.pth")
    return folder


@pytest.fixture(scope="module")
def options(folder):
    clip, hps, ir = (str(folder / name) for name in ("clip", "hps", "ir"))
    return {
        "pickscore": {"path": clip, "processor": clip},
        "clipscore": {"path": clip},
        "aesthetic": {"path": clip, "head": clip},
        "hpsv2": {"path": hps, "tokenizer": hps},
        "imagereward": {"path": ir, "tokenizer": ir},
    }


def complaint(name, options):
    with pytest.raises(CRDError) as raised:
        resolve_reward(name, options)
    return str(raised.value)


def one_by_one(folder, pictures, prompts):
    """CLIP's own forward pass, a pair at a time: the scaled cosine."""
    model, processor = CLIPModel.from_pretrained(folder / "clip"), CLIPImageProcessorPil.from_pretrained(folder / "clip")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    for picture, prompt in zip(pictures, prompts, strict=True):
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            yield model, model(**tokens, **processor(picture, return_tensors="pt"))


def test_pickscore_is_the_scaled_cosine_over_26(folder, options, pictures):
    scores = resolve_reward("pickscore", options["pickscore"])(pictures, PROMPTS)
    expected = [output.logits_per_image.item() / 26 for _, output in one_by_one(folder, pictures, PROMPTS)]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert np.ptp(scores) > 0.05


def test_clipscore_is_the_plain_cosine_after_a_bilinear_resize(folder, options, pictures):
    pictures, prompts = [pictures[i] for i in (0, 2, 3, 4)], PROMPTS[:4]  # even margins, which everybody splits alike
    scores = resolve_reward("clipscore", options["clipscore"])(pictures, prompts)
    model, tokenizer = CLIPModel.from_pretrained(folder / "clip"), CLIPTokenizer.from_pretrained(folder / "clip")
    processor = CLIPImageProcessorPil(do_resize=False, do_rescale=False, crop_size={"height": SIZE, "width": SIZE})
    for picture, prompt, score in zip(pictures, prompts, scores, strict=True):
        shape = [SIZE * side // min(picture.size) for side in picture.size]
        planes = [band.convert("F").resize(shape, Image.Resampling.BILINEAR) for band in picture.split()]  # on floats
        pixels = processor(np.stack(planes) / 255, return_tensors="pt", input_data_format="channels_first")
        tokens = tokenizer(prompt, truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            logit = model(**tokens, pixel_values=pixels["pixel_values"].float()).logits_per_image
        assert score == pytest.approx((logit / model.logit_scale.exp()).item(), abs=1e-5)


def test_aesthetic_is_the_layered_head_on_unit_embeddings(folder, options, pictures):
    head = layered_head(8)
    state = torch.load(folder / "clip" / "aesthetic-model.pth", weights_only=True)
    head.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    scores = resolve_reward("aesthetic", options["aesthetic"])(pictures, PROMPTS)
    with torch.no_grad():
        expected = [head(output.image_embeds).item() for _, output in one_by_one(folder, pictures, PROMPTS)]
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_batches_and_order_change_nothing(name, options, pictures):
    together = resolve_reward(name, {**options[name], "batch_size": 6})(pictures, PROMPTS)
    assert all(isinstance(score, float) for score in together)
    for size in (1, 4):
        reward = resolve_reward(name, {**options[name], "batch_size": size})
        assert reward(pictures, PROMPTS) == pytest.approx(together, rel=1e-5, abs=1e-5)
    order = [3, 0, 5, 4, 1, 2]
    shuffled = reward([pictures[i] for i in order], [PROMPTS[i] for i in order], tag=["x"] * 6)
    assert shuffled == pytest.approx([together[i] for i in order], rel=1e-5, abs=1e-5)
    if name != "aesthetic":  # each picture is scored with its own prompt
        other = reward(pictures, PROMPTS[1:] + PROMPTS[:1])
        assert max(abs(a - b) for a, b in zip(other, together, strict=True)) > 1e-3


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "hpsv2"])
def test_identical_prompts_are_encoded_once(name, options, pictures):
    reward, rows = resolve_reward(name, options[name]), []
    hook = reward.model.text_model.register_forward_hook(lambda module, args, output: rows.append(len(output.pooler_output)))
    reward(pictures, PROMPTS)
    hook.remove()
    assert rows == [4]


@pytest.mark.parametrize("name", ALL)
def test_precision_is_the_rewards_own(name, options, pictures):
    reward = resolve_reward(name, options[name])
    scores = reward(pictures, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reward(pictures, PROMPTS) == scores
    half = resolve_reward(name, {**options[name], "dtype": "bfloat16"})(pictures, PROMPTS)
    assert half != scores
    assert half == pytest.approx(scores, abs=0.1 * max(1, np.ptp(scores)))


def test_rewards_of_one_model_share_it(options):
    assert resolve_reward("clipscore", options["clipscore"]).model is resolve_reward("aesthetic", options["aesthetic"]).model


def test_half_precision_files_are_scored_in_full(folder, options, pictures, tmp_path):
    CLIPModel.from_pretrained(folder / "clip").half().save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(folder / "clip").save_pretrained(tmp_path)
    reward = resolve_reward("clipscore", {"path": str(tmp_path)})
    assert {weight.dtype for weight in reward.model.parameters()} == {torch.float32}
    assert not any(weight.requires_grad for weight in reward.model.parameters())


def test_no_number_is_none():
    values = torch.tensor([0.5, float("nan"), float("inf"), -float("inf")])
    assert as_scores(values) == [0.5, None, None, None]


def test_an_embedding_without_direction_gives_no_score(folder, pictures, tmp_path):
    model = CLIPModel.from_pretrained(folder / "clip")
    torch.nn.init.zeros_(model.visual_projection.weight)
    model.save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(folder / "clip").save_pretrained(tmp_path)
    assert resolve_reward("clipscore", {"path": str(tmp_path)})(pictures, PROMPTS) == [None] * 6


def test_both_kinds_of_features_are_understood(folder):
    model = CLIPModel.from_pretrained(folder / "clip")
    pixels = torch.rand(2, 3, SIZE, SIZE)
    output = model.get_image_features(pixel_values=pixels)
    ids = torch.tensor([[76, 0, 77]] * 2)
    unit = model(input_ids=ids, pixel_values=pixels).image_embeds
    features = projected(output)
    torch.testing.assert_close(features / features.norm(dim=-1, keepdim=True), unit)
    assert projected(features) is features


@pytest.mark.parametrize(
    ("name", "option", "published"),
    [
        ("pickscore", "path", "yuvalkirstain/PickScore_v1"),
        ("clipscore", "path", "openai/clip-vit-large-patch14"),
        ("aesthetic", "path", "openai/clip-vit-large-patch14"),
        ("hpsv2", "path", "xswu/HPSv2 HPS_v2.1_compressed.pt"),
        ("imagereward", "path", "THUDM/ImageReward ImageReward.pt"),
    ],
)
def test_without_a_network_the_message_says_what_to_fetch(name, option, published):
    text = complaint(name, {})
    assert f"{name}: options.{option} is " in text
    assert f"hf download {published} --local-dir FOLDER" in text
    assert f"{{{option}: FOLDER}}" in text


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("place", ["/no/such/folder", "./none", 3, ""])
def test_wrong_places(name, place):
    assert f"{name}: options.path is {place!r}" in complaint(name, {"path": place})


@pytest.mark.parametrize(
    ("name", "option", "published"),
    [
        ("pickscore", "processor", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ("hpsv2", "tokenizer", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ("imagereward", "tokenizer", "google-bert/bert-base-uncased"),
        ("aesthetic", "head", "trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth"),
    ],
)
def test_what_belongs_to_a_model_and_is_missing(name, option, published, options, tmp_path):
    for place in (None, str(tmp_path)):  # the hub's, which is out of reach; an empty folder
        given = {key: value for key, value in {**options[name], option: place}.items() if value}
        text = complaint(name, given)
        assert f"{name}: options.{option} is " in text
        assert f"hf download {published} --local-dir FOLDER" in text


def test_a_model_that_lacks_weights_is_not_filled_with_noise(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in (folder / "clip").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert "lacks visual_projection.weight" in complaint("clipscore", {"path": str(tmp_path)})


def test_a_tokenizer_of_another_model(options, tmp_path):
    bigger = bert_tokenizer()
    bigger.add_tokens([f"word{i}" for i in range(20)])
    bigger.save_pretrained(tmp_path)
    assert "do not belong together" in complaint("imagereward", {**options["imagereward"], "tokenizer": str(tmp_path)})


def test_a_file_may_be_named_itself(folder, options, pictures):
    named = {
        "hpsv2": {"path": str(folder / "hps" / "HPS_v2.1_compressed.pt")},
        "imagereward": {"path": str(folder / "ir" / "ImageReward.pt")},  # med_config.json lies beside it
        "aesthetic": {"head": str(folder / "clip" / "aesthetic-model.pth")},
    }
    for name, change in named.items():
        expected = resolve_reward(name, options[name])(pictures, PROMPTS)
        assert resolve_reward(name, {**options[name], **change})(pictures, PROMPTS) == pytest.approx(expected)


class Trap:
    """An object whose unpickling would do harm."""

    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("name", ["hpsv2", "imagereward", "aesthetic"])
def test_files_that_are_no_weights(name, options, tmp_path, capsys):
    option = "head" if name == "aesthetic" else "path"
    contents = {"trap": Trap(), "list": [1], "empty": {}, "words": {"a": "b"}, "other": {"a": torch.ones(2)}}
    for kind, content in contents.items():
        torch.save(content, tmp_path / f"{kind}.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK no zip file")
    for kind in (*contents, "damaged"):
        path = str(tmp_path / f"{kind}.pt")
        assert f"{name}: options.{option} is {path!r}" in complaint(name, {**options[name], option: path})
    assert "unpickled" not in capsys.readouterr().out


def test_weights_of_another_shape_are_refused(folder, options, tmp_path):
    state = torch.load(folder / "hps" / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    for change in ({"visual.extra": torch.ones(1)}, {"ln_final.weight": torch.ones(3)}):
        torch.save({"state_dict": state | change}, tmp_path / "w.pt")
        assert "no open_clip ViT" in complaint("hpsv2", {**options["hpsv2"], "path": str(tmp_path / "w.pt")})
    del state["ln_final.weight"]
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    assert "final_layer_norm.weight" in complaint("hpsv2", {**options["hpsv2"], "path": str(tmp_path / "w.pt")})


def test_a_head_of_another_model(options, tmp_path):
    torch.save(torch.nn.ModuleDict({"layers": layered_head(7)}).state_dict(), tmp_path / "h.pth")
    text = complaint("aesthetic", {**options["aesthetic"], "head": str(tmp_path / "h.pth")})
    assert "it takes 7 numbers, CLIP gives 8" in text


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch_size": 0}, "options.batch_size is 0"),
        ({"batch_size": True}, "options.batch_size is True"),
        ({"batch_size": "4"}, "options.batch_size is '4'"),
        ({"dtype": "float64"}, "options.dtype is 'float64'; use one of float32, bfloat16, float16"),
        ({"device": "gpu"}, "options.device is 'gpu'"),
        ({"device": 1.5}, "options.device is 1.5"),
        ({"model": "x"}, "do not fit"),
    ],
)
def test_wrong_options(name, wrong, said, options):
    assert said in complaint(name, {**options[name], **wrong})


def test_jpeg_is_the_size_of_the_file(pictures, tmp_path):
    pictures[3].save(tmp_path / "x.jpg", quality=95)
    kilobytes = (tmp_path / "x.jpg").stat().st_size / 1000
    assert jpeg_incompressibility([pictures[3]], [""], tag=[None]) == [kilobytes]
    assert jpeg_compressibility([pictures[3]], [""], tag=[None]) == [-kilobytes / 500]


def test_jpeg_likes_flat_or_busy_pictures(pictures):
    flat = Image.new("RGB", (64, 64), "red")
    for name, better in (("jpeg_compressibility", flat), ("jpeg_incompressibility", pictures[3])):
        scores = resolve_reward(name, {})([flat, pictures[3]], ["", ""])
        assert [flat, pictures[3]][int(np.argmax(scores))] is better
    assert "do not fit" in complaint("jpeg_compressibility", {"quality": 50})


def test_jpeg_of_other_modes(pictures):
    buffer = io.BytesIO()
    pictures[3].convert("L").convert("RGB").save(buffer, "JPEG", quality=95)
    assert jpeg_incompressibility([pictures[3].convert("L")], [""]) == [len(buffer.getvalue()) / 1000]
    assert jpeg_incompressibility([pictures[3].convert("RGBA")], [""]) == jpeg_incompressibility([pictures[3]], [""])

"""The learned judges of the nano world: their data and losses against naive versions, the shipped networks, known hacks."""

import json
import math
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from PIL import Image

from crd.errors import CRDError
from crd.nano import world
from crd.nano.judges import alignment, detector_net, set_judges
from crd.nano.judges.accuracy import to_images
from crd.nano.judges.alignment import AlignmentNet, alignment_loss, captions_of, naming_loss, picture_features
from crd.nano.judges.build import JudgesConfig, build_judges, train, train_judges
from crd.nano.judges.captions import MAX_TOKENS, hard_negatives, pad, tokenize
from crd.nano.judges.data import blur, cell_middles, degrade, free_scene, item_cells, judge_prompt, letter_cells, render_bank
from crd.nano.judges.detector_net import DetectorNet, NetDetector, assign
from crd.nano.judges.load import judges_folder, load_alignment, load_detector
from crd.nano.judges.sets import real_pictures
from crd.rewards.named import resolve_reward

NUMBERS = {"a": 1, "two": 2, "three": 3, "four": 4}


@pytest.fixture(scope="module")
def bank():
    return render_bank(160, 7, "test")


# ---------------------------------------------------------------------------------------- captions


def fits(text, items):
    """Whether a caption describes a scene exactly; written from the caption's words alone."""
    words = re.fullmatch(r"a photo of (\w+) (.+?)(?: (and|left of|right of|above|below) a (.+))?", text)
    number, first, relation, second = words.groups()
    named = [first] * NUMBERS[number] + ([second] if second else [])
    singular = {world.plural(shape): shape for shape in world.SHAPES}
    wanted = [(*name.split()[:-1], singular.get(name.split()[-1], name.split()[-1])) for name in named]
    if Counter(entry[-1] for entry in wanted) != Counter(item.shape for item in items):
        return False
    if any(len(entry) == 2 and entry not in {(i.color, i.shape) for i in items} for entry in wanted):
        return False
    if relation in (None, "and"):
        return True
    a, b = (next(i for i in items if i.shape == entry[-1]) for entry in wanted)
    return {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[relation] and (
        (abs(a.x - b.x) > abs(a.y - b.y)) == (relation in ("left of", "right of"))
    )


@pytest.mark.parametrize("task", world.SHAPE_TASKS)
def test_hard_negatives_of_shapes_are_false_and_the_caption_is_true(task):
    rng = random.Random(task)
    for _ in range(40):
        prompt = world.draw_prompt(task, rng)
        items = world.layout(prompt.metadata, rng)
        assert fits(prompt.text, items)
        negatives = hard_negatives(prompt, 9, rng)
        assert len(set(negatives)) == 9
        for text in negatives:
            assert tokenize(text) and not fits(text, items), (prompt.text, text)


def test_hard_negatives_of_signs_are_one_step_away():
    rng = random.Random(0)
    for _ in range(40):
        prompt = world.draw_prompt("text", rng)
        negatives = hard_negatives(prompt, 9, rng)
        words = [text.split('"')[1] for text in negatives]
        assert len(set(words)) == 9 and prompt.metadata["word"] not in words
        for word in words:
            missing = Counter(prompt.metadata["word"]) - Counter(word)
            assert sum(missing.values()) <= 1 and 3 <= len(word) <= 5
            assert world.text_prompt(word).text in negatives


def test_tokens():
    assert len(tokenize('a sign that says "STARS"')) == 11
    rng = random.Random(0)
    assert all(tokenize(judge_prompt(rng).text) for _ in range(300))
    for other in ("a photo of a dog", "", 'a sign that says "Star"', "a photo of a ring " * 5):
        assert tokenize(other) is None
    assert pad([[1, 2]]).tolist() == [[1, 2] + [0] * (MAX_TOKENS - 2)]


# ------------------------------------------------------------------------------------------- data


def test_free_scenes_do_not_overlap_and_stay_inside():
    rng, sizes = random.Random(0), set()
    for _ in range(200):
        items = free_scene(rng)
        sizes.add(len(items))
        assert all(i.diameter / 2 < min(i.x, i.y, 64 - i.x, 64 - i.y) for i in items)
        pairs = [(a, b) for k, a in enumerate(items) for b in items[:k]]
        assert all(math.hypot(a.x - b.x, a.y - b.y) > (a.diameter + b.diameter) / 2 for a, b in pairs)
    assert {0, 1, 4, 6} <= sizes <= set(range(8))


def test_blur_is_scipys():
    pictures = torch.rand(3, 2, 12, 10, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.4, 0.9, 1.2])
    ours = blur(pictures, sigma).numpy()
    for k in range(3):
        for c in range(2):
            theirs = scipy.ndimage.gaussian_filter(pictures[k, c].numpy(), float(sigma[k]), mode="nearest", radius=3)
            np.testing.assert_allclose(ours[k, c], theirs, atol=1e-5)


def test_a_bank_is_a_function_of_its_seed(bank):
    again = render_bank(20, 7, "test")
    assert torch.equal(again.pictures, bank.pictures[:20]) and again.prompts == bank.prompts[:20]
    assert not torch.equal(render_bank(20, 7, "other").pictures, again.pictures)


def test_cells_name_what_the_picture_shows():
    at = {middle: k for k, middle in enumerate(cell_middles())}
    cells = letter_cells("CAB")
    assert [cells[at[x, 28.0]][0] for x in (4.0, 12.0, 28.0, 44.0, 60.0)] == [0, 3, 1, 2, 0]
    assert all(cells[at[x, 12.0]] == [0, -1] for x in (4.0, 12.0, 28.0))
    rng = random.Random(0)
    for _ in range(30):
        prompt = world.Prompt("", {"tag": "counting", "include": [{"class": "circle", "count": 2}]})
        before = rng.getstate()
        picture = world.render(prompt, rng)
        rng.setstate(before)
        rng.choice(world.TINTS)
        for (x, y), (name, color) in zip(cell_middles(), item_cells(world.layout(prompt.metadata, rng)), strict=True):
            pixel, *rest = {picture.getpixel((int(x) - i, int(y) - j)) for i in (0, 1) for j in (0, 1)}
            if rest:  # on the rim
                continue
            if pixel in world.COLORS.values():
                assert name == 27 and pixel == list(world.COLORS.values())[color]
            elif pixel in world.TINTS:
                assert (name, color) == (0, -1)


# ------------------------------------------------------------------------------------------ losses


def test_assignment_against_loops(bank):
    index, distance = assign(bank.items)
    centers = torch.tensor(cell_middles())
    assert centers[9].tolist() == [12.0, 12.0] and centers[7].tolist() == [60.0, 4.0]
    for n in range(12):
        for cell in range(64):
            near = [
                (max(abs(row[2] - centers[cell, 0]), abs(row[3] - centers[cell, 1])), k)
                for k, row in enumerate(bank.items[n])
                if row[0] >= 0
            ]
            if near:
                assert distance[n, cell] == pytest.approx(float(min(near)[0])) and index[n, cell] == min(near)[1]
            else:
                assert distance[n, cell] == math.inf


class Ideal(torch.nn.Module):
    """Answers of a network that knows the items."""

    def __init__(self, items):
        super().__init__()
        self.items = items

    def forward(self, pictures):
        index, distance = assign(self.items)
        item = self.items.gather(1, index[..., None].expand(-1, -1, 5))
        shapes, colors = (
            20.0 * F.one_hot(item[..., k].long().clamp(min=0), len(names)).float()
            for k, names in enumerate((world.SHAPES, world.COLORS))
        )
        boxes = torch.cat([(item[..., 2:4] - torch.tensor(cell_middles())) / 8, (item[..., 4:].clamp(min=1) / 20).log()], -1)
        return torch.where(distance <= 5, 12.0, -12.0), shapes, colors, boxes


def test_detections_of_an_ideal_network_are_the_items(bank):
    detections = NetDetector(Ideal(bank.items[:100]))(to_images(bank.pictures[:100]))
    for found, rows in zip(detections, bank.items, strict=False):
        there = [row for row in rows.tolist() if row[0] >= 0]
        assert len(found) == len(there)
        for shape, color, x, y, d in there:
            (match,) = [m for m in found if m.box == pytest.approx((x - d / 2, y - d / 2, x + d / 2, y + d / 2), abs=1e-3)]
            assert (match.name, match.color) == (world.SHAPES[int(shape)], list(world.COLORS)[int(color)])
            assert match.score > 0.99
    assert detector_net.detection_loss(Ideal(bank.items), bank.pictures.float(), bank.items) < 1e-3


def test_alignment_loss_against_loops():
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    right = torch.tensor([True, False, True, True, False])

    def wrongness(logit, truth):
        return -math.log(1 / (1 + math.exp(-logit if truth else logit)))

    own = [wrongness(row[0], truth) for row, truth in zip(logits.tolist(), right.tolist(), strict=True)]
    near = [wrongness(x, False) for row in logits.tolist() for x in row[1:4]]
    others = [wrongness(x, False) for row in logits.tolist() for x in row[4:]]
    assert float(alignment_loss(logits, right)) == pytest.approx(np.mean(own) + np.mean(near) + np.mean(others), rel=1e-5)


def test_naming_loss_against_loops(bank):
    rng = torch.Generator().manual_seed(0)
    named, shown = torch.randn(6, 64, 38, generator=rng), bank.cells[:6]
    empty, full, colors = [], [], []
    for row, cells in zip(named.tolist(), shown.tolist(), strict=True):
        for logits, (name, color) in zip(row, cells, strict=True):
            (full if name else empty).append(math.log(sum(map(math.exp, logits[:32]))) - logits[name])
            if color >= 0:
                colors.append(math.log(sum(map(math.exp, logits[32:]))) - logits[32 + color])
    assert empty and full and colors
    assert float(naming_loss(named, shown)) == pytest.approx(np.mean(empty) + np.mean(full) + np.mean(colors), rel=1e-5)
    nothing = torch.tensor([0, -1]).expand(1, 64, 2)
    assert torch.isfinite(naming_loss(named[:1], nothing))


def test_padding_does_not_count():
    torch.manual_seed(0)
    net = AlignmentNet().eval()
    cells, tokens = torch.randn(1, 64, 64), pad([tokenize("a photo of a ring")])
    with torch.no_grad():
        before = net(cells, tokens)
        net.order[5:] += torch.randn(MAX_TOKENS - 5, 64)
        torch.testing.assert_close(net(cells, tokens), before)
        net.order[4] += torch.randn(64)
        assert abs(net(cells, tokens) - before) > 1e-3


def test_training_captions_are_labelled_truly(bank):
    """The first is right, unless there is none; those of other rows have other shapes or letters."""
    rows = list(range(60))
    texts = captions_of(bank, rows, random.Random(0))
    assert len(texts) == 6 * 60
    by_text = {prompt.text: number for prompt, number in zip(bank.prompts, bank.contents.tolist(), strict=True) if prompt}
    for row in rows:
        own, *near = texts[6 * row : 6 * row + 4]
        prompt = bank.prompts[row]
        assert own == prompt.text if prompt else own in bank.near[row]
        assert prompt is None or prompt.text not in near
        assert all(by_text[other] != bank.contents[row] for other in texts[6 * row + 4 : 6 * row + 6])


@pytest.mark.parametrize(("module", "make"), [(detector_net, DetectorNet), (alignment, AlignmentNet)])
def test_twenty_steps_lower_the_loss(bank, module, make):
    torch.manual_seed(0)
    small = replace(bank, pictures=bank.pictures[:32], prompts=bank.prompts[:32])
    net = make()
    losses = train(net, lambda step: module.training_loss(net, small, 16, 0, step), 20, 2e-3, "smoke")
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


TOY = JudgesConfig(pictures=24, autoencoded=4, batch=8, detector_steps=1, alignment_steps=1, measured=24)


def test_training_keeps_what_is_there(tmp_path):
    train_judges(TOY, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"detector.safetensors", "alignment.safetensors"}
    (tmp_path / "detector.safetensors").unlink()
    (tmp_path / "alignment.safetensors").write_bytes(b"trained elsewhere")
    train_judges(TOY, tmp_path)
    assert (tmp_path / "detector.safetensors").read_bytes() == before["detector.safetensors"]  # from the same seed
    assert (tmp_path / "alignment.safetensors").read_bytes() == b"trained elsewhere"


def test_build_writes_what_it_measured(tmp_path):
    measured = build_judges(TOY, tmp_path)
    written = json.loads((tmp_path / "accuracy.json").read_text())
    assert written.pop("settings")["pictures"] == 24 and written == measured
    assert measured.keys() == {"clean", "degraded", "autoencoded", "floor"}
    assert all(0 <= value <= 1 for name in ("clean", "degraded", "autoencoded") for value in measured[name].values())
    assert all(value > 0 for value in measured["floor"].values())


def test_the_command_trains_and_measures(crd, tmp_path):
    code, printed = crd("nano", "judges", "--steps", "0")
    assert code == 2 and "--steps" in printed
    code, printed = crd("nano", "--help")
    assert code == 0 and "judges" in printed


def test_missing_weights_are_told_of(tmp_path):
    with pytest.raises(CRDError, match=r"detector\.safetensors.*crd nano judges --output"):
        load_detector(tmp_path / "nowhere")


# --------------------------------------------------------------------------- the shipped networks


def pictures_of(tasks, each, seed, split="heldout"):
    rng = random.Random(seed)
    prompts = [world.draw_prompt(task, rng, split) for task in tasks for _ in range(each)]
    images = [world.render(p, rng) for p in prompts]
    columns = {key: [p.metadata.get(key) for p in prompts] for key in ("tag", "include", "exclude", "word")}
    return images, prompts, columns


def spoilt(images):
    pictures = torch.from_numpy(world.to_array(images))
    return to_images(((degrade(pictures, torch.Generator().manual_seed(0)) + 1) * 127.5).round().to(torch.uint8))


def test_size_and_precision_of_the_weights():
    from safetensors.torch import load_file

    paths = list(judges_folder().glob("*.safetensors"))
    assert {path.stem for path in paths} == {"detector", "alignment"}
    assert sum(path.stat().st_size for path in paths) < 4 * 2**20
    assert all(t.dtype in (torch.float16, torch.int64) for path in paths for t in load_file(path).values())


def test_the_detector_network_knows_the_world():
    reward = resolve_reward("geneval_net", {"output": "strict"})
    images, prompts, columns = pictures_of(world.SHAPE_TASKS, 20, 1)
    texts = [p.text for p in prompts]
    assert np.mean(reward(images, texts, **columns)) > 0.93
    assert np.mean(reward(spoilt(images), texts, **columns)) > 0.85
    turned = {key: column[20:] + column[:20] for key, column in columns.items()}
    assert np.mean(reward(images, texts, **turned)) < 0.2
    assert reward(*pictures_of(["text"], 2, 0)[:1], ["", ""], include=[None, None]) == [None, None]


def test_the_alignment_network_knows_captions_from_near_ones():
    reward, rng = resolve_reward("alignment", {}), random.Random(0)
    images, prompts, _ = pictures_of(("text", "text", "text", *world.SHAPE_TASKS), 12, 2)
    texts = [[p.text, *hard_negatives(p, 9, rng)] for p in prompts]
    for shown, least in ((images, 0.9), (spoilt(images), 0.8)):
        flat = reward([image for image in shown for _ in range(10)], [text for row in texts for text in row])
        scores = np.array(flat).reshape(-1, 10)
        assert np.mean(scores[:, 0] > scores[:, 1:].max(1)) > least
        assert scores[:, 0].mean() > 0.8 > 0.2 > scores[:, 1:].mean()
    assert reward(images[:2], ["a photo of a dog", texts[1][0]])[0] is None
    assert reward(images[:1], ["a photo of a dog"]) == [None]


def test_scores_do_not_depend_on_the_batch():
    images, prompts, _ = pictures_of(("text", *world.SHAPE_TASKS), 19, 3)  # more than one batch
    together = resolve_reward("alignment", {})(images, [p.text for p in prompts])
    alone = [resolve_reward("alignment", {})([i], [p.text])[0] for i, p in list(zip(images, prompts, strict=True))[::16]]
    assert together[::16] == pytest.approx(alone, abs=1e-4)
    large = [image.resize((128, 128), Image.Resampling.NEAREST) for image in images[:4]]
    assert resolve_reward("alignment", {})(large, [p.text for p in prompts[:4]]) == pytest.approx(together[:4], abs=1e-4)


# -------------------------------------------------------------------------------- sets of pictures


def test_set_judges_tell_real_from_spoilt_and_varied_from_copied():
    rng = random.Random(4)
    prompts = [world.draw_prompt("color_attr", rng) for _ in range(8)]
    texts, metadata = [p.text for p in prompts for _ in range(4)], [p.metadata for p in prompts for _ in range(4)]
    real = real_pictures(texts, metadata, 4, seed=9)
    assert len(real) == 32
    whole = set_judges(real, texts, metadata, 4)
    copies = set_judges([real[i // 4 * 4] for i in range(32)], texts, metadata, 4)
    noisy = set_judges(spoilt(real), texts, metadata, 4)
    other = set_judges(real[::-1][:16] + real[:16], texts, metadata, 4)  # the right pictures, in another order
    assert copies["vendi"] == pytest.approx(1) and 1.3 < whole["vendi"] <= 4
    assert whole["frechet"] < copies["frechet"] and whole["frechet"] < noisy["frechet"]
    assert other["frechet"] == pytest.approx(whole["frechet"])
    assert set_judges(real[:4], ["a dog"] * 4, [{}] * 4, 4).keys() == {"vendi"}
    assert picture_features(load_alignment(), real).shape == (32, 48)


# ------------------------------------------------------------------------------------ known hacks


def test_a_page_tiled_with_the_word_does_not_fool_the_alignment():
    from test_judges import tiled

    images, prompts, _ = pictures_of(["text"], 12, 5)
    texts = [p.text for p in prompts]
    reward = resolve_reward("alignment", {})
    assert np.mean(reward([tiled(image) for image in images], texts)) < 0.3 < 0.8 < np.mean(reward(images, texts))


def test_duplicated_objects_fool_neither():
    """One circle asked for, four drawn: a rule that only looks whether there is a circle is satisfied."""
    rng = random.Random(6)
    prompts = [world.draw_prompt("single_object", rng) for _ in range(12)]
    four = [world.Prompt("", {"tag": "counting", "include": [{**p.metadata["include"][0], "count": 4}]}) for p in prompts]
    images, texts = [world.render(p, rng) for p in four], [p.text for p in prompts]
    columns = {"tag": ["single_object"] * 12, "include": [p.metadata["include"] for p in prompts]}
    assert np.mean(resolve_reward("geneval_net", {"output": "correct"})(images, texts, **columns)) > 0.9
    assert np.mean(resolve_reward("geneval_net", {})(images, texts, **columns)) < 0.1
    assert np.mean(resolve_reward("alignment", {})(images, texts)) < 0.2

"""Judges without networks of ours: Fréchet and Vendi against closed forms, statistics on flat pictures, Tesseract on signs."""

import random
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import scipy.linalg
from PIL import Image, ImageDraw, ImageFont

from crd.errors import CRDError
from crd.judges import tesseract
from crd.judges.diversity import mean_vendi_score, vendi_score
from crd.judges.frechet import frechet_distance, gaussian_distance, square_root
from crd.judges.statistics import background, saturation
from crd.judges.tesseract import TesseractReward, read
from crd.nano import world
from crd.rewards.named import resolve_reward
from crd.rewards.ocr import OCRReward

# ---------------------------------------------------------------------------------------- Fréchet


def random_covariance(rng, d, rank=None):
    factor = rng.normal(size=(d, rank or d))
    return factor @ factor.T


def test_square_root():
    matrix = random_covariance(np.random.default_rng(0), 6, rank=4)  # singular too
    np.testing.assert_allclose(square_root(matrix) @ square_root(matrix), matrix, atol=1e-9)


def test_gaussian_distance_against_scipy():
    rng = np.random.default_rng(1)
    for _ in range(5):
        a, b = random_covariance(rng, 7), random_covariance(rng, 7)
        mean_a, mean_b = rng.normal(size=(2, 7))
        naive = ((mean_a - mean_b) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
        assert gaussian_distance(mean_a, a, mean_b, b) == pytest.approx(naive, rel=1e-6)


def test_gaussian_distance_of_commuting_covariances():
    """With diagonal covariances it is the sum of squared differences of means and of standard deviations."""
    rng = np.random.default_rng(2)
    (mean_a, mean_b), (spread_a, spread_b) = rng.normal(size=(2, 5)), rng.uniform(0, 3, size=(2, 5))
    expected = ((mean_a - mean_b) ** 2).sum() + ((spread_a - spread_b) ** 2).sum()
    assert gaussian_distance(mean_a, np.diag(spread_a**2), mean_b, np.diag(spread_b**2)) == pytest.approx(expected)


def test_frechet_distance_of_samples():
    rng = np.random.default_rng(3)
    a = rng.normal(size=(50, 4))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a[::-1] + np.array([3, 0, 0, 4])) == pytest.approx(25)
    spread = frechet_distance(a, (a - a.mean(0)) * 3 + a.mean(0))  # covariances S and 9 S: tr(S) (3 - 1)^2
    assert spread == pytest.approx(4 * np.trace(np.cov(a, rowvar=False)))
    b = rng.normal(size=(30, 4)) * 2 + 1
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b))


def test_frechet_distance_with_fewer_rows_than_columns_stays_finite():
    rng = np.random.default_rng(4)
    assert 0 <= frechet_distance(rng.normal(size=(5, 20)), rng.normal(size=(6, 20))) < 1e3


@pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5,), (5,))])
def test_frechet_distance_refuses_shapes(shapes):
    with pytest.raises(ValueError, match="expected features"):
        frechet_distance(np.zeros(shapes[0]), np.zeros(shapes[1]))


# ------------------------------------------------------------------------------------------ Vendi


def test_vendi_score_in_closed_form():
    assert vendi_score(np.ones((5, 3))) == pytest.approx(1)
    assert vendi_score(7 * np.eye(6)) == pytest.approx(6)
    assert vendi_score(np.eye(3).repeat(4, 0)) == pytest.approx(3)  # copies add nothing
    cosine = 0.3  # two rows: eigenvalues (1 +- cosine) / 2
    p, q = (1 + cosine) / 2, (1 - cosine) / 2
    pair = np.array([[1, 0], [cosine, np.sqrt(1 - cosine**2)]])
    assert vendi_score(pair) == pytest.approx(np.exp(-(p * np.log(p) + q * np.log(q))))
    assert vendi_score(np.zeros((3, 2))) == pytest.approx(3)


def test_vendi_score_of_unequal_copies_is_the_exponential_of_the_shares_entropy():
    shares = np.array([5, 2, 1]) / 8
    assert vendi_score(np.eye(3)[[0, 0, 0, 0, 0, 1, 1, 2]]) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_mean_vendi_score_goes_prompt_by_prompt():
    rows = np.array([[1, 0], [1, 0], [1, 0], [0, 1]])  # first prompt: copies; second: orthogonal
    assert mean_vendi_score(rows, 2) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="whole number"):
        mean_vendi_score(rows, 3)


# ------------------------------------------------------------------------------------- statistics


def test_saturation():
    colors = [(255, 0, 0), (90, 90, 90), (0, 0, 0), (200, 100, 150)]
    assert saturation([Image.new("RGB", (4, 4), c) for c in colors], [""] * 4) == pytest.approx([1, 0, 0, 0.5])


def test_background():
    picture = Image.new("RGB", (64, 64), (240, 240, 240))
    assert background([picture], [""]) == [1.0]
    ImageDraw.Draw(picture).rectangle((16, 16, 47, 47), fill=(200, 240, 240))  # 1024 of 4096 pixels
    assert background([picture], [""]) == [0.75]
    ImageDraw.Draw(picture).rectangle((16, 16, 47, 47), fill=(220, 240, 240))  # within the tolerance
    assert background([picture], [""]) == [1.0]


# -------------------------------------------------------------------------------------- Tesseract


@pytest.fixture
def reader():
    pytest.importorskip("tesserocr", reason="the Tesseract judge is optional")
    try:
        tesseract.data_folder()
    except CRDError as error:
        pytest.skip(str(error))


def signs(count=40):
    rng = random.Random(0)
    words = random.Random(1).sample(world.HELD_OUT_WORDS, count)
    prompts = [world.text_prompt(word) for word in words]
    return [world.render(p, rng) for p in prompts], [p.text for p in prompts]


def test_tesseract_reads_the_world(reader):
    images, prompts = signs()
    assert np.mean(TesseractReward(exact=True)(images, prompts)) >= 0.95
    assert np.mean(TesseractReward()(images, prompts[1:] + prompts[:1])) < 0.4
    assert TesseractReward()(images[:2], [prompts[0], "a photo of a ring"]) == [1.0, None]
    assert TesseractReward()([images[0].resize((256, 256))], prompts[:1]) == [1.0]


def test_tesseract_is_no_substitute_for_the_word(reader):
    rng = np.random.default_rng(0)
    junk = [Image.new("RGB", (64, 64), c) for c in ("white", "black")] + [
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(6)
    ]
    assert max(TesseractReward()(junk, ['a sign that says "STAR"'] * 8)) <= 0.25


def test_a_reading_does_not_depend_on_what_was_read_before(reader):
    images, _ = signs(6)
    noisy = [Image.fromarray(with_noise(image, 70)) for image in images]
    assert [read(image) for image in noisy] == [read(image) for image in noisy[::-1]][::-1]


# ------------------------------------------------------------------- hacks of the trained-on reader


def with_noise(image, spread):
    noise = np.random.default_rng(0).normal(0, spread, (64, 64, 3))
    return (np.asarray(image, dtype=float) + noise).clip(0, 255).astype(np.uint8)


def tiled(image):
    """The middle of a sign ten times, as a page that the substring rule of the OCR reward takes for right."""
    page = Image.new("RGB", (64, 64), image.getpixel((0, 0)))
    line = image.crop((0, 20, 64, 44)).resize((32, 12), Image.Resampling.BOX)
    for i in range(10):
        page.paste(line, (32 * (i % 2), 2 + 12 * (i // 2)))
    return page


def test_a_page_tiled_with_the_word_does_not_fool_tesseract(reader):
    images, prompts = signs(2)
    pages = [tiled(image) for image in images]
    assert OCRReward(detect=True)(pages, prompts) == [1.0] * 2
    assert np.mean(TesseractReward()(pages, prompts)) < 0.3


def test_noise_that_only_the_trained_on_reader_sees_through(reader):
    images, prompts = signs(24)
    noisy = [Image.fromarray(with_noise(image, 90)) for image in images]
    assert np.mean(OCRReward(detect=False)(noisy, prompts)) > 0.9
    assert np.mean(TesseractReward()(noisy, prompts)) < 0.6


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    tesseract._reader.cache_clear()
    monkeypatch.setitem(sys.modules, "tesserocr", None)
    with pytest.raises(CRDError, match="pip install tesserocr"):
        read(Image.new("RGB", (64, 64)))


def test_without_the_data_the_message_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.setenv("TESSDATA_PREFIX", str(tmp_path))
    with pytest.raises(CRDError, match=f"{tmp_path}.*pip install"):
        tesseract.data_folder()


def test_names_resolve():
    assert resolve_reward("saturation", {}) is saturation
    assert resolve_reward("background", {}) is background
    assert isinstance(resolve_reward("tesseract", {"exact": True}), TesseractReward)


def test_tesseract_finds_words_anywhere_in_large_pictures(reader):
    """As the OCR reward, which searches pictures higher than 128 pixels: a sign in a corner, two lines, an empty scene."""
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"), 40)
    pictures = []
    for words in ({"STATION": (300, 30)}, {"GRAND": (40, 60), "OPENING": (200, 400)}, {}):
        picture = Image.new("RGB", (512, 512), (235, 230, 220))
        for word, place in words.items():
            ImageDraw.Draw(picture).text(place, word, fill=(20, 20, 90), font=font)
        pictures.append(picture)
    prompts = ['a wall with "STATION" on it', 'a shop with "Grand Opening"', 'a wall with "STATION" on it']
    judge = TesseractReward()
    before = judge(*signs(4))
    assert judge(pictures, prompts) == [1.0, 1.0, 0.0]
    assert judge(*signs(4)) == before, "and the mode of large pictures does not stick"

"""Near-duplicate pictures: edited copies are found, other pictures are not, blanks are cheap."""

import io
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from data_prep.config import NearMedia
from data_prep.dedup.crop_windows import AXIS_WINDOWS, NUM_WINDOWS, window_hashes
from data_prep.dedup.hamming import Band, exact_bands, near_pairs
from data_prep.dedup.image_similarity import image_similarity, plain_similarity
from data_prep.dedup.near_images import ImageHashes, near_images
from data_prep.demo.images import draw_scene
from data_prep.media.image_fingerprint import MIN_AMPLITUDE, SIGNATURE_BYTES, image_fingerprint


def hash_of(pixels):
    return image_fingerprint(pixels)["phash"]


def distance(first, second):
    return (first ^ second).bit_count()


def hashes_of(pictures):
    prints = [image_fingerprint(np.asarray(picture)) for picture in pictures]
    return ImageHashes(
        np.array([each["phash"] for each in prints], np.uint64),
        np.array([each["phash_mirrored"] for each in prints], np.uint64),
        np.stack([np.frombuffer(each["signature"], np.uint8) for each in prints]),
    )


def pairs_of(hashes, *, is_reference=None, workers=1, **changed):
    """Returns all pairs of indices that are found, including members of classes."""
    options = NearMedia()
    matches = near_images(
        hashes,
        is_reference=np.zeros(len(hashes.phash), bool) if is_reference is None else is_reference,
        max_distance=options.image_max_distance,
        min_similarity=options.image_min_similarity,
        workers=workers,
        **changed,
    )
    left = np.concatenate([matches.left, matches.members])
    right = np.concatenate([matches.right, matches.member_firsts])
    return {tuple(sorted(pair)) for pair in zip(left.tolist(), right.tolist(), strict=True)}


@pytest.fixture(scope="module")
def photographs():
    """Cuts scikit-learn's two photographs into disjoint parts of 213 x 320 and 106 x 160."""
    load_sample_images = pytest.importorskip("sklearn.datasets").load_sample_images
    parts = []
    for pixels in load_sample_images().images:
        picture = Image.fromarray(pixels)
        for rows, columns in ((2, 2), (4, 4)):
            height, width = picture.height // rows, picture.width // columns
            corners = [(x * width, y * height) for y in range(rows) for x in range(columns)]
            parts += [picture.crop((x, y, x + width, y + height)) for x, y in corners[::3]]
    return parts


def saved(picture, image_format, quality):
    sink = io.BytesIO()
    picture.save(sink, image_format, quality=quality)
    return Image.open(sink).convert("RGB")


def scaled(picture, factor):
    return picture.resize((round(picture.width * factor), round(picture.height * factor)))


def cropped(picture, left, top, right, bottom):
    width, height = picture.size
    return picture.crop((left * width, top * height, right * width, bottom * height))


EDITS = {
    "jpeg": lambda picture: saved(picture, "JPEG", 30),
    "webp": lambda picture: saved(picture, "WEBP", 50),
    "smaller": lambda picture: scaled(picture, 0.25),
    "larger": lambda picture: scaled(picture, 2),
    "mirrored": lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.1),
    "contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(0.85),
    "saturation": lambda picture: ImageEnhance.Color(picture).enhance(1.15),
    "cropped": lambda picture: cropped(picture, 0.03, 0.05, 0.98, 1),
    "mirrored, cropped": lambda picture: EDITS["mirrored"](EDITS["cropped"](picture)),
}


# ------------------------------------------------------------------------------- fingerprints


def test_the_hash_of_the_mirrored_picture_is_known_from_the_picture(photographs):
    for picture in photographs:
        pixels = np.asarray(picture)
        mirrored = image_fingerprint(np.ascontiguousarray(pixels[:, ::-1]))
        assert distance(image_fingerprint(pixels)["phash_mirrored"], mirrored["phash"]) <= 2


def test_the_hash_holds_the_signs_of_the_cosine_transform():
    fft = pytest.importorskip("scipy.fft")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 1), np.uint8).repeat(3, axis=2)
    transform = fft.dctn(pixels[:, :, 0].astype(float), type=2)
    lowest = sorted(
        ((i, j) for i in range(9) for j in range(9) if i or j),
        key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair),
    )
    threshold = MIN_AMPLITUDE * (2 * 32) ** 2  # scipy's sums are not divided, and doubled twice
    expected = sum(1 << n for n, pair in enumerate(lowest[:64]) if transform[pair] > threshold)
    assert hash_of(pixels) == expected


@settings(max_examples=30)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32))
def test_pictures_of_any_size_have_a_fingerprint(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    found = image_fingerprint(pixels)
    assert 0 <= found["phash"] < 2**64
    assert len(found["signature"]) == SIGNATURE_BYTES
    assert found == image_fingerprint(pixels.copy())


def test_a_flat_picture_has_no_frequencies():
    for value in (0, 100, 255):
        found = image_fingerprint(np.full((40, 60, 3), value, np.uint8))
        assert found["phash"] == found["phash_mirrored"] == 0


def test_long_pictures_are_fast():
    pixels = np.zeros((10_000, 50, 3), np.uint8)
    assert hash_of(pixels) == 0


def test_the_hash_of_a_window_is_near_that_of_the_cropped_picture(photographs):
    rows, columns = 4, 2  # of AXIS_WINDOWS
    (top, bottom), (left, right) = AXIS_WINDOWS[rows], AXIS_WINDOWS[columns]
    window = rows * len(AXIS_WINDOWS) + columns
    whole = hashes_of(photographs)
    of_windows = window_hashes(whole.signatures, window)
    crops = hashes_of([cropped(each, left, top, right, bottom) for each in photographs])
    near = np.bitwise_count(of_windows ^ crops.phash)
    far = np.bitwise_count(whole.phash ^ crops.phash)
    assert np.median(near) < 6 < 12 < np.median(far)
    assert NUM_WINDOWS == 36


# ---------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("max_distance", [0, 1, 2, 5, 9])
def test_neighbours_are_those_of_the_double_loop(max_distance):
    rng = np.random.default_rng(max_distance)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    hashes[250:] = hashes[:50]  # equal ones
    queries = hashes.copy()
    for place in range(200):
        for bit in rng.choice(64, rng.integers(0, 13), replace=False):
            queries[place] ^= np.uint64(1) << np.uint64(bit)
    bands = exact_bands(max_distance)
    found = [
        pair
        for left, right in near_pairs(queries, hashes, max_distance=max_distance, bands=bands)
        for pair in zip(left.tolist(), right.tolist(), strict=True)
    ]
    distances = np.bitwise_count(queries[:, None] ^ hashes)
    assert len(found) == len(set(found))
    assert set(found) == set(zip(*np.nonzero(distances <= max_distance), strict=True))


def test_pieces_of_a_crowded_band_hold_every_pair(monkeypatch):
    monkeypatch.setattr("data_prep.dedup.hamming.PAIRS_AT_ONCE", 37)
    hashes = np.arange(60, dtype=np.uint64) << np.uint64(40)  # all alike in the lowest bits
    pairs = near_pairs(hashes, hashes, max_distance=64, bands=[Band(0, 20, 0)])
    pieces = [(left, right) for left, right in pairs]
    assert max(len(left) for left, _ in pieces) <= 37
    found = [(a, b) for left, right in pieces for a, b in zip(left, right, strict=True)]
    assert len(found) == len(set(found)) == 60 * 60


# --------------------------------------------------------------------------------- similarity


def test_similarity_of_equal_pictures_is_one_and_of_others_is_low(photographs):
    signatures = hashes_of(photographs).signatures
    no = np.zeros(len(signatures), bool)
    assert plain_similarity(signatures, signatures, is_mirrored=no) == pytest.approx(1)
    others = np.roll(signatures, 1, axis=0)
    for similarity in (
        plain_similarity(signatures, others, is_mirrored=no),
        image_similarity(signatures, others, is_mirrored=no, windows=no.astype(int)),
    ):
        assert similarity.shape == no.shape
        assert similarity.max() < NearMedia().image_min_similarity


def test_another_colour_or_shape_makes_a_difference():
    scene = ("circle", "red", "large", "centre", "solid")
    recoloured = ("circle", "blue", *scene[2:])
    same_background = [draw_scene(each, np.random.default_rng(3)) for each in (scene, recoloured)]
    assert not pairs_of(hashes_of(same_background))
    shapes = ("circle", "square", "triangle", "star", "cross")
    drawn = [
        draw_scene((each, *scene[1:]), np.random.default_rng(n)) for n, each in enumerate(shapes)
    ]
    assert not pairs_of(hashes_of(drawn))


def test_blank_pictures_match_only_in_their_colour():
    colours = [(255, 255, 255), (0, 0, 0), (200, 30, 30), (30, 30, 200), (255, 255, 255)]
    pictures = [np.full((20, 30, 3), colour, np.uint8) for colour in colours]
    assert pairs_of(hashes_of(pictures)) == {(0, 4)}


# ------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("edit", EDITS)
def test_edited_copies_are_found_and_nothing_else(photographs, edit):
    copies = [EDITS[edit](picture) for picture in photographs]
    found = pairs_of(hashes_of([*photographs, *copies]))
    wanted = {(place, place + len(photographs)) for place in range(len(photographs))}
    assert len(wanted - found) <= 1
    assert not found - wanted


def test_mirrored_pictures_are_found_unless_they_are_to_be_kept(photographs):
    mirrored = [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in photographs]
    num = len(photographs)
    hashes = hashes_of([*photographs, *mirrored, *photographs])
    assert pairs_of(hashes) >= {(n, n + num) for n in range(num)}
    found = pairs_of(hashes, matches_mirrored=False)
    assert found == {(n, n + 2 * num) for n in range(num)}


def test_references_are_not_compared_with_one_another(photographs):
    pictures = [photographs[0], photographs[1], *photographs[:2], *photographs[:2]]
    is_reference = np.arange(6) >= 2
    found = pairs_of(hashes_of(pictures), is_reference=is_reference)
    assert found == {(0, 2), (0, 4), (1, 3), (1, 5)}
    assert not pairs_of(hashes_of(pictures[2:]), is_reference=is_reference[2:])


def test_the_result_does_not_depend_on_the_number_of_threads(photographs):
    hashes = hashes_of([*photographs, *(scaled(each, 0.7) for each in photographs)])
    assert pairs_of(hashes, workers=1) == pairs_of(hashes, workers=3)


def test_no_pictures_have_no_pairs():
    none = np.empty(0, np.uint64)
    assert pairs_of(ImageHashes(none, none, np.empty((0, SIGNATURE_BYTES), np.uint8))) == set()


def test_many_blank_pictures_do_not_take_quadratic_time():
    num = 100_000
    shades = np.random.default_rng(0).integers(0, 256, num).astype(np.uint8)
    signatures = np.full((num, SIGNATURE_BYTES), 128, np.uint8)
    signatures[:, :256] = shades[:, None]
    zeros = np.zeros(num, np.uint64)
    start = time.process_time()
    found = pairs_of(ImageHashes(zeros, zeros, signatures))
    assert time.process_time() - start < 100  # CPU seconds
    assert num - 256 <= len(found) < num + 256**2

"""Search by words, pictures and sounds: the index, the requests, and the page in a real browser."""

import io
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from werkzeug.serving import make_server

from data_prep.shards.subset import KeptSamples
from eval.config import SearchConfig
from eval.embeddings.index import open_index
from eval.embeddings.items import MediaSet
from eval.models.encoder import Encoder
from eval.models.preprocessing import MediaFrontEnd
from eval.report.search_engine import SearchEngine, ViewIndex
from eval.report.search_page import build_app
from eval.search import dry_run, run
from tests.support.toy_evaluation import (
    COLORS,
    ToyModel,
    load_toy_model,
    picture_sample,
    sound_sample,
    write_dataset,
)
from tests.support.toy_models import write_open_clip_folder

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def unit_rows(count, seed):
    rows = np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("exact_up_to", [3000, 0])
def test_the_index_finds_what_comparing_with_all_finds(tmp_path, exact_up_to):
    rows, queries = unit_rows(3000, seed=1), unit_rows(50, seed=2)
    settings = {"origin": "rows", "exact_up_to": exact_up_to}
    index = open_index(tmp_path, rows, **settings)
    _, found = index.search(queries, 10)
    expected = np.argsort(-(queries @ rows.T), axis=1)[:, :10]
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, expected, strict=True)])
    assert shared == 1 if exact_up_to else shared > 0.97
    made = (tmp_path / "index.faiss").stat().st_mtime_ns
    _, again = open_index(tmp_path, rows, **settings).search(queries, 10)
    np.testing.assert_array_equal(again, found)
    assert (tmp_path / "index.faiss").stat().st_mtime_ns == made
    open_index(tmp_path, rows[:7], **settings | {"origin": "others"})
    assert (tmp_path / "index.faiss").stat().st_mtime_ns != made


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Builds a search engine over images of three colours, with a model that recognises colours."""
    folder = tmp_path_factory.mktemp("search")
    samples = [picture_sample(list(COLORS)[n % 3], seed=n) for n in range(12)]
    dataset = KeptSamples(write_dataset(folder / "pictures", samples), subset=None)
    _, transforms, tokenizer = load_toy_model(folder)
    front_ends = {k: MediaFrontEnd(k, each, {}, "windows") for k, each in transforms.items()}
    origin = SimpleNamespace(folder="toy")
    encoder = Encoder(
        ToyModel(), front_ends, tokenizer, origin, torch.device("cpu"), torch.float32, 4, 0
    )
    windows = [front_ends["image"].prepare(dataset.read_modalities(n), "image") for n in range(12)]
    embeddings = encoder.encode_items("image", torch.cat(windows), [1] * 12).numpy()
    index = open_index(folder, embeddings, origin="toy", exact_up_to=100)
    items = MediaSet(dataset, [f"{n:04d}" for n in range(12)])
    return SearchEngine(dataset, encoder, [ViewIndex(items, index)], num_results=4)


def keys_of(color):
    return {f"{n:04d}" for n in range(12) if list(COLORS)[n % 3] == color}


def test_words_pictures_and_items_find_their_like(engine):
    client = build_app(engine).test_client()
    found = client.get("/search?text=something+green").json
    assert {item["key"] for item in found} == keys_of("green")
    scores = [item["score"] for item in found]
    assert scores == sorted(scores, reverse=True)
    assert found[0]["captions"][0] == "a green picture"
    assert client.get("/search?text=+").json == []
    content = picture_sample("blue", seed=99)["png"]
    found = client.post("/search", data={"file": (io.BytesIO(content), "mine.PNG")}).json
    assert {item["key"] for item in found} == keys_of("blue")
    assert client.get("/like/2").json[0]["ordinal"] == 2
    answer = client.get("/media/5")
    assert (answer.data, answer.mimetype) == (
        engine.dataset.read_sample(5).members["png"],
        "image/png",
    )
    assert client.get("/about").json["items"] == 12
    sound = sound_sample("low", seed=0)["wav"]
    assert len(client.post("/search", data={"file": (io.BytesIO(sound), "a.wav")}).json) == 4


def test_what_cannot_be_searched_for_says_why(engine):
    client = build_app(engine).test_client()
    assert client.get("/media/12").status_code == client.get("/like/99").status_code == 404
    for content, name, message in (
        (b"no picture", "mine.png", "mine.png: cannot be decoded"),
        (b"", "mine.pdf", "mine.pdf: expected audio and image, found .pdf"),
    ):
        answer = client.post("/search", data={"file": (io.BytesIO(content), name)})
        assert answer.status_code == 422
        assert message in answer.json["error"]
    assert client.post("/search").status_code == 400


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
def test_the_page_shows_what_is_found(engine, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"):
        options.add_argument(f"--{flag}")
    options.add_argument("--disable-background-networking")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    server = make_server("127.0.0.1", 0, build_app(engine), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    wait = WebDriverWait(browser, 20)

    def shown(color):
        wait.until(lambda _: keys() == keys_of(color))

    def keys():
        script = "return [...document.querySelectorAll('.item')].map(item => item.dataset.key)"
        return set(browser.execute_script(script))

    try:
        browser.get(f"http://127.0.0.1:{server.server_port}/")
        browser.find_element(By.ID, "text").send_keys("a red thing\n")
        shown("red")
        pictures = "return [...document.images].filter(i => i.complete && i.naturalWidth).length"
        wait.until(lambda _: browser.execute_script(pictures) == 4)
        mine = tmp_path / "mine.png"
        mine.write_bytes(picture_sample("blue", seed=99)["png"])
        browser.find_element(By.ID, "file").send_keys(str(mine))
        shown("blue")
        drop = """
            const form = new DataTransfer();
            form.items.add(new File([Uint8Array.from(arguments[0])], "dropped.png"));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: form}));
        """
        browser.execute_script(drop, list(picture_sample("green", seed=98)["png"]))
        shown("green")
        browser.get(f"http://127.0.0.1:{server.server_port}/?q=blue")
        shown("blue")
        (tmp_path / "broken.png").write_bytes(b"no picture")
        browser.find_element(By.ID, "file").send_keys(str(tmp_path / "broken.png"))
        wait.until(lambda _: "cannot be decoded" in browser.find_element(By.ID, "state").text)
        assert keys() == set()
    finally:
        browser.quit()
        server.shutdown()


def test_the_command_builds_an_index_once(tmp_path, capsys):
    samples = [picture_sample("red", seed=n) for n in range(5)]
    config = SearchConfig.model_validate(
        {
            "checkpoint": write_open_clip_folder(tmp_path / "tiny"),
            "dataset": write_dataset(tmp_path / "pictures", samples),
            "output": tmp_path / "out",
            "serve": False,
            "batch_size": 2,
        }
    )
    dry_run(config)
    assert "would index 5 image items" in capsys.readouterr().out
    run(config)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    assert any(path.name == "index.faiss" for path in made)
    run(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")} == made

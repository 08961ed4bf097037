"""Search by text, image, sound and vector among all views, compared with loops."""

import io
import shutil
import threading
from functools import partial

import numpy as np
import pytest
import torch
from werkzeug.serving import make_server

from data_prep.errors import InputError
from data_prep.modalities.vectors import to_npy
from data_prep.shards.dataset import Dataset
from data_prep.shards.subset import Subset
from eval import search
from eval.config import SearchConfig
from eval.report.search_page import build_app
from tests.eval.tasks.test_modality_retrieval import items_of
from tests.support.toy_evaluation import write_toy_run
from tests.support.toy_modalities import image, sound
from tests.support.toy_views import SIX, vectors_of, write_views
from tests.support.toy_views_model import FewNumbers, load_views_model, tokenizer_of_letters

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NUM_RESULTS = 3


def searched(folder, data, monkeypatch, *, without=(), **settings):
    """Builds the indexes of a dataset; returns the search engine."""
    engines = []
    monkeypatch.setattr(
        "eval.models.encoder.load_model", partial(load_views_model, without=without)
    )
    monkeypatch.setattr(
        "eval.report.search_page.serve", lambda engine, **options: engines.append(engine)
    )
    values = {"checkpoint": folder / "run", "dataset": str(data), "output": folder / "out"}
    values |= {"batch_size": 4, "num_results": NUM_RESULTS}
    search.run(SearchConfig.model_validate(values | settings))
    return engines[0]


def test_modalities_that_a_subset_lacks_are_left_out(folder, tmp_path, monkeypatch):
    dataset = Dataset(folder / "data")
    shards = range(len(dataset.manifest))
    lacks = ~np.concatenate([dataset.has_all(shard, ["scan"]) for shard in shards])
    subset = Subset.from_bitmap(dataset.info, lacks, preparation={})
    subset.write(tmp_path / "no_scan.subset")
    write_toy_run(tmp_path / "run")
    settings = {"subset": tmp_path / "no_scan.subset"}
    engine = searched(tmp_path, folder / "data", monkeypatch, **settings)
    assert list(engine.indexes) == [name for name in SIX if name != "scan"]
    with pytest.raises(InputError, match="no sample has all of scan"):
        searched(tmp_path, folder / "data", monkeypatch, views=["scan"], **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    write_toy_run(folder / "run")
    write_views(folder / "data", fraction=0.5)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    with pytest.MonkeyPatch.context() as patch:
        return searched(folder, folder / "data", patch)


def expected(dataset, view, query):
    """Returns [(sample, score)] of the items of a view, best first, by a loop."""
    found = [(sample, float(query @ each)) for sample, _, each in items_of(dataset, view)]
    return sorted(found, key=lambda pair: -pair[1])


def queries():
    """Yields (name, request of the query, embedding)."""
    model, transforms, _ = load_views_model(None)

    def encoded(modality, *inputs):
        return model.encode(modality, *(each[None] for each in inputs))[0]

    def of_file(modality, content, extension):
        transform = transforms[modality]
        return encoded(
            modality, FewNumbers.__call__(transform, transform.decode(content, extension))
        )

    values, series = vectors_of(99)
    padded = torch.zeros(4, 2)
    padded[: len(series[:4])] = torch.from_numpy(series[:4])
    yield "text", {"text": "picture 3"}, encoded("text", tokenizer_of_letters(["picture 3"])[0])
    yield (
        "title",
        {"text": "picture 3", "modality": "title"},
        encoded("title", tokenizer_of_letters(["picture 3"])[0]),
    )
    yield "image", {"file": (image(77), "a.png")}, of_file("image", image(77), "png")
    yield (
        "scan",
        {"file": (image(77), "a.png"), "modality": "scan"},
        of_file("scan", image(77), "png"),
    )
    yield "audio", {"file": (sound(77), "a.flac")}, of_file("audio", sound(77), "flac")
    yield "values", {"file": (to_npy(values), "a.npy")}, encoded("values", torch.from_numpy(values))
    yield (
        "series",
        {"file": (to_npy(series), "a.npy"), "modality": "series"},
        encoded("series", padded, torch.tensor(min(4, len(series)))),
    )


@pytest.mark.parametrize(("name", "request_", "query"), queries(), ids=lambda value: str(value)[:9])
def test_every_query_finds_what_a_loop_finds_in_every_view(engine, folder, name, request_, query):
    client, dataset = build_app(engine).test_client(), Dataset(folder / "data")
    if "text" in request_:
        answer = client.get("/search", query_string=request_)
    else:
        content, file_name = request_["file"]
        answer = client.post("/search", data=request_ | {"file": (io.BytesIO(content), file_name)})
    assert answer.status_code == 200, answer.json
    assert list(dict.fromkeys(each["view"] for each in answer.json)) == list(SIX)
    for view in SIX:
        found = [each for each in answer.json if each["view"] == view]
        wanted = expected(dataset, view, query)
        scores = [each["score"] for each in found]
        best = [score for _, score in wanted[:NUM_RESULTS]]
        np.testing.assert_allclose(scores, best, atol=1e-5)
        for each in found:
            of_sample = [score for sample, score in wanted if sample == each["ordinal"]]
            assert min(abs(score - each["score"]) for score in of_sample) < 1e-5


def test_results_show_all_of_a_sample_with_the_found_view_first(engine, folder):
    client, dataset = build_app(engine).test_client(), Dataset(folder / "data")
    for found in client.get("/search?text=picture").json:
        contents = dataset.read_modalities(found["ordinal"])
        assert found["key"] == contents.key
        assert found["parts"][0]["member"] == found["member"] == found["view"]
        assert {part["member"] for part in found["parts"]} == contents.present
        for part in found["parts"]:
            content = client.get(f"/media/{found['ordinal']}?member={part['member']}")
            if part["member"] in contents.media:
                assert content.data == contents.media[part["member"]]
            elif part["kind"] == "vector":
                assert content.data == to_npy(contents.vectors[part["member"]])
                flat = contents.vectors[part["member"]].ravel().tolist()
                assert (part["numbers"], np.prod(part["shape"])) == (flat[:64], len(flat))
            else:
                own = found["member"] == part["member"]
                assert set(part["texts"]) <= set(contents.texts[part["member"]])
                assert own or part["texts"] == contents.texts[part["member"]]
    like = client.get("/like/2?view=text").json
    of_texts = [each for each in like if each["view"] == "text"]
    assert of_texts[0]["item"] == 2 and of_texts[0]["score"] == pytest.approx(1, abs=1e-5)
    about = client.get("/about").json
    assert about["views"] == {view: len(items_of(dataset, view)) for view in SIX}
    assert about["accepts"]["series"] == "vector"


def test_what_cannot_be_found_says_why(engine):
    client = build_app(engine).test_client()
    assert client.get("/like/2?view=photo").status_code == 404
    assert client.get("/media/2?member=photo").status_code == 404
    assert (
        client.get("/like/999?view=text").status_code == client.get("/media/99").status_code == 404
    )
    for content, name, modality, message in (
        (to_npy(np.zeros(5, np.float32)), "a.npy", "", r"expected [3], found [5]"),
        (b"no array", "a.npy", "", "expected an .npy file"),
        (image(1), "a.png", "audio", "expected a modality of kind image (image, scan), found"),
        (b"", "a.pdf", "", "expected audio and image and vector, found .pdf"),
    ):
        data = {"file": (io.BytesIO(content), name), "modality": modality}
        answer = client.post("/search", data=data)
        assert answer.status_code == 422 and message in answer.json["error"]
    answer = client.get("/search?text=x&modality=image")
    assert answer.status_code == 422 and "kind text (text, title), found 'image'" in answer.text


def test_a_model_without_texts_searches_what_it_has(folder, tmp_path, monkeypatch):
    without = ("text", "title", "values", "series", "scan")
    settings = {"without": without, "output": tmp_path / "out"}
    engine = searched(folder, folder / "data", monkeypatch, **settings)
    assert list(engine.indexes) == ["image", "audio"]
    client = build_app(engine).test_client()
    answer = client.get("/search?text=anything")
    assert answer.status_code == 422 and "expected a modality of kind text (none)" in answer.text
    found = client.post("/search", data={"file": (io.BytesIO(sound(5)), "a.flac")}).json
    assert {each["view"] for each in found} == {"image", "audio"}


def test_views_of_the_config_are_searched_and_unknown_ones_refused(folder, tmp_path, monkeypatch):
    settings = {"views": [{"image": "scan"}, {"text": "title"}], "output": tmp_path / "out"}
    engine = searched(folder, folder / "data", monkeypatch, **settings)
    assert list(engine.indexes) == ["image.scan", "text.title"]
    with pytest.raises(InputError, match="found 'photo'"):
        searched(folder, folder / "data", monkeypatch, views=["photo"], output=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
def test_the_page_groups_results_by_view_and_shows_each_kind(engine, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    server = make_server("127.0.0.1", 0, build_app(engine), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    wait = WebDriverWait(browser, 60)

    def count(selector):
        return len(browser.find_elements(By.CSS_SELECTOR, selector))

    def state():
        return browser.find_element(By.ID, "state").text

    try:
        browser.get(f"http://127.0.0.1:{server.server_port}/?q=picture")
        wait.until(lambda _: count(".item") == NUM_RESULTS * len(SIX))
        assert [each.text for each in browser.find_elements(By.TAG_NAME, "h2")] == list(SIX)
        first = "[data-view={}] > :first-child"
        assert count(first.format("audio").replace(":first", "audio:first")) == NUM_RESULTS
        assert count(first.format("scan").replace(":first", "img:first")) == NUM_RESULTS
        assert count(first.format("title").replace(":first", "p.whole:first")) == NUM_RESULTS
        assert count("[data-view=series] svg rect") > NUM_RESULTS
        wait.until(lambda _: browser.find_element(By.ID, "modality").is_displayed())
        Select(browser.find_element(By.ID, "modality")).select_by_value("series")
        (tmp_path / "mine.npy").write_bytes(to_npy(vectors_of(7)[1]))
        browser.find_element(By.ID, "file").send_keys(str(tmp_path / "mine.npy"))
        wait.until(lambda _: "nearest to mine.npy" in state())
        (tmp_path / "bad.npy").write_bytes(b"no array")
        browser.find_element(By.ID, "file").send_keys(str(tmp_path / "bad.npy"))
        wait.until(lambda _: "cannot be decoded" in state())
        browser.get(f"http://127.0.0.1:{server.server_port}/?q=picture")
        wait.until(lambda _: count(".item") == NUM_RESULTS * len(SIX))
        browser.find_element(By.CSS_SELECTOR, "[data-view=audio] button").click()
        wait.until(lambda _: "nearest to 0" in state())
        details = browser.find_elements(By.CSS_SELECTOR, "details summary")
        details[0].click()
        wait.until(lambda _: count("details[open] > :not(summary)") > 0)
    finally:
        browser.quit()
        server.shutdown()

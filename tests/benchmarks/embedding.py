"""Images embedded per CPU second, compared with clip_benchmark on the same model and files.

    python -m tests.benchmarks.embedding

clip_benchmark runs if it is installed (pip install --no-deps clip-benchmark==1.6.2 requests). Both
read the same tars in the main process, alternately; Isopair also writes the embeddings to disk.
"""

import importlib.util
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import webdataset
from PIL import Image
from safetensors.torch import save_file

NUM_IMAGES = 512
BATCH_SIZE = 64
ROUNDS = 3
TEXT_TOWER = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
# One tower that costs less than decoding an image, and one of ViT-S/32's size.
TOWERS = {
    "tiny": {"layers": 1, "width": 64, "head_width": 64},
    "ViT-S/32": {"layers": 12, "width": 384, "head_width": 64},
}


def write_model(folder, tower):
    folder.mkdir()
    config = {
        "embed_dim": 384,
        "vision_cfg": tower | {"image_size": 224, "patch_size": 32},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 64,
            "heads": 1,
            "layers": 1,
        },
    }
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    preprocessing = {"mean": mean, "std": std, "interpolation": "bicubic"}
    preprocessing["resize_mode"] = "shortest"
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing})
    (folder / "open_clip_config.json").write_text(text)


def write_set(folder):
    (folder / "test").mkdir(parents=True)
    generator = np.random.default_rng(0)
    with webdataset.TarWriter(str(folder / "test" / "0.tar")) as tar:
        for number in range(NUM_IMAGES):
            small = Image.fromarray(generator.integers(0, 255, (24, 32, 3), dtype=np.uint8))
            file = io.BytesIO()
            small.resize((512, 384), Image.Resampling.BICUBIC).save(file, format="JPEG", quality=90)
            tar.write({"__key__": f"s{number:07d}", "jpg": file.getvalue(), "cls": b"0"})
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("cat\ndog")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}")


def ours(model, dataset):
    from eval.config import EmbedConfig
    from eval.datasets.tar_dataset import TarDataset
    from eval.embeddings.store import EmbeddingStore
    from eval.models.encoder import load_encoder

    values = {"checkpoint": model, "dataset": "", "output": "", "batch_size": BATCH_SIZE}
    encoder = load_encoder(EmbedConfig.model_validate(values))
    samples = TarDataset(dataset)
    keys = [sample.key for sample in samples.samples]

    def embed():
        with tempfile.TemporaryDirectory() as folder:
            store = EmbeddingStore(Path(folder), encoder)
            store.encode_media(samples, keys)
            return store.media(samples, keys)

    return embed


def clip_benchmark(model, dataset):
    from clip_benchmark.datasets.builder import build_dataset

    network, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{model}")
    network.eval()

    def embed():
        task = "zeroshot_classification"
        samples = build_dataset(
            "wds/set", root=str(dataset), transform=prepare, split="test", task=task
        )
        loader = torch.utils.data.DataLoader(
            samples.batched(BATCH_SIZE), batch_size=None, shuffle=False, num_workers=0
        )
        found = []
        with torch.no_grad():  # as in its run_classification
            for images, _ in loader:
                features = network.encode_image(images)
                found.append(torch.nn.functional.normalize(features, dim=-1))
        return torch.cat(found)

    return embed


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_set(folder / "set")
        for tower, sizes in TOWERS.items():
            model = folder / tower.replace("/", "_")
            write_model(model, sizes)
            ways = {"ours": ours(model, folder / "set")}
            if importlib.util.find_spec("clip_benchmark"):
                ways["clip_benchmark"] = clip_benchmark(model, folder / "set")
            seconds, results = {way: [] for way in ways}, {}
            for _ in range(ROUNDS):
                for way, embed in ways.items():
                    start = time.process_time()
                    results[way] = embed()
                    seconds[way].append(time.process_time() - start)
            rates = {way: NUM_IMAGES / statistics.median(each) for way, each in seconds.items()}
            for way, rate in rates.items():
                print(f"{tower:9} {way:15} {rate:8.1f} images per CPU second")
            if len(ways) == 2:
                largest = (results["ours"] - results["clip_benchmark"]).abs().max().item()
                ratio = rates["ours"] / rates["clip_benchmark"]
                print(f"{tower:9} ratio {ratio:.2f}, largest difference {largest:.1e}")


if __name__ == "__main__":
    main()

"""Images a second that predict.py scores, beside the model alone, PyTorch, and one model.predict call per image.

    .venv/bin/python benchmarks/prediction.py [--peer-python PEER]      (benchmarks/loss.py says how to make PEER)

JPEGs of 256 x 256, InceptionV3 and ResNet50, random weights. Ours reads, scores, finds the neighbours and writes the
table, two batches at a time; the model alone gets batches of 32 from memory, one after another, and, without a limit,
two at a time. PyTorch: torchvision's model, channels_last, autocast, inference mode, a DataLoader with a worker a core.
The best turn counts. In float32 and in what `--precision auto` takes here.

14 minutes on 2 cores with AMX; --backbone takes one, --count fewer files than 1,144.
"""

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common

BACKBONES = "inception_v3", "resnet50"
BATCH, SINGLE = 32, 24  # images; those that are predicted one by one
ALONE = 16  # batches from memory


def ours(folder: str, checkpoint: str, precision: str) -> dict:
    from Modules import quiet, runtime  # noqa: F401

    # isort: split
    import numpy as np

    import modules
    import predict
    from Modules.data.images import read_image
    from Modules.evaluation import evidence
    from Modules.predictions import written

    runtime.keep_freed_memory()
    sys.argv = ["predict.py", folder, "--checkpoint", checkpoint, "--output", f"{folder}.csv"]
    options = predict.parse()
    opened = evidence.open_checkpoint(*predict.load(Path(checkpoint), False), runtime.PRECISIONS[precision])
    paths = sorted(Path(folder).glob("*.jpg"))
    batch = np.stack([read_image(path) for path in paths[:BATCH]]).astype(np.float32)
    opened.run(batch)

    def whole() -> int:
        with written(predict.score_files(options, opened, len(paths)), options.output) as rows:
            return sum(1 for _ in rows)

    def score(_: int = 0) -> int:
        return len(opened.run(batch)[0].numpy())

    def alone() -> int:
        return sum(map(score, range(ALONE)))

    def two_alone() -> int:
        with ThreadPoolExecutor(2) as pool:
            return sum(pool.map(score, range(ALONE)))

    runs = {"files": whole, "model": alone, "two": two_alone}
    if precision == "float32":
        model = modules.load(Path(checkpoint))
        model.predict(batch[:1], verbose=0)
        runs["single"] = lambda: sum(len(model.predict(read_image(path)[None], verbose=0)) for path in paths[:SINGLE])
    return common.best(runs, 2)


def pytorch(folder: str, backbone: str, precision: str) -> dict:
    import torch
    import torchvision

    class Pictures(torch.utils.data.Dataset):
        paths = sorted(Path(folder).glob("*.jpg"))

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, place):
            image = torchvision.io.decode_image(str(self.paths[place]), torchvision.io.ImageReadMode.RGB)
            return image.float() / 127.5 - 1

    loader = torch.utils.data.DataLoader(Pictures(), BATCH, num_workers=os.cpu_count(), persistent_workers=True)
    without = {"aux_logits": False, "init_weights": False} if backbone == "inception_v3" else {}
    model = getattr(torchvision.models, backbone)(weights=None, **without)
    model.fc = torch.nn.Sequential(torch.nn.Linear(2048, 128), torch.nn.Linear(128, 1), torch.nn.Sigmoid())
    model = model.eval().to(memory_format=torch.channels_last)

    def whole() -> int:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return sum(len(model(batch.contiguous(memory_format=torch.channels_last))) for batch in loader)

    return common.best({"files": whole}, 2)


def main() -> None:
    count = {"type": int, "default": 1144, "help": "files (1144)"}
    options = common.options(__doc__, backbone={"choices": BACKBONES}, count=count)
    figures = []
    print(f"{'images/s':24}{'files':>10}{'model':>10}{'PyTorch':>10}")
    for backbone in [options.backbone] if options.backbone else BACKBONES:
        found, peers = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            pictures, home = Path(folder) / "pictures", Path(folder) / "checkpoints"
            pictures.mkdir()
            home.mkdir()
            checkpoint = common.checkpoint(str(home), common.files(str(pictures), options.count), backbone)
            for precision in common.precisions():
                speeds = found[precision] = common.child(sys.executable, "ours", pictures, checkpoint, precision)
                if options.peer_python:
                    run = common.child(options.peer_python, "pytorch", pictures, backbone, precision)
                    peers[precision] = run["files"]
                name, peer = f"{backbone}, {precision}", peers.get(precision, 0)
                print(f"{name:24}{speeds['files']:10.1f}{speeds['model']:10.1f}{peer:10.1f}", flush=True)
                ratio = speeds["files"] / speeds["model"]
                figures.append(common.figure("prediction", f"{name}: files / model alone", ratio, "model alone", 0.9))
                ratio, peer = speeds["files"] / speeds["two"], "model alone, two batches at once"
                figures.append(common.figure("prediction", f"{name}: files / {peer}", ratio, peer))
        best, exact = max(each["files"] for each in found.values()), found["float32"]
        name, peer = f"{backbone}: files / one call per image in float32", "model.predict"
        figures.append(common.figure("prediction", f"{name}, ours at its best", best / exact["single"], peer, 5))
        figures.append(common.figure("prediction", f"{name}, as ours", exact["files"] / exact["single"], peer))
        least, name = {"inception_v3": 1.1, "resnet50": 1.0}[backbone], f"{backbone}: files / PyTorch, each at its best"
        ratio = best / max(peers.values()) if peers else None
        figures.append(common.figure("prediction", name, ratio, "PyTorch", least))
    common.finish(figures)


if __name__ == "__main__":
    common.start(main, {"ours": ours, "pytorch": pytorch})

"""Make the bundled model `edgetune_micro`: a 12-block, width-96 ViT for 32 px images, pretrained on Fashion-MNIST.

What comes in: the four IDX files of Fashion-MNIST (Debian package `dataset-fashion-mnist`, MIT licence).
What goes out: a folder that plain timm loads (`timm.create_model('local-dir:FOLDER')`): `config.json`,
`model.safetensors` (fp16), `README.md` (the model card, with the accuracy measured on the test set).

Unusual here: half of the patch tokens are dropped at random while training (timm's `patch_drop_rate`), which doubles
the speed and suits a model whose tokens will be pruned when it is fine-tuned; the last epochs see all tokens.

    python tools/make_micro_model.py --output edgetune/assets/edgetune_micro --epochs 14     # about an hour on two cores
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 12, "num_heads": 3, "global_pool": "token"}
MEAN_STD = 0.5
CLASSES = 10
DEFAULT_SOURCE = Path("/usr/share/datasets/fashion-mnist")
CARD = """\
---
license: apache-2.0
library_name: timm
tags: [image-classification, timm]
datasets: [zalando-datasets/fashion_mnist]
---
# edgetune_micro

A small Vision Transformer that edgetune ships so that its demo and its tests need no network: 32 px RGB, patch 4,
12 blocks, width 96, 3 heads, a class token, {parameters:,} parameters, stored as fp16.

- **Pretrained on** Fashion-MNIST (60,000 training images, Xiao et al. 2017, MIT licence), grey repeated to RGB and padded
  from 28 to 32 px; {epochs} epochs, seed {seed}, half of the patch tokens dropped at random in all but the last {full_epochs}.
- **Test accuracy** (10,000 images, all tokens, from the fp16 file): **{accuracy:.4f}**.
- **Meant for** demonstrating and testing fine-tuning. It is not a good feature extractor for photographs.
- **Made by** `tools/make_micro_model.py` with torch {torch} and timm {timm}; the same command makes it again.

Load it with plain timm: `timm.create_model('local-dir:edgetune/assets/edgetune_micro', pretrained=True)`.
"""


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """One gzipped IDX file of unsigned bytes, as an array of the shape its header gives."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{path}: not an IDX file of unsigned bytes")
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3]))
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def load_split(source: Path, prefix: str, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 32, 32) uint8, padded from 28 px, and labels (N,) int64."""
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")[:limit]
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")[:limit]
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return torch.from_numpy(padded), torch.from_numpy(labels.astype(np.int64))


def as_input(images: torch.Tensor) -> torch.Tensor:
    """(B, 32, 32) uint8 -> (B, 3, 32, 32) float32, normalised as the model's config says."""
    grey = (images.float() / 255.0 - MEAN_STD) / MEAN_STD
    return grey[:, None].expand(-1, 3, -1, -1)


def augment(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Shift each image by up to 3 px (zero fill) and mirror half of them."""
    count = images.shape[0]
    padded = torch.nn.functional.pad(images, (3, 3, 3, 3))
    offset = torch.randint(0, 7, (2, count), generator=rng)
    rows = offset[0][:, None] + torch.arange(32)
    columns = offset[1][:, None] + torch.arange(32)
    shifted = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    mirrored = torch.rand(count, generator=rng) < 0.5
    return torch.where(mirrored[:, None, None], shifted.flip(-1), shifted)


def build_model() -> VisionTransformer:
    return VisionTransformer(num_classes=CLASSES, patch_drop_rate=0.5, drop_path_rate=0.05, **MODEL_ARGS)


@torch.no_grad()
def accuracy(model: VisionTransformer, images: torch.Tensor, labels: torch.Tensor, batch: int = 250) -> float:
    model.eval()
    hits = 0
    for start in range(0, len(images), batch):
        logits = model(as_input(images[start : start + batch]))
        hits += int((logits.argmax(1) == labels[start : start + batch]).sum())
    return hits / len(images)


def train(model: VisionTransformer, images: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace) -> None:
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, foreach=False
    )
    rng = torch.Generator().manual_seed(args.seed)
    steps_per_epoch = len(images) // args.batch_size
    total, warmup = steps_per_epoch * args.epochs, min(500, steps_per_epoch)
    step, began = 0, time.monotonic()
    for epoch in range(args.epochs):
        model.train()
        if epoch >= args.epochs - args.full_epochs:
            model.patch_drop = torch.nn.Identity()
        order = torch.randperm(len(images), generator=rng)
        running = 0.0
        for i in range(steps_per_epoch):
            pick = order[i * args.batch_size : (i + 1) * args.batch_size]
            rate = args.lr * min(1.0, (step + 1) / warmup)
            rate *= 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, total - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            logits = model(as_input(augment(images[pick], rng)))
            loss = torch.nn.functional.cross_entropy(logits, labels[pick], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
            optimizer.step()
            running += loss.item()
            step += 1
            if step % 200 == 0:
                speed = step * args.batch_size / (time.monotonic() - began)
                print(f"step {step}/{total}  loss {running / (i + 1):.4f}  {speed:.0f} images/s", flush=True)
        print(f"epoch {epoch + 1}/{args.epochs}  loss {running / steps_per_epoch:.4f}", flush=True)


def save(
    model: VisionTransformer, folder: Path, args: argparse.Namespace, test: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """Write the folder; returns the test accuracy of the weights as stored (fp16)."""
    import timm

    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": CLASSES,
        "global_pool": "token",
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [MEAN_STD] * 3,
            "std": [MEAN_STD] * 3,
            "num_classes": CLASSES,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    stored = timm.create_model(f"local-dir:{folder}", pretrained=True)
    score = accuracy(stored, *test)
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        epochs=args.epochs,
        seed=args.seed,
        full_epochs=args.full_epochs,
        accuracy=score,
        torch=torch.__version__.split("+")[0],
        timm=timm.__version__,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return score


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the bundled model edgetune_micro from Fashion-MNIST.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--source", type=Path, default=DEFAULT_SOURCE)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--full-epochs", type=int, default=1, help="last epochs, trained on all tokens")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, default=None, help="use only the first N images of each split (for tests)")
    args = parser.parse_args(argv)
    if not args.source.is_dir():
        raise SystemExit(f"{args.source} not found: install Debian's dataset-fashion-mnist or give --source")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    images, labels = load_split(args.source, "train", args.limit)
    test = load_split(args.source, "t10k", args.limit)
    model = build_model()
    train(model, images, labels, args)
    print(f"test accuracy {save(model, args.output, args, test):.4f} -> {args.output}", flush=True)


if __name__ == "__main__":
    main()

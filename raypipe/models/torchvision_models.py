"""ResNet, MobileNetV3 and ViT by torchvision, fitted to grey and to small images.

`norm: group` is the default: BatchNorm's statistics are each store's own and average badly over unlike stores
(Hsieh et al. 2020, arXiv:1910.00189). Pretrained weights come with BatchNorm; `frozen_batch` keeps its statistics
and its affine weights as they were pretrained.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from raypipe.errors import ConfigError
from raypipe.models import models

if TYPE_CHECKING:
    from torch.nn import Module
else:  # settings are checked from the signature without torch
    Module: TypeAlias = Any

Norm: TypeAlias = Literal["group", "batch", "frozen_batch"]
SMALL = 64  # pixels: at and below, a stride in the first layers throws away what there is to see


def group_norm(num_channels: int) -> Module:
    """At most 32 groups (Wu & He 2018), never of a single channel: alone at 1x1 it would always be zero."""
    from torch.nn import GroupNorm

    return GroupNorm(math.gcd(32, num_channels // 2) if num_channels % 2 == 0 else 1, num_channels)


def _build(name: str, num_outputs: int, norm: Norm, **settings: Any) -> Module:
    import torchvision

    if norm == "group":
        settings["norm_layer"] = group_norm
    module: Module = getattr(torchvision.models, name)(weights=None, num_classes=num_outputs, **settings)
    if norm == "frozen_batch":
        freeze_norms(module)
    return module


def freeze_norms(module: Module) -> None:
    from torch.nn import BatchNorm2d

    for part in module.modules():
        if isinstance(part, BatchNorm2d):
            part.requires_grad_(False)


def _stem(module: Any, channels: int, **changes: Any) -> Any:
    """A convolution like `module` for this number of input channels and with these changes."""
    from torch.nn import Conv2d

    same = ("out_channels", "kernel_size", "stride", "padding")
    settings = {**{key: getattr(module, key) for key in same}, "bias": module.bias is not None, **changes}
    return Conv2d(channels, **settings)


def _load_pretrained(name: str, module: Module, head: str, channels: int, fits: str | None) -> None:
    """Torchvision's weights, all but the head; a grey stem sums the colours. `fits`: why they cannot fit, or None."""
    import torchvision

    if fits is not None:
        raise ConfigError(f"{name}: pretrained weights {fits}")
    try:
        tensors = torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"{name}: pretrained weights could not be fetched ({type(error).__name__}): this machine needs internet or "
            "the file in torch's hub cache (TORCH_HOME); or set pretrained: false, or warm_start to a .safetensors file"
        ) from None
    module.load_state_dict(fitted_tensors(module, tensors, head, channels))


def fitted_tensors(module: Module, tensors: dict[str, Any], head: str, channels: int) -> dict[str, Any]:
    """The module's state with these tensors, all but the head's; a grey stem sums the colours."""
    own: dict[str, Any] = module.state_dict()
    for key, value in tensors.items():
        if key.startswith(head):
            continue
        if value.ndim == 4 and value.shape[1] == 3 and own[key].shape[1] == channels == 1:
            value = value.sum(1, keepdim=True)
        own[key] = value
    return own


def unfit(norm: Norm, small_images: bool) -> str | None:
    if norm == "group":
        return "come with BatchNorm: set norm: frozen_batch or norm: batch"
    return "are for large images: set small_images: false" if small_images else None


def _resnet(
    name: str,
    num_outputs: int,
    channels: int,
    image_size: int,
    norm: Norm,
    pretrained: bool,
    small_images: bool | None,
) -> Module:
    from torch.nn import Identity

    small = image_size <= SMALL if small_images is None else small_images
    module: Any = _build(name, num_outputs, norm)
    if small:
        module.conv1 = _stem(module.conv1, channels, kernel_size=3, stride=1, padding=1)
        module.maxpool = Identity()
    elif channels != 3:
        module.conv1 = _stem(module.conv1, channels)
    if pretrained:
        _load_pretrained(name, module, "fc.", channels, unfit(norm, small))
    return module  # type: ignore[no-any-return]


@models("resnet18")
def resnet18(
    num_outputs: int,
    channels: int,
    image_size: int,
    *,
    norm: Norm = "group",
    pretrained: bool = False,
    small_images: bool | None = None,
) -> Module:
    """11 million parameters. `small_images`: a 3x3 stem without pooling; None: at 64 pixels and below.

    He et al. 2015, arXiv:1512.03385.
    """
    return _resnet("resnet18", num_outputs, channels, image_size, norm, pretrained, small_images)


@models("resnet50")
def resnet50(
    num_outputs: int,
    channels: int,
    image_size: int,
    *,
    norm: Norm = "group",
    pretrained: bool = False,
    small_images: bool | None = None,
) -> Module:
    """24 million parameters; see resnet18."""
    return _resnet("resnet50", num_outputs, channels, image_size, norm, pretrained, small_images)


def _mobilenet(
    name: str,
    num_outputs: int,
    channels: int,
    image_size: int,
    norm: Norm,
    pretrained: bool,
    small_images: bool | None,
) -> Module:
    small = image_size <= SMALL if small_images is None else small_images
    module: Any = _build(name, num_outputs, norm)
    stem = module.features[0][0]
    if small or channels != 3:
        module.features[0][0] = _stem(stem, channels, stride=1 if small else stem.stride)
    if pretrained:
        _load_pretrained(name, module, "classifier.", channels, unfit(norm, small))
    return module  # type: ignore[no-any-return]


@models("mobilenet_v3_small")
def mobilenet_v3_small(
    num_outputs: int,
    channels: int,
    image_size: int,
    *,
    norm: Norm = "group",
    pretrained: bool = False,
    small_images: bool | None = None,
) -> Module:
    """1.5 million parameters. `small_images`: no stride in the first layer. Howard et al. 2019, arXiv:1905.02244."""
    return _mobilenet("mobilenet_v3_small", num_outputs, channels, image_size, norm, pretrained, small_images)


@models("mobilenet_v3_large")
def mobilenet_v3_large(
    num_outputs: int,
    channels: int,
    image_size: int,
    *,
    norm: Norm = "group",
    pretrained: bool = False,
    small_images: bool | None = None,
) -> Module:
    """4.2 million parameters; see mobilenet_v3_small."""
    return _mobilenet("mobilenet_v3_large", num_outputs, channels, image_size, norm, pretrained, small_images)


@models("vit_b_16")
def vit_b_16(num_outputs: int, channels: int, image_size: int, *, pretrained: bool = False) -> Module:
    """86 million parameters, patches of 16. Dosovitskiy et al. 2020, arXiv:2010.11929."""
    if image_size % 16:
        raise ConfigError(f"vit_b_16 needs an image_size that is a multiple of 16, found {image_size}")
    module: Any = _build("vit_b_16", num_outputs, "batch", image_size=image_size)
    if channels != 3:
        module.conv_proj = _stem(module.conv_proj, channels)
    if pretrained:
        fits = None if image_size == 224 else "are for image_size 224"
        _load_pretrained("vit_b_16", module, "heads.", channels, fits)
    return module  # type: ignore[no-any-return]


@models("vit_tiny")
def vit_tiny(
    num_outputs: int,
    channels: int,
    image_size: int,
    *,
    patch: Annotated[int, Field(ge=1, le=64)] = 4,
    depth: Annotated[int, Field(ge=1, le=48)] = 4,
    heads: Annotated[int, Field(ge=1, le=64)] = 3,
    width: Annotated[int, Field(ge=8, le=4096)] = 96,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
) -> Module:
    """A transformer for small images, 0.3 million parameters at 28x28x1."""
    from torchvision.models import VisionTransformer

    if image_size % patch:
        raise ConfigError(f"vit_tiny needs an image_size that is a multiple of patch {patch}, found {image_size}")
    if width % heads:
        raise ConfigError(f"vit_tiny needs a width that is a multiple of heads {heads}, found {width}")
    module: Any = VisionTransformer(image_size, patch, depth, heads, width, 2 * width, dropout, num_classes=num_outputs)
    if channels != 3:
        module.conv_proj = _stem(module.conv_proj, channels)
    return module  # type: ignore[no-any-return]

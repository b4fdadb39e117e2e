"""Exact rewrites of float layers: the function stays the same, the weights become easier to quantize.

A positive factor per channel passes through ReLU, ``relu(s x) = s relu(x)``, and through every other
positively homogeneous layer. So ``W2 relu(W1 x + b1)`` equals ``(W2 S) relu(S^-1 (W1 x + b1))`` for a
positive diagonal S: a producer's output channels are divided by ``s`` and its consumers' input channels
multiplied.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlquant.errors import InputError

__all__ = ["Link", "center_head_", "channel_view", "find_links", "fold_scale_", "scale_inputs_"]

PASSES_SCALE = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.Flatten,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)


@dataclass(frozen=True)
class Link:
    """Layers by qualified name: what ``producer`` puts out is read by ``consumers`` and by nothing else.

    Only positively homogeneous layers lie between. A producer is a Linear, a Conv2d or a norm with a weight
    per channel; a consumer is a Linear or a Conv2d without groups.
    """

    producer: str
    consumers: tuple[str, ...]


def find_links(module: nn.Module, layers: Collection[str]) -> list[Link]:
    """The links that can be read off ``nn.Sequential`` containers, among the layers named.

    Other wiring is in the code of a forward method and must be told: pass links of your own. A layer that is
    used in two places has no link.
    """
    links: dict[Link, None] = {}
    for name, part in module.named_modules():
        if type(part) is nn.Sequential:
            for link in _chain(part, name):
                links.setdefault(link)
    uses: dict[int, int] = {}
    for _, part in module.named_modules(remove_duplicate=False):
        uses[id(part)] = uses.get(id(part), 0) + 1
    return [link for link in links if _usable(link, module, layers, uses)]


def _chain(container: nn.Sequential, prefix: str) -> list[Link]:
    """Links between neighbours in a Sequential, nested ones flattened."""
    links: list[Link] = []
    producer: str | None = None
    for name, part in _flattened(container, prefix):
        if type(part) in (nn.Linear, nn.Conv2d):
            if producer is not None:
                links.append(Link(producer, (name,)))
            producer = name
        elif type(part) not in PASSES_SCALE:
            producer = None
    return links


def _flattened(container: nn.Sequential, prefix: str) -> list[tuple[str, nn.Module]]:
    parts: list[tuple[str, nn.Module]] = []
    for key, part in container.named_children():
        name = f"{prefix}.{key}" if prefix else key
        parts += _flattened(part, name) if type(part) is nn.Sequential else [(name, part)]
    return parts


def _usable(link: Link, module: nn.Module, layers: Collection[str], uses: dict[int, int]) -> bool:
    ends = [module.get_submodule(name) for name in (link.producer, *link.consumers)]
    named = all(name in layers for name in (link.producer, *link.consumers))
    grouped = any(isinstance(end, nn.Conv2d) and end.groups > 1 for end in ends[1:])
    return named and not grouped and all(uses[id(end)] == 1 for end in ends)


def channel_view(layer: nn.Module, channels: int) -> Tensor:
    """The weight of a Linear or Conv2d as a view ``[out, channels, columns of one channel]``.

    A Linear behind a flattened image has several columns for each of the image's channels.
    """
    weight = layer.get_parameter("weight").data
    if weight.numel() % (weight.shape[0] * channels):
        raise InputError(f"a weight of shape {tuple(weight.shape)} does not read {channels} channels")
    return weight.view(weight.shape[0], channels, -1)


def scale_inputs_(layer: nn.Module, scale: Tensor) -> None:
    """Multiply the input channels of a Linear or Conv2d by ``scale`` ``[channels]``, in place."""
    channel_view(layer, len(scale)).mul_(scale.view(1, -1, 1).to(layer.get_parameter("weight").dtype))


def fold_scale_(producer: nn.Module, consumers: Collection[nn.Module], scale: Tensor) -> None:
    """Divide the producer's output channels by ``scale`` and multiply the consumers' inputs by it, in place.

    Exact where only positively homogeneous layers such as ReLU lie between them, up to float rounding.

    Args:
        producer: Linear, Conv2d, or a norm with a weight (and bias) per channel.
        consumers: Linear or Conv2d without groups, of which each channel of the producer feeds equally many
            columns (one, a kernel, or the places of a flattened image).
        scale: ``[channels]``, positive and finite.

    Raises:
        InputError: a factor is not positive and finite, or the sizes do not fit.
    """
    if not bool((scale > 0).all() and scale.isfinite().all()):
        raise InputError("only positive finite factors pass through ReLU: the scale holds others")
    weight = producer.get_parameter("weight").data
    if len(weight) != len(scale):
        raise InputError(f"{len(scale)} factors do not fit a producer of {len(weight)} channels")
    for consumer in consumers:
        channel_view(consumer, len(scale))
    inverse = (1.0 / scale.double()).to(weight.dtype)
    weight.mul_(inverse.view(-1, *(1,) * (weight.dim() - 1)))
    bias = getattr(producer, "bias", None)
    if bias is not None:
        bias.data.mul_(inverse)
    for consumer in consumers:
        scale_inputs_(consumer, scale)


def center_head_(head: nn.Linear) -> nn.Linear:
    """Subtract from every row of the weight, and from the bias, their mean over the rows; in place.

    All outputs shift by one common number, different for every input: an argmax over them and a softmax of
    them stay as they are. Value heads carry a large common part, which would otherwise take up the range of
    the codes. Returns ``head``. Raises InputError where it is no Linear or has one output, which would
    vanish.
    """
    if not isinstance(head, nn.Linear) or head.out_features < 2:
        raise InputError(f"only a Linear head of several outputs can be centred, not {head}")
    with torch.no_grad():
        for part in (head.weight, head.bias):
            if part is not None:
                part.copy_((part.double() - part.double().mean(dim=0)).to(part.dtype))
    return head

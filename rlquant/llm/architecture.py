"""The sizes of a decoder-only language model, read from its config.json alone: nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlquant.errors import InputError, missing_package, nearest, unknown_name
from rlquant.llm.load import read_config

__all__ = ["FAMILIES", "Architecture", "Linear", "architecture_of", "built_in", "read_architecture"]


@dataclass(frozen=True)
class Linear:
    """A linear layer ``[outputs, inputs]`` of every block."""

    name: str
    inputs: int
    outputs: int
    bias: bool

    @property
    def weights(self) -> int:
        """Elements of its matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Family:
    """What models of one ``model_type`` share and their config.json may leave out."""

    qkv_bias: bool = False
    output_bias: bool = False
    head_norms: bool = False
    norms: int = 2
    tied: bool = False
    defaults: tuple[tuple[str, int], ...] = ()


FAMILIES = {
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_norms=True, defaults=(("head_dim", 128),)),
    "llama": Family(),
    "mistral": Family(defaults=(("num_key_value_heads", 8),)),
    "gemma": Family(tied=True, defaults=(("head_dim", 256),)),
    "gemma3_text": Family(head_norms=True, norms=4, tied=True, defaults=(("head_dim", 256),)),
}


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder-only transformer.

    Attributes:
        name: the source it was read from.
        heads: of queries; ``kv_heads`` of keys and values (grouped-query attention where fewer).
        norms: RMSNorms in a block; ``head_norms``: whether queries and keys are normalised too.
        tied: whether the output layer is the embedding.
        longest: the most tokens that it was made for.
        window, windowed: tokens that an attention layer with a sliding window sees, and how many layers have one.
    """

    name: str
    family: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norms: int
    head_norms: bool
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    longest: int
    window: int = 0
    windowed: int = 0

    @property
    def query_size(self) -> int:
        """Elements of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of all keys of a token, in one layer; its values have as many."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one block."""
        q, kv, h, i = self.query_size, self.kv_size, self.hidden, self.intermediate
        return (
            Linear("q_proj", h, q, self.qkv_bias),
            Linear("k_proj", h, kv, self.qkv_bias),
            Linear("v_proj", h, kv, self.qkv_bias),
            Linear("o_proj", q, h, self.output_bias),
            Linear("gate_proj", h, i, self.mlp_bias),
            Linear("up_proj", h, i, self.mlp_bias),
            Linear("down_proj", i, h, self.mlp_bias),
        )

    @property
    def block_weights(self) -> int:
        """Elements of the linear layers of all blocks, without biases."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def vectors(self) -> int:
        """Elements of all norms and biases, which no scheme quantizes."""
        norms = self.norms * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        return self.layers * (norms + biases) + self.hidden

    @property
    def tables(self) -> int:
        """Matrices ``[vocabulary, hidden]``: one where the output layer is tied to the embedding, else two."""
        return 1 if self.tied else 2

    @property
    def parameters(self) -> int:
        """All weights, a tied matrix counted once."""
        return self.block_weights + self.tables * self.vocabulary * self.hidden + self.vectors

    def cached_tokens(self, tokens: int) -> int:
        """Tokens that all layers together keep of a sequence of ``tokens``: a sliding window forgets the rest."""
        return (self.layers - self.windowed) * tokens + self.windowed * min(tokens, self.window or tokens)


def built_in() -> dict[str, dict[str, Any]]:
    """config.json of common models by their Hub id, so that planning works offline."""
    text = files("rlquant.llm").joinpath("architectures.json").read_text(encoding="utf-8")
    configs: dict[str, dict[str, Any]] = json.loads(text)
    return configs


def read_architecture(source: str) -> Architecture:
    """Of a folder with a config.json, a config.json, a model of :func:`built_in`, or a Hub id (``@revision``).

    A Hub id downloads config.json, a few hundred bytes, unless it lies in the Hub's cache.

    Raises:
        InputError: there is no such source, its config is damaged, or its architecture is not a known one.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.name != "config.json":
        raise InputError(f"{path} is no config.json: give a model's folder, its config.json or a Hub id")
    if path.exists():
        return architecture_of(read_config(path if path.is_dir() else path.parent), source)
    known = {name.lower(): name for name in built_in()}
    if source.lower() in known:
        name = known[source.lower()]
        return architecture_of(built_in()[name], name)
    return architecture_of(_from_hub(source), source)


def architecture_of(config: Mapping[str, Any], name: str) -> Architecture:
    """Of what a config.json says. Raises InputError for an unknown architecture and sizes that are missing."""
    config = _of_text(config)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise unknown_name(f"architecture of {name}:", str(kind), FAMILIES)
    family = FAMILIES[kind]
    if config.get("num_local_experts") or config.get("num_experts"):
        raise InputError(f"{name} is a mixture of experts, whose memory cannot be planned yet")
    sizes = dict(family.defaults) | {key: value for key, value in config.items() if value is not None}
    hidden, heads = _size(sizes, "hidden_size", name), _size(sizes, "num_attention_heads", name)
    layers = _size(sizes, "num_hidden_layers", name)
    bias = bool(config.get("attention_bias", False))
    window, windowed = _windows(config, layers)
    return Architecture(
        name=name,
        family=kind,
        vocabulary=_size(sizes, "vocab_size", name),
        hidden=hidden,
        intermediate=_size(sizes, "intermediate_size", name),
        layers=layers,
        heads=heads,
        kv_heads=_size(sizes, "num_key_value_heads", name, heads),
        head_dim=_size(sizes, "head_dim", name, max(hidden // heads, 1)),
        norms=family.norms,
        head_norms=family.head_norms,
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        qkv_bias=family.qkv_bias or bias,
        output_bias=bias and not family.qkv_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        longest=_size(sizes, "max_position_embeddings", name, 2**17),
        window=window,
        windowed=windowed,
    )


def _of_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the language model, where others stand beside it."""
    text = config.get("text_config")
    return text if isinstance(text, dict) and "hidden_size" not in config else config


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """The sliding window, and how many layers have one."""
    window = int(config.get("sliding_window") or 0)
    if not window or not config.get("use_sliding_window", config.get("model_type") != "qwen2"):
        return 0, 0
    kinds = config.get("layer_types")
    if kinds:
        return window, sum(kind == "sliding_attention" for kind in kinds)
    every = int(config.get("sliding_window_pattern") or 0)
    return window, layers - layers // every if every else layers


def _size(sizes: Mapping[str, Any], key: str, name: str, default: int | None = None) -> int:
    value = sizes.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"the config of {name} gives {key} as {value!r}: a positive integer is needed")
    return value


def _from_hub(source: str) -> dict[str, Any]:
    """config.json of a Hub id, from the Hub's cache or by one request without retries."""
    name, _, revision = source.partition("@")
    if len(name.split("/")) != 2:
        close = nearest(source, built_in())
        hint = f"; did you mean {close!r}?" if close else ""
        raise InputError(
            f"{source} is no file or folder, and no Hub id such as Qwen/Qwen2.5-0.5B either{hint}"
        )
    try:
        import huggingface_hub as hub
    except ImportError:
        raise missing_package("huggingface_hub", "llm", f"the config of {source}") from None
    try:
        cached = hub.try_to_load_from_cache(name, "config.json", revision=revision or None)
        if isinstance(cached, str):
            return read_config(Path(cached).parent)
        url = hub.hf_hub_url(name, "config.json", revision=revision or None)
        answer = hub.get_session().get(url, headers=hub.utils.build_hf_headers(), timeout=10)
        answer.raise_for_status()
        config: dict[str, Any] = answer.json()
        return config
    except Exception as error:  # of the Hub's client, whichever that is
        first = str(error).strip().split("\n")[0]
        raise InputError(
            f"the config of {source} cannot be fetched ({first}); give a folder with its config.json, or one of "
            f"{', '.join(built_in())}"
        ) from None

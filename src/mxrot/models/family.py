"""What mxrot must know of a model family: names, and which layer feeds which.

A site is the set of linears that read the same input. Families hold no numerics and no tensor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mxrot.errors import ConfigError, FamilyError
from mxrot.models.beside import Beside
from mxrot.models.expert_names import DENSE, SPARSE, ExpertNames
from mxrot.models.site import Kept as Kept
from mxrot.models.site import Site as Site

Windows = Literal["none", "all", "by kind"]
LAYER_TYPES = ("full_attention", "sliding_attention")
"""Kinds of decoder blocks that are known in all families."""


@dataclass(frozen=True)
class LogitKeys:
    """What the config calls the numbers by which a model scales the output of its head, where it has them."""

    factor: str | None = "logit_scale"
    """Multiplies (Cohere)."""
    divisor: str | None = "logits_scaling"
    """Divides (Granite)."""
    bound: str | None = "final_logit_softcapping"
    """c in c tanh(x / c), after the others (Gemma 2)."""


@dataclass(frozen=True)
class PassedOn:
    """What blocks give beside hidden states, and the block behind them takes: for each token the places of others,
    int32."""

    keyword: str
    """What a block calls it."""
    count: str
    """What the config calls how many places there are, in a window that has as many tokens."""

    def token_bytes(self, config: Any, length: int) -> int:
        """Of a token in a window of so many."""
        return 4 * min(int(getattr(config, self.count)), length)


CARRIED_OBSTACLE = "images come into it from parts of the model that are kept as they are"


@dataclass(frozen=True)
class Family:
    """A decoder-only architecture."""

    name: str
    architectures: tuple[str, ...]
    """Values of `architectures` in config.json that this record describes."""
    sites: tuple[Site, ...]
    """In the order in which a block computes them; those of all kinds of blocks, where there are several."""
    body: str = "model"
    """The module that turns token ids into the last hidden states."""
    stored_stem: str | None = None
    """What stored names have in the place of `model.`, where transformers reads them all the same."""
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    """The module of a block, by its name there, that calls transformers' attention function."""
    gives_more: bool = False
    """Does a decoder block give its output as the first of two, though the next one takes nothing beside it?"""
    attention_in: str = ""
    """The kind of blocks that have it, or one word of it; empty for all."""
    rotary: str | None = "model.rotary_emb"
    """Module without weights, rebuilt from the config."""
    starts_with_bos: bool = False
    """The model has seen no text that does not start with the BOS token, and is of no use on one."""
    windows: Windows = "none"
    """Which decoder blocks attend to the last `sliding_window` tokens only, where the config gives a number: "by kind",
    those that `layer_types` says."""
    logits: LogitKeys = LogitKeys()
    norm_class: str | None = None
    """transformers' class of its norms, where that computes x / rms(x) * weight, with an attribute `variance_epsilon`:
    they can run as one operation."""
    rotation_obstacle: str | None = "nobody has looked what the residual stream passes"
    """Why no rotation of the residual stream can be merged into the weights. None where it passes plain RMSNorms alone,
    whose output nothing reads but the site that names the norm, and the head, and where what sites give is added to it
    as `Site.is_added` says."""
    values: str = "self_attn.v_proj"
    """The linear whose rows are the value heads (`value_rows`): the last ones, one head after the other, or those
    behind the rows of each key; empty where that is not known of any."""
    values_read_by: str = "self_attn.o_proj"
    """The linear whose inputs are sums of values over tokens, query head after query head; empty as `values` is."""
    inner_rows: str | None = None
    """Where no site names a producer for the MLP's last linear: the linear whose rows become its channels one by one,
    or whose rows are those of gate and then those of up."""
    experts: ExpertNames | None = None
    """Of a mixture of experts, whose sites `of_model` adds to `sites`, as the config has it."""
    kinds_of: Callable[[Any], tuple[str, ...]] | None = None
    """Of a config, the kind of each decoder block, where some have sites that others lack: a block has those that are
    in all (`Site.only_in`), and those of its kind. A kind may be several words, "recurrent sparse"."""
    kept: tuple[Kept, ...] = ()
    """What no recipe quantizes, and why."""
    states_of: Callable[[Any], tuple[int, int]] | None = None
    """Of a config, numbers that a cache holds of a sequence beside keys and values, however long it is, in all blocks
    together: in the type that the model computes in, and in float32."""
    attention_sites_of: Callable[[Any], tuple[Site, ...]] | None = None
    """Of a config, the sites of attention, where they follow from it: those that come before `sites`."""
    cached_of: Callable[[Any], tuple[int, ...]] | None = None
    """Of a config, the numbers that a cache in 16 bits holds of each token, of each decoder block, where they do not
    follow from heads and their width (`cached_numbers`)."""
    heads_obstacle: str | None = None
    """Why keys and values are not kept in codes, and products of attention not taken of codes. None where a cache holds
    keys and values of one width, as attention reads them."""
    holds_for: tuple[tuple[str, object], ...] = ()
    """Keys of the config, and the values that this record describes: a model with others is refused."""
    in_float32: tuple[str, ...] = ()
    """Tensors of a block that a model holds in float32, whatever it computes in, by their names in it."""
    beside: Beside | None = None
    """Of a model of more than text, what it has beside its text model, which the rest of the record describes."""
    layer_types: tuple[str, ...] = LAYER_TYPES
    """Values of `layer_types` that blocks of this family may have; a config must have it where there are others than
    those of all families."""
    passes_on: PassedOn | None = None
    """The second of what each block gives, where the next one takes that."""
    kinds: tuple[str, ...] = ()
    """Of a model, what `kinds_of` says of its config."""

    @property
    def is_rotatable(self) -> bool:
        """Can a rotation of the residual stream be merged into the weights?"""
        return self.rotation_obstacle is None

    @property
    def names_values(self) -> bool:
        """Can a change of the channels inside of value heads be merged into the weights?"""
        return bool(self.values)

    @property
    def norms_add_one(self) -> bool:
        """Do the norms multiply by 1 + their weight? All norms of a model are of one class."""
        return any(site.norm_adds_one for site in self.sites)

    @property
    def has_keys_beside_values(self) -> bool:
        """Has the linear of values the rows of each key before those of its value?"""
        return any(site.keys_beside_values for site in self.sites)

    @property
    def carried(self) -> tuple[str, ...]:
        """Modules beside the text model, which are kept as they are."""
        return () if self.beside is None else self.beside.carried

    @property
    def auto_class(self) -> str:
        """transformers' class that builds such a model."""
        return "AutoModelForCausalLM" if self.beside is None else self.beside.auto_class

    def with_beside(self, name: str, architectures: tuple[str, ...], beside: Beside) -> Family:
        """The family of models whose text model is of this one, as transformers places it there.

        Its residual stream is not rotated: what is carried writes into it.
        """
        inner = f"{self.body}.language_model"
        places = ("body", "blocks", "embedding", "final_norm", "rotary")
        moved = {key: getattr(self, key) for key in places}
        moved = {key: place and inner + place.removeprefix(self.body) for key, place in moved.items()}
        return replace(
            self,
            name=name,
            architectures=architectures,
            beside=beside,
            rotation_obstacle=self.rotation_obstacle or CARRIED_OBSTACLE,
            **moved,
        )

    def of_model(self, config: Any) -> Family:
        """The family with what the config of a text model says of it: the sites of its attention, where these follow
        from it, and of its experts, and the kinds of its blocks.

        FamilyError as for `ExpertNames.sites`.
        """
        if not (self.kinds_of or self.attention_sites_of or self.experts):
            return self
        kinds = () if self.kinds_of is None else self.kinds_of(config)
        before = () if self.attention_sites_of is None else self.attention_sites_of(config)
        words = {word for kind in kinds for word in kind.split()}
        experts = self.experts
        if experts is not None and SPARSE not in words and (DENSE in words or experts.may_lack):
            experts = None
        found = () if experts is None else experts.sites(config)
        if SPARSE in words:
            found = tuple(replace(site, only_in=SPARSE) for site in found)
        sites = tuple(site for site in before + self.sites + found if not kinds or site.only_in in ("", *words))
        return replace(self, sites=sites, kinds=kinds, experts=experts)

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """In which a model that computes in `dtype` holds a tensor of a block, by its name in it."""
        return torch.promote_types(dtype, torch.float32) if name in self.in_float32 else dtype

    def sites_of(self, index: int) -> tuple[Site, ...]:
        """The sites of block `index`, in the order in which it computes them."""
        return self._by_kind[self.kinds[index]] if self.kinds else self.sites

    def as_given(self, hidden: Tensor) -> Any:
        """What a decoder block gives whose output is `hidden`."""
        return (hidden, None) if self.gives_more or self.passes_on is not None else hidden

    def kept_of(self, index: int) -> tuple[Kept, ...]:
        """What is kept of block `index`."""
        return tuple(kept for kept in self.kept if self._is_in(index, kept.only_in))

    def kept_counts(self, blocks: int) -> tuple[tuple[Kept, int], ...]:
        """What is kept of so many decoder blocks, and in how many of them it is."""
        return tuple(Counter(kept for index in range(blocks) for kept in self.kept_of(index)).items())

    def attends(self, index: int) -> bool:
        """Has block `index` the module `attention`?"""
        return self._is_in(index, self.attention_in)

    def attentions(self, model: nn.Module) -> list[nn.Module]:
        """The attention modules of the decoder blocks that have one."""
        blocks = model.get_submodule(self.blocks).children()
        return [block.get_submodule(self.attention) for index, block in enumerate(blocks) if self.attends(index)]

    def _is_in(self, index: int, kind: str) -> bool:
        return not kind or kind in self.kinds[index].split()

    def token_share(self, config: Any, linear: str) -> float:
        """Of the tokens, that a linear gets, by its name in a block; 1 outside of experts."""
        return 1.0 if self.experts is None else self.experts.share(config, linear)

    @cached_property
    def _by_kind(self) -> dict[str, tuple[Site, ...]]:
        return {
            kind: tuple(site for site in self.sites if site.only_in in ("", *kind.split()))
            for kind in dict.fromkeys(self.kinds)
        }

    @cached_property
    def linears(self) -> frozenset[str]:
        """The linears of all sites of all blocks, by their names in a block."""
        return frozenset(linear for site in self.sites for linear in site.linears)

    def is_linear(self, tensor: str) -> bool:
        """Is this full name that of the weight of a linear of a site, or of one that is kept, in any block?"""
        _, _, inner = tensor.removeprefix(f"{self.blocks}.").partition(".")
        return tensor.startswith(f"{self.blocks}.") and (
            inner.endswith(".weight") and inner.removesuffix(".weight") in self.linears | self._kept_linears
        )

    @cached_property
    def _kept_linears(self) -> frozenset[str]:
        return frozenset(linear for kept in self.kept for linear in kept.linears)

    def block_prefix(self, index: int) -> str:
        return f"{self.blocks}.{index}"

    def group_of(self, linear: str) -> tuple[int, str]:
        """Block and site of the full name of a linear; the site without the number of an expert."""
        number, _, name = linear.removeprefix(f"{self.blocks}.").partition(".")
        return int(number), next(site.group for site in self.sites_of(int(number)) if name in site.linears)

    def active_sites(self, index: int, ignore: tuple[str, ...]) -> tuple[Site, ...]:
        """The sites of block `index` without the linears that a pattern of `ignore` matches; empty ones are gone."""
        prefix = self.block_prefix(index)
        kept = []
        for site in self.sites_of(index):
            linears = tuple(n for n in site.linears if not is_ignored(f"{prefix}.{n}", ignore))
            if linears:
                kept.append(replace(site, linears=linears))
        return tuple(kept)


def shapes_apart(shapes: Mapping[str, tuple[int, ...]], family: Family) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors by name, with one for each linear of each expert."""
    if family.experts is None:
        return dict(shapes)
    found: dict[str, tuple[int, ...]] = {}
    block = re.compile(rf"({re.escape(family.blocks)}\.\d+\.)(.*)")
    for name, shape in shapes.items():
        match = block.match(name)
        if match is None:
            found[name] = shape
        else:
            found |= {match[1] + key: value for key, value in family.experts.shapes_apart(match[2], shape).items()}
    return found


def is_ignored(name: str, ignore: tuple[str, ...]) -> bool:
    """Does a shell-style pattern match the full name of a linear, or its last part?"""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name.rsplit(".", 1)[-1], pattern) for pattern in ignore)


def value_heads(config: Any) -> tuple[int, int]:
    """Number of value heads of a text model and their width; of the blocks with the widest, where these differ."""
    config = max(_each_block(config.get_text_config()), key=_head_width)
    heads = config.num_attention_heads
    width = getattr(config, "v_head_dim", None) or _head_width(config)
    return getattr(config, "num_key_value_heads", None) or heads, width


def query_width(config: Any) -> int:
    """Of a head of queries, and of one of keys; values may be of another. The widest, where blocks differ."""
    config = max(_each_block(config), key=_head_width)
    return getattr(config, "qk_nope_head_dim", 0) + getattr(config, "qk_rope_head_dim", 0) or _head_width(config)


def cached_numbers(config: Any, family: Family) -> tuple[int, ...]:
    """Numbers that a cache in 16 bits holds of each token, of each decoder block: keys and values, or, in latent
    attention, what these are computed from, and the key of an indexer, where the block has one."""
    if family.cached_of is not None:
        return family.cached_of(config)
    count = int(config.num_hidden_layers)
    latent = getattr(config, "kv_lora_rank", None)
    if latent is not None:
        own, of_indexer = int(latent + config.qk_rope_head_dim), int(getattr(config, "index_head_dim", 0))
        kinds = getattr(config, "indexer_types", None) or ("full",) * count
        return tuple(own + of_indexer * (kind == "full") for kind in kinds)
    blocks = _each_block(config)
    found = tuple(2 * heads * width for heads, width in (value_heads(block) for block in blocks))
    return found if len(found) == count else found * count


def _each_block(config: Any) -> Sequence[Any]:
    """The config of a text model, or that of each decoder block, where some say for themselves how wide heads are."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def value_rows(family: Family, rows: int, heads: int, width: int) -> Tensor:
    """Which of the `rows` of the linear that makes values are the value heads: int64 [heads, width]."""
    stride = rows // heads if family.has_keys_beside_values else width
    starts = torch.arange(heads) * stride + rows - heads * stride + stride - width
    return starts[:, None] + torch.arange(width)


def check_linears(
    model: nn.Module, family: Family, block_size: int | Callable[[str], int | None], ignore: tuple[str, ...] = ()
) -> None:
    """Every linear of every decoder block is in a site or ignored, and its inputs fill whole blocks.

    `block_size` is that of all, or gives that of a linear by its full name, None for one that is left as it is.
    FamilyError names a linear that the family does not know, ConfigError one of an odd size.
    """
    for problem in linear_problems(model, family, block_size, ignore):
        raise problem


def linear_problems(
    model: nn.Module, family: Family, block_size: int | Callable[[str], int | None], ignore: tuple[str, ...] = ()
) -> Iterator[FamilyError | ConfigError]:
    """Each linear of a decoder block that cannot be quantized and is not ignored, as `check_linears` raises it."""
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        sites = family.sites_of(index)
        known = dict.fromkeys(sorted(linear for site in sites for linear in site.linears))
        kept = {router for site in sites for router in site.routers}
        kept |= {linear for one in family.kept_of(index) for linear in one.linears}
        modules = dict(block.named_modules())
        missing = next((linear for linear in known if linear not in modules), None)
        if missing is not None:
            yield FamilyError(
                f"{family.block_prefix(index)}: has no {missing}, which {_those_of(family, index)} must have"
            )
            continue
        for name, module in modules.items():
            full = f"{family.block_prefix(index)}.{name}"
            if not isinstance(module, nn.Linear) or name in kept or is_ignored(full, ignore):
                continue
            size = block_size if isinstance(block_size, int) else block_size(full)
            if size is None:
                continue
            if name not in known:
                yield FamilyError(
                    f"{full}: family {family.name} knows no such linear (it knows {_listed(known)}); "
                    "list it under `ignore` to leave it as it is"
                )
            elif module.in_features % size:
                yield ConfigError(
                    f"{full}: in_features {module.in_features} is not a multiple of the block size {size}; "
                    "list it under `ignore`"
                )


def _those_of(family: Family, index: int) -> str:
    """The blocks that have the sites of block `index`."""
    kind = f"{family.kinds[index]} " if family.kinds else ""
    return f"all {kind}blocks of family {family.name}"


def _listed(names: Iterable[str], most: int = 12) -> str:
    shown = list(names)
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")

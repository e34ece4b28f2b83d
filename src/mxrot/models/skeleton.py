"""A model without its weights: every parameter on the meta device, filled in piece by piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mxrot.documents import read_json
from mxrot.errors import FamilyError
from mxrot.models.families import FAMILIES
from mxrot.models.family import LAYER_TYPES, Family
from mxrot.models.family_table import DERIVED, derived_table, family_of_table, family_table
from mxrot.models.folder import no_config
from mxrot.models.given import family_given
from mxrot.models.tensors import quantized_by
from mxrot.nearest import brief, listed

MOST_BLOCKS = 1000
MOST_EXPERTS = 100_000
"""In all blocks together; the largest models have 20,000."""


def read_config(place: Path) -> Any:
    """The transformers config of a folder, or of a file; FamilyError if there is none or it cannot be read."""
    path = place if place.is_file() else place / "config.json"
    if not path.is_file():
        raise FamilyError(no_config(place))
    table = read_json(path)
    named = table.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise FamilyError(f"{path}: architectures: expected a list of names, got {repr(named)[:100]}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # its checks raise many kinds
        raise FamilyError(f"{path}: {_why_unread(table, error)}") from error
    if table.get("quantization_config") is None:
        forget_derived(config)
    return config


def _why_unread(table: dict[str, Any], error: Exception) -> str:
    """What is wrong with a config that transformers does not read."""
    kind = table.get("model_type")
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        if "auto_map" in table:
            return (
                f"model type {brief(kind)} comes with code of its own (auto_map), which is never run; such a model is "
                "not supported"
            )
        return f"model type {brief(kind)} is not known to transformers {transformers.__version__}; take a newer one"
    return f"not a config that transformers reads: {_brief(error)}"


def forget_derived(config: Any) -> None:
    """Let the config of an original say nothing of a family: a derived one is used only where that is asked for."""
    if hasattr(config, DERIVED):
        delattr(config, DERIVED)


def find_family(config: Any, where: str) -> Family:
    """The family of a config, with the sites of its experts; FamilyError if it is not a causal language model, or not
    one we know.

    One that was derived stands in the config itself; one that is asked for (`given_family`) is written into it.
    """
    architectures = tuple(getattr(config, "architectures", None) or ())
    if not all(isinstance(name, str) for name in architectures):
        raise FamilyError(f"{where}: architectures {list(architectures)!r}: expected names")
    named = ", ".join(architectures)[:200] or "none"
    given = family_given(architectures)
    if given is not None and derived_table(config) is None:
        setattr(config, DERIVED, family_table(given))
    family = _derived_family(config, architectures, where) or named_family(config)
    if getattr(config, "text_config", None) is not None and (family is None or family.beside is None):
        seeing = [name for one in FAMILIES.values() if one.beside is not None for name in one.architectures]
        raise FamilyError(
            f"{where}: {_quantized(config)}architecture {named}: a model of more than text of no known family; known "
            f"of such models: {', '.join(sorted(seeing))}"
        )
    if family is not None:
        text = config.get_text_config()
        _check_beside(config, family, where)
        _check_size(text, family, where)
        _check_attention(text, family, where)
        _check_values(text, family, where)
        return family.of_model(text)
    causal: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        causal.update((value,) if isinstance(value, str) else value)
    if not set(architectures) & causal:
        raise FamilyError(f"{where}: architectures {named}: not a causal language model")
    known = listed(architectures[0], (name for family in FAMILIES.values() for name in family.architectures))
    raise FamilyError(
        f"{where}: {_quantized(config)}architecture {named} is of no known family; known architectures: {known}"
    )


def _quantized(config: Any) -> str:
    """What is said first of a model of no known family that is quantized, too."""
    key = quantized_by(config)
    return "" if key is None else f"is quantized already ({key} in config.json); and its "


def _derived_family(config: Any, architectures: tuple[Any, ...], where: str) -> Family | None:
    """The family that a config holds of its own, where its architecture is one of that."""
    table = derived_table(config)
    family = None if table is None else family_of_table(table, where)
    return family if family is not None and set(architectures) & set(family.architectures) else None


def named_family(config: Any) -> Family | None:
    """The family that the architectures of a config name, as it is in the registry."""
    named = set(getattr(config, "architectures", None) or ())
    return next((family for family in FAMILIES.values() if named & set(family.architectures)), None)


def _check_beside(config: Any, family: Family, where: str) -> None:
    """FamilyError if a model of more than text has another text model than its family describes, or a vision tower of
    no size that any has."""
    if family.beside is None:
        return
    kind = config.get_text_config().model_type
    if kind not in family.beside.text_types:
        raise FamilyError(
            f"{where}: config.json: text_config: model_type is {brief(kind)}, and family {family.name} is known with "
            f"{' and '.join(family.beside.text_types)} only; such a model is not supported"
        )
    for key in family.beside.lacks:
        if getattr(config, key, None) is not None:
            raise FamilyError(
                f"{where}: config.json: family {family.name} is known without {key} only; such a model is not supported"
            )
    vision = getattr(config, "vision_config", None)
    for key in ("num_hidden_layers", "depth"):
        count = getattr(vision, key, 1)
        if type(count) is not int or not 0 <= count <= MOST_BLOCKS:
            raise FamilyError(
                f"{where}: config.json: vision_config: {key} is {brief(count)}; expected at most {MOST_BLOCKS}"
            )


def _check_size(config: Any, family: Family, where: str) -> None:
    """FamilyError for a number of blocks or experts that no model has, and that would take for ever to build."""
    blocks = getattr(config, "num_hidden_layers", None)
    if type(blocks) is not int or not 1 <= blocks <= MOST_BLOCKS:
        raise FamilyError(f"{where}: config.json: num_hidden_layers is {blocks!r}; expected 1 to {MOST_BLOCKS}")
    if family.experts is not None:
        experts = getattr(config, family.experts.count, None)
        if family.experts.may_lack and experts is None:
            return
        if type(experts) is not int or experts > MOST_EXPERTS // blocks:
            most = MOST_EXPERTS // blocks
            raise FamilyError(f"{where}: config.json: {family.experts.count} is {experts!r}; expected 1 to {most}")


def _check_attention(config: Any, family: Family, where: str) -> None:
    """FamilyError if decoder blocks attend in ways that are not known, or that the family does not mix."""
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):  # that of images alone
        raise FamilyError(f"{where}: use_bidirectional_attention: not a causal language model")
    types = [kind if isinstance(kind, str) else repr(kind) for kind in getattr(config, "layer_types", None) or ()]
    for index, kind in enumerate(types):
        if kind not in family.layer_types:
            raise FamilyError(
                f"{where}: config.json: layer_types: decoder block {index} is of type {brief(kind)}, which "
                f"{'mxrot' if family.layer_types == LAYER_TYPES else f'family {family.name}'} does not know; it knows "
                f"{' and '.join(sorted(family.layer_types))}"
            )
    if not types and not set(family.layer_types) <= set(LAYER_TYPES):
        raise FamilyError(f"{where}: config.json has no layer_types, which a model of family {family.name} has")
    first = {kind: types.index(kind) for kind in types if kind in LAYER_TYPES}
    if len(first) > 1 and family.windows != "by kind":
        mixing = [name for name, other in FAMILIES.items() if other.windows == "by kind"]
        one, other = (f"{kind} (decoder block {index})" for kind, index in list(first.items())[:2])
        raise FamilyError(
            f"{where}: config.json: layer_types mixes {one} and {other}; in family {family.name} all blocks must be of "
            f"one type (those of {', '.join(mixing)} may be mixed), so this model is not supported"
        )
    if "sliding_attention" in first and not getattr(config, "sliding_window", None):
        raise FamilyError(f"{where}: some of its decoder blocks are of type sliding_attention, without sliding_window")


def _check_values(config: Any, family: Family, where: str) -> None:
    """FamilyError for values of the config that make another model of it than the family's record describes."""
    for key, known in family.holds_for:
        value = getattr(config, key, known)
        if value != known:
            raise FamilyError(
                f"{where}: config.json: {key} is {brief(value)}, and family {family.name} is known with "
                f"{brief(known)} only; such a model is not supported"
            )


def start_token(config: Any) -> int | None:
    """What each window of text must start with; None where it may start anywhere, and for a family that is not known.

    FamilyError if the config does not say what it is.
    """
    family = named_family(config)
    if family is None or not family.starts_with_bos:
        return None
    begin = token_id(config, "bos_token_id")
    if begin is None:
        raise FamilyError("config.json: bos_token_id is missing, and texts for this model must start with it")
    return int(begin)


def token_id(config: Any, key: str) -> Any:
    """A token, or several, that a config names, or else that of its text model; None if neither does."""
    found = getattr(config, key, None)
    return getattr(config.get_text_config(), key, None) if found is None else found


def build_skeleton(config: Any) -> PreTrainedModel:
    """The model of a config on the meta device, in evaluation mode; FamilyError if transformers cannot build it."""
    attention, family = needed_attention(config), named_family(config)
    auto = getattr(transformers, "AutoModelForCausalLM" if family is None else family.auto_class)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=False, attn_implementation=attention)
    except Exception as error:  # a value of the config that nothing checked before
        raise FamilyError(f"config.json: transformers cannot build this model: {_brief(error)}") from error
    return model.eval().requires_grad_(False)


def needed_attention(config: Any) -> str | None:
    """The attention function that transformers must take for a model; None leaves it the choice.

    PyTorch's own has no soft caps, and transformers 5.16 takes it and leaves them out in silence.
    """
    return None if getattr(config.get_text_config(), "attn_logit_softcapping", None) is None else "eager"


def read_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Give `model` the generation_config.json of a folder, where there is one; FamilyError if it cannot be read."""
    found = check_generation_config(folder)
    if found is not None:
        model.generation_config = found


def check_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation_config.json of a folder, where there is one; FamilyError if it cannot be read."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        read_json(path)
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as for `read_config`
        raise FamilyError(f"{path}: not a generation config that transformers reads: {_brief(error)}") from error


def rebuild_buffers(model: PreTrainedModel, family: Family, device: torch.device) -> None:
    """Replace what no file holds of the text model by real tensors on `device`: the rotary embedding of a model that
    has one, and the factor of an embedding that has one, in the type of its weights, which must be there."""
    modules = dict(model.named_modules())
    if family.rotary is not None and family.rotary in modules:
        rotary = type(modules[family.rotary])(config=model.config.get_text_config())
        model.set_submodule(family.rotary, rotary.to(device))
    embedding: Any = model.get_submodule(family.embedding)
    if hasattr(embedding, "embed_scale"):
        factor = torch.tensor(embedding.scalar_embed_scale, dtype=embedding.weight.dtype, device=device)
        embedding.register_buffer("embed_scale", factor, persistent=False)


def rebuild_carried_buffers(module: nn.Module, device: torch.device) -> None:
    """The same for a module beside the text model, whose weights must be there: as transformers does it."""
    if not isinstance(module, PreTrainedModel):
        return
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                part.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
    for tensor in module.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    module.initialize_weights()


def fill(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Put real tensors in place of meta ones; FamilyError names what is missing, extra or of the wrong shape."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected != found:
        name = min(name for name, _ in expected.items() ^ found.items())
        raise FamilyError(
            f"{where}: tensors do not fit the config: expected {_name(name, expected)}, got {_name(name, found)}"
        )
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)


def _brief(error: Exception) -> str:
    """The kind of an error of transformers, and its message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _name(name: str, shapes: dict[str, tuple[int, ...]]) -> str:
    return f"{name} {list(shapes[name])}" if name in shapes else f"no {name}"

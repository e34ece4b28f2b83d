"""The modules around the decoder blocks of a model, and the names of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.calibration import Executor, first_executor
from mxrot.calibration.attention_inputs import watched_heads
from mxrot.calibration.first_block import block_arguments, first_hidden
from mxrot.deriving.float64 import InFloat64
from mxrot.deriving.proofs import TOLERANCE
from mxrot.errors import FamilyError
from mxrot.layers.logits import logits_of
from mxrot.models import Family
from mxrot.models.family import Windows


def find_blocks(model: PreTrainedModel, where: str) -> str:
    """The name of the only list of all decoder blocks. FamilyError if there are several, or none."""
    count = model.config.num_hidden_layers
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [name for name in lists if len(model.get_submodule(name)) == count]  # type: ignore[arg-type]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        said = ", ".join(outer) or "none"
        raise FamilyError(f"{where}: expected one list of its {count} decoder blocks, found {said}")
    return outer[0]


def check_alike(model: PreTrainedModel, blocks: str, where: str) -> None:
    """Raise FamilyError unless all decoder blocks have modules of the same names and classes."""
    first, *others = ([(name, type(one)) for name, one in block.named_modules()] for block in _children(model, blocks))
    for index, other in enumerate(others, 1):
        if other != first:
            apart = sorted({name for name, _ in set(first) ^ set(other)})
            raise FamilyError(
                f"{where}: decoder block {index} is built otherwise than block 0 ({', '.join(apart[:4])}); the family "
                "of such a model must be written by hand (docs/add-a-family.md)"
            )


def _children(model: PreTrainedModel, name: str) -> list[nn.Module]:
    return list(model.get_submodule(name).children())


def name_of(model: nn.Module, wanted: nn.Module | None, what: str, where: str) -> str:
    """The name of a module of a model. FamilyError if it has none."""
    for name, module in model.named_modules():
        if module is wanted and name:
            return name
    raise FamilyError(f"{where}: transformers does not say which module is its {what}")


def find_final_norm(model: PreTrainedModel, body: str, blocks: str, ids: Tensor, where: str) -> str:
    """The module of the body between the last decoder block and the body's output. FamilyError unless it is a single
    one."""
    given: list[Any] = []
    seen: list[tuple[str, Any, Any]] = []
    last = _children(model, blocks)[-1]
    handles = [last.register_forward_hook(lambda _, __, output: given.append(output))]
    for name, module in model.get_submodule(body).named_children():
        full = f"{body}.{name}"
        if full != blocks:
            handles.append(
                module.register_forward_hook(
                    lambda _, arguments, output, full=full: seen.append((full, arguments, output)) if given else None
                )
            )
    try:
        with torch.no_grad():
            states = model.get_submodule(body)(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    passed = [(name, output) for name, arguments, output in seen if len(arguments) == 1 and arguments[0] is given[0]]
    found = [name for name, output in passed if isinstance(output, Tensor) and torch.equal(output, states)]
    if len(given) != 1 or not isinstance(given[0], Tensor) or len(found) != 1:
        raise FamilyError(
            f"{where}: what its last decoder block gives does not pass one norm to become its last states"
        )
    return found[0]


def find_rotary(model: PreTrainedModel, embedding: str, where: str) -> str | None:
    """The module whose numbers are in no file and are recomputed from the config; None if there is none.

    FamilyError if there are several, or if one cannot be recomputed.
    """
    found = [name for name, module in model.named_modules() if module._non_persistent_buffers_set and name != embedding]
    if not found:
        return None
    rotary: Any = model.get_submodule(found[0])
    try:
        again = type(rotary)(config=model.config)
        is_same = all(torch.equal(one, other) for one, other in zip(rotary.buffers(), again.buffers(), strict=True))
    except (TypeError, ValueError):
        is_same = False
    if len(found) > 1 or not is_same or list(rotary.parameters()):
        raise FamilyError(
            f"{where}: {', '.join(found[:3])}: holds numbers that no file does, and that are not made from the config "
            "alone"
        )
    return found[0]


def check_outside(model: PreTrainedModel, family: Family, where: str) -> None:
    """Raise FamilyError for a tensor outside of blocks, embedding, final norm and head."""
    known = tuple(f"{name}." for name in (family.blocks, family.embedding, family.final_norm, family.head))
    for name in model.state_dict():
        if not name.startswith(known):
            raise FamilyError(f"{where}: {name} is outside of its decoder blocks, its embedding, final norm and head")


def first_of(model: PreTrainedModel, family: Family, ids: Tensor) -> Executor:
    """An executor before the first block, with batches of one window."""
    return first_executor(model, family, ids, 1)


def find_attention(model: PreTrainedModel, family: Family, ids: Tensor, where: str) -> str:
    """The module of a block that calls transformers' attention function. FamilyError unless there is exactly one."""
    found = []
    block = _children(model, family.blocks)[0]
    for name, module in block.named_modules():
        if not name or getattr(module, "config", None) is None:
            continue
        seen: list[Tensor] = []
        executor = first_of(model, family, ids)
        executor.begin(block)
        with watched_heads(module, lambda query, key, value, seen=seen: seen.append(query)):  # type: ignore[misc]
            for _ in executor.outputs():
                pass
        if seen:
            found.append(name)
    if len(found) != 1:
        said = ", ".join(found) or "none"
        raise FamilyError(f"{where}: expected one module of a block that calls transformers' attention, found {said}")
    return found[0]


def check_passes(model: PreTrainedModel, family: Family, ids: Tensor, where: str) -> None:
    """Raise FamilyError unless blocks run one after the other, the final norm and the head give the model's logits."""
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        executor = first_of(model, family, ids)
        for index, block in enumerate(_children(model, family.blocks)):
            executor.begin(block)
            executor.advance(family.block_prefix(index))
        states = executor.stacked(range(executor.windows))
        logits = logits_of(model, model.get_submodule(family.final_norm)(states))
    if (logits - expected).norm() > TOLERANCE * expected.norm():
        raise FamilyError(
            f"{where}: its decoder blocks, final norm and head, run one after the other, do not give its logits: more "
            "than the hidden states passes between them, or its logits are scaled in a way that is not known"
        )


def find_windows(model: PreTrainedModel, family: Family, ids: Tensor, where: str) -> Windows:
    """The kind of sliding windows. A block has one if its output for the last token does not depend on the first one.

    FamilyError if a token depends on a later one, or if the config does not list these blocks.
    """
    config = model.config
    _check_keys(config, where)
    arguments = block_arguments(model, family, ids[:1])
    hidden = first_hidden(model, family, ids[:1])
    near = []
    for block, keywords in zip(_children(model, family.blocks), arguments, strict=True):
        plain = _run(block, hidden, keywords)
        earlier, later = hidden.clone(), hidden.clone()
        earlier[:, 0], later[:, -1] = hidden[:, 0].flip(-1), hidden[:, -1].flip(-1)
        if not torch.equal(_run(block, later, keywords)[:, :-1], plain[:, :-1]):
            raise FamilyError(f"{where}: what it gives for a token depends on later ones: not a causal language model")
        near.append(bool(torch.equal(_run(block, earlier, keywords)[:, -1], plain[:, -1])))
    kinds = getattr(config, "layer_types", None)
    said = [kind == "sliding_attention" for kind in kinds] if kinds else None
    if not any(near):
        return "none"
    if getattr(config, "sliding_window", None) is not None:
        if said == near:
            return "by kind"
        if all(near) and said is None:
            return "all"
    raise FamilyError(
        f"{where}: decoder blocks {[i for i, one in enumerate(near) if one]} do not see all tokens, and "
        "its config does not say so as layer_types and sliding_window do"
    )


def _check_keys(config: Any, where: str) -> None:
    """Raise FamilyError for a window under another key of the config: it may exceed the tokens of a small model."""
    for key, value in vars(config).items():
        is_one = ("window" in key and "sliding_window" not in key) or key == "attention_chunk_size"
        if is_one and key != "max_window_layers" and type(value) is int and value > 0:
            raise FamilyError(f"{where}: config.json: {key} is {value}, and what it does to attention is not known")


def _run(block: nn.Module, hidden: Tensor, keywords: dict[str, Any]) -> Tensor:
    with torch.no_grad(), InFloat64():
        found = block(hidden, **keywords)
    if not isinstance(found, Tensor):
        raise FamilyError("a decoder block gives more than its hidden states")
    return found

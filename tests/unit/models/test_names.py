"""Names with something in front of them, and what they are in the model."""

import pytest

from mxrot.errors import FamilyError
from mxrot.models.names import model_names

PLAIN = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.11.mlp.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def test_plain_names_stay() -> None:
    assert model_names(PLAIN) == {name: name for name in PLAIN}


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ("", ""),
        ("", "lm_head."),
        ("_orig_mod.model.", "_orig_mod.lm_head."),
        ("module.model.", "module.lm_head."),
        ("module.module._orig_mod.model.", "module.module._orig_mod.lm_head."),
        ("_orig_mod.module.model.", "_orig_mod.module.lm_head."),
        ("language_model.", "language_model.lm_head."),
        ("language_model.model.", "language_model.lm_head."),
        ("language_model.model.", "lm_head."),
        ("model.language_model.", "lm_head."),
        ("model.language_model.", "model.lm_head."),
        ("model.text_model.", "lm_head."),
        ("text_model.", "lm_head."),
        ("base_model.model.model.", "base_model.model.lm_head."),
        ("model.model.", "model.lm_head."),
        ("backbone.", "lm_head."),
        ("model.layers_.", None),
    ],
)
def test_prefixes(body: str, head: str | None) -> None:
    if head is None:
        assert set(model_names([f"{body}x"])) == {f"{body}x"}
        return
    stored = {body + name.removeprefix("model."): name for name in PLAIN[:-1]}
    stored |= {f"{head}weight": "lm_head.weight"} if head else {}
    assert model_names(stored) == stored


def test_parts_inside_of_a_name() -> None:
    stored = "model.layers.3._checkpoint_wrapped_module.mlp._orig_mod.up_proj.weight"
    assert model_names([stored]) == {stored: "model.layers.3.mlp.up_proj.weight"}


def test_what_is_not_known_stays() -> None:
    """Another prefix, several at once, and names beside a model of text only."""
    for names in (
        ["policy.model.layers.0.mlp.up_proj.weight"],
        ["model.layers.0.mlp.up_proj.weight", "vision_tower.layers.0.mlp.up_proj.weight"],
        ["language_model.layers.0.mlp.up_proj.weight", "text_model.layers.0.mlp.up_proj.weight"],
        ["_orig_model.layers.0.x", "modules.layers.0.x"],
    ):
        assert model_names(names) == {name: name for name in names}


def test_beside_a_known_prefix_other_names_stay() -> None:
    stored = ["layers.0.mlp.up_proj.weight", "mtp.0.weight", "norm.weight"]
    assert list(model_names(stored).values()) == [
        "model.layers.0.mlp.up_proj.weight",
        "mtp.0.weight",
        "model.norm.weight",
    ]


def test_two_names_of_one_tensor() -> None:
    with pytest.raises(FamilyError, match=r"_orig_mod\.lm_head\.weight: stands for the same tensor as lm_head\.weight"):
        model_names([*PLAIN, "_orig_mod.lm_head.weight"])

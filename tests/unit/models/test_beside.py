"""What stands beside a text model: names, and places in a family."""

import pytest

from mxrot.models import FAMILIES, Beside
from mxrot.models.beside import LLAVA_NAMES, WITHOUT_HEAD
from mxrot.models.family import CARRIED_OBSTACLE
from mxrot.models.names import model_names

LLAVA = Beside(("model.vision_tower", "model.multi_modal_projector"), ("mistral",), LLAVA_NAMES)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.embeddings.x", "model.vision_tower.embeddings.x"),
        ("vision_tower.ln_pre.weight", "model.vision_tower.ln_pre.weight"),
        ("multi_modal_projector.norm.weight", "model.multi_modal_projector.norm.weight"),
        ("language_model.norm.weight", "model.language_model.norm.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        ("_orig_mod.language_model.lm_head.weight", "lm_head.weight"),
        ("vision_towers.x", "vision_towers.x"),
    ],
)
def test_names_of_files_are_those_of_the_model(stored: str, name: str) -> None:
    assert model_names([stored], LLAVA) == {stored: name}
    assert model_names([name], LLAVA) == {name: name}


def test_a_model_without_its_head_has_no_prefix() -> None:
    qwen = Beside(("model.visual",), ("qwen3_vl_text",), WITHOUT_HEAD)
    assert qwen.model_name("visual.pos_embed.weight") == "model.visual.pos_embed.weight"
    assert qwen.model_name("model.visual.pos_embed.weight") == "model.visual.pos_embed.weight"


def test_what_is_carried_is_told_by_whole_names() -> None:
    assert LLAVA.is_carried("model.vision_tower") and LLAVA.is_carried("model.vision_tower.ln_pre.weight")
    assert not LLAVA.is_carried("model.vision_tower_2.x") and not LLAVA.is_carried("lm_head.weight")


def test_a_family_is_placed_inside_and_not_rotated() -> None:
    family = FAMILIES["llama"].with_beside("seeing", ("SeeingLlama",), LLAVA)
    assert family.block_prefix(3) == "model.language_model.layers.3"
    assert (family.body, family.embedding) == ("model.language_model", "model.language_model.embed_tokens")
    assert (family.final_norm, family.rotary) == ("model.language_model.norm", "model.language_model.rotary_emb")
    assert family.head == "lm_head" and family.sites == FAMILIES["llama"].sites
    assert family.rotation_obstacle == CARRIED_OBSTACLE and FAMILIES["llama"].is_rotatable
    assert family.carried == LLAVA.carried and FAMILIES["llama"].carried == ()

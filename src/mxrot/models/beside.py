"""Models of more than text: what stands beside the text model, and how a family of text becomes one of these.

The text model is quantized. What stands beside it, a vision tower and what projects its outputs into the text, is
carried: it keeps its types and bits.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Beside:
    """What a model of a family has beside its text model."""

    carried: tuple[str, ...]
    """Modules that are kept as they are, by their names in the model."""
    text_types: tuple[str, ...]
    """What its config calls text models that the record of the family describes (`model_type` of `text_config`)."""
    renamed: tuple[tuple[str, str], ...] = ()
    """How the names of stored tensors begin, and what they begin with in the model; the first that fits holds."""
    lacks: tuple[str, ...] = ()
    """Keys of the config of other parts, with which a model is refused."""
    turned: tuple[tuple[str, int], ...] = ()
    """Ends of names of tensors whose last two dimensions some files have in the other order, and which dimension is the
    hidden size in the model."""
    auto_class: str = "AutoModelForImageTextToText"
    """transformers' class that builds such a model."""

    def model_name(self, stored: str) -> str:
        """The name in the model of a tensor that a file has under this one."""
        for old, new in self.renamed:
            if stored.startswith(old):
                return new + stored.removeprefix(old)
        return stored

    def is_turned(self, name: str, stored: tuple[int, ...], hidden: int) -> bool:
        """Has a file the last two dimensions of the tensor of this name, of the shape `stored`, in the other order?
        Told as transformers does."""
        return any(name.endswith(end) and stored[dimension] != hidden for end, dimension in self.turned)

    def is_carried(self, name: str) -> bool:
        """Is a tensor or module of this name in what is carried?"""
        return f"{name}.".startswith(tuple(f"{place}." for place in self.carried))


FINAL_NORM = "model.language_model.norm.weight"
"""Its only dimension is the hidden size."""
WITHOUT_HEAD = (("language_model.", "model.language_model."), ("visual.", "model.visual."))
"""Of Qwen's models that are saved without their heads."""
LLAVA_NAMES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("language_model.", "model.language_model."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
"""Of models whose files have the names of LLaVA."""

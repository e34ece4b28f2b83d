"""The text that is always available: the reference manual of the running Python."""

from __future__ import annotations

from mxrot.text.roles import Role

_CALIBRATION_SHARE = 0.7


def demo_text(role: Role) -> str:
    """Python's reference manual, each paragraph once (regardless of indentation), cut into one part per role."""
    from pydoc_data.topics import topics

    paragraphs: dict[str, str] = {}
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    paragraphs.pop("", None)
    ordered = list(paragraphs.values())
    cut = int(len(ordered) * _CALIBRATION_SHARE)
    return "\n\n".join(ordered[:cut] if role == "calibration" else ordered[cut:])

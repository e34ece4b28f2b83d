"""Families that see images: what stands beside the text model comes through as it was, bit for bit, and still works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contracts.test_families import TINY_FAMILIES, spread_gains
from tests.contracts.tiny_configs import BESIDE, VISION, auto_class, config_of
from tests.tiny_model import write_tokenizer
from tests.unit.checkpoint.folders import recipe, write
from torch import Tensor
from transformers import PreTrainedModel

import mxrot
from mxrot.api import open_model
from mxrot.errors import FamilyError
from mxrot.models import Family, FolderSource, WeightFiles, build_skeleton, find_family
from mxrot.quantizing import quantize

SEEING = {name: family for name, family in TINY_FAMILIES.items() if family.beside is not None}
each = pytest.mark.parametrize("family", SEEING.values(), ids=SEEING)
IDS = torch.randint(2, 40, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each family, whose vision tower is in bfloat16 and the rest in float16."""
    found = {}
    for name, family in SEEING.items():
        torch.manual_seed(0)
        model = auto_class(family).from_config(config_of(family))
        spread_gains(model, family)
        for parameter in model.parameters():
            if not parameter.data.any():  # a projection that begins with nothing
                parameter.data.normal_(std=0.2)
            elif parameter.dim() > 1:  # so that images count beside biases
                parameter.data *= 5
        found[name] = tmp_path_factory.mktemp(name)
        model.half().save_pretrained(found[name])
        path = found[name] / "model.safetensors"
        stored = {key: _as_stored(family, key, tensor) for key, tensor in load_file(path).items()}
        save_file(stored, path, {"format": "pt"})
        write_tokenizer(found[name])
    return found


def _as_stored(family: Family, name: str, tensor: Tensor) -> Tensor:
    assert family.beside is not None
    return tensor.bfloat16() if family.beside.is_carried(family.beside.model_name(name)) else tensor


def with_image(config: Any, seed: int) -> dict[str, Tensor]:
    """What a model is called with for a text with one image; no processor is needed for that."""
    side, draws = VISION["image_size"], torch.Generator().manual_seed(seed)
    ids = IDS[:1].clone()
    ids[0, 5:9] = BESIDE["image_token_id"]
    if not hasattr(config, "video_token_id"):
        more = {"image_sizes": torch.tensor([[side, side]])} if config.model_type == "mistral3" else {}
        types = {"token_type_ids": (ids == BESIDE["image_token_id"]).long()} if config.model_type == "gemma3" else {}
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, side, side, generator=draws), **more, **types}
    patch = config.vision_config
    if hasattr(patch, "pooling_kernel_size"):
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
        types = {"mm_token_type_ids": (ids == BESIDE["image_token_id"]).int()}
        pixels = torch.rand(1, 16, 3 * patch.patch_size**2, generator=draws)
        return {"input_ids": ids, "pixel_values": pixels, "image_position_ids": places, **types}
    width = 3 * patch.temporal_patch_size * patch.patch_size**2
    grid = torch.tensor([[1, 4, 4]])
    types = {"mm_token_type_ids": (ids == BESIDE["image_token_id"]).int()}
    return {"input_ids": ids, "pixel_values": torch.randn(16, width, generator=draws), "image_grid_thw": grid, **types}


@torch.no_grad()
def seen(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """Logits of a text with an image."""
    found: Tensor = model(**with_image(model.config, seed)).logits
    return found


def carried(family: Family, folder: Path) -> dict[str, Tensor]:
    """What stands beside the text model, from the files of a folder."""
    assert family.beside is not None
    files = WeightFiles(folder, family.beside)
    return {name: files.read(name) for name in files.names if family.beside.is_carried(name)}


@each
@pytest.mark.parametrize("name", ["rtn", "mxrot", "duquant++"])
def test_what_is_carried_keeps_its_bits(folders: dict[str, Path], family: Family, tmp_path: Path, name: str) -> None:
    changes: dict[str, object] = {"calibration__generated": 0.5} if name == "mxrot" else {}
    bare = sorted({site.group for site in family.sites if site.norm is None and site.producer is None})
    chosen = recipe(name, **(changes | ({"smoothing__skip": bare} if name == "duquant++" else {})))
    folder = folders[family.name]
    write(folder, tmp_path / "out", chosen, windows=None if chosen.is_data_free else IDS)
    before, after = carried(family, folder), carried(family, tmp_path / "out")
    assert before.keys() == after.keys() and len(before) > 10
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == torch.bfloat16
        assert torch.equal(tensor.view(torch.int16), after[key].view(torch.int16)), key
    one, other = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "out"))
    assert other.pop("quantization_config") and one == other


@each
def test_a_quantized_model_sees_the_same_in_mxrot_and_transformers(
    folders: dict[str, Path], family: Family, tmp_path: Path
) -> None:
    """And it does see: another image has other logits behind it, and none before."""
    write(folders[family.name], tmp_path / "out", recipe("hadamard"), windows=None)
    loaded = mxrot.load(tmp_path / "out", device="cpu")
    theirs = auto_class(family).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(loaded) is type(theirs) and type(loaded).__name__ in family.architectures
    assert torch.equal(seen(loaded), seen(theirs))
    buffers, others = dict(loaded.named_buffers()), dict(theirs.named_buffers())
    assert buffers.keys() == others.keys()
    assert all(torch.equal(buffer, others[key]) for key, buffer in buffers.items())
    in_memory = quantize(folders[family.name], recipe("hadamard")).model
    assert in_memory is not None and torch.equal(seen(in_memory), seen(loaded))
    apart = (seen(loaded, seed=1) != seen(loaded)).any(dim=(0, 2))
    assert not apart[:5].any() and apart[9:].all()


@each
def test_the_original_is_opened_as_transformers_opens_it(folders: dict[str, Path], family: Family) -> None:
    opened, _ = open_model(folders[family.name], "cpu")
    theirs = auto_class(family).from_pretrained(folders[family.name], dtype=torch.float32)
    assert torch.equal(seen(opened), seen(theirs))
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, theirs(IDS).logits)


@each
def test_a_model_that_transformers_saves_again_is_read(
    folders: dict[str, Path], family: Family, tmp_path: Path
) -> None:
    write(folders[family.name], tmp_path / "out", recipe("rtn"), windows=None)
    theirs = auto_class(family).from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(seen(mxrot.load(tmp_path / "again", device="cpu")), seen(theirs))


@each
def test_it_is_quantized_while_transformers_loads_it(folders: dict[str, Path], family: Family) -> None:
    config = mxrot.MxrotConfig("rtn")
    on_load = auto_class(family).from_pretrained(folders[family.name], dtype=torch.float32, quantization_config=config)
    plain = auto_class(family).from_pretrained(folders[family.name], dtype=torch.float32)
    assert not torch.allclose(seen(on_load), seen(plain), rtol=1e-3)
    before, after = plain.state_dict(), on_load.state_dict()
    assert family.beside is not None
    kept = [name for name in before if family.beside.is_carried(name)]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


@pytest.mark.parametrize("name", [name for name, family in SEEING.items() if family.beside and family.beside.turned])
def test_tensors_that_files_have_turned_are_read(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """As those of the hub have them, which transformers reads, too."""
    family = SEEING[name]
    assert family.beside is not None
    for path in folders[name].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    ends = tuple(end for end, _ in family.beside.turned)
    found = [key for key in tensors if key.endswith(ends)]
    assert len(found) == 2
    turned = tensors | {key: tensors[key].mT.contiguous() for key in found}
    save_file(turned, tmp_path / "model.safetensors", {"format": "pt"})
    opened, _ = open_model(tmp_path, "cpu")
    plain, _ = open_model(folders[name], "cpu")
    theirs = auto_class(family).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(seen(opened), seen(plain)) and torch.equal(seen(opened), seen(theirs))


@each
def test_a_tensor_of_the_tower_that_is_missing_is_named(
    folders: dict[str, Path], family: Family, tmp_path: Path
) -> None:
    for path in folders[family.name].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    assert family.beside is not None
    gone = next(name for name in sorted(tensors) if family.beside.is_carried(family.beside.model_name(name)))
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = FolderSource(tmp_path)
    (problem,) = source.problems(build_skeleton(source.config))
    assert f"got no {family.beside.model_name(gone)}" in str(problem)


@each
def test_another_text_model_or_tower_is_refused(family: Family) -> None:
    config = config_of(family)
    config.vision_config.num_hidden_layers = 10**9
    with pytest.raises(FamilyError, match="vision_config: num_hidden_layers is 1000000000; expected at most 1000"):
        find_family(config, "here")
    config = config_of(family)
    vars(config)["text_config"] = config_of(TINY_FAMILIES["llama"])  # some classes take no other themselves
    with pytest.raises(FamilyError, match=f"model_type is 'llama', and family {family.name} is known with"):
        find_family(config, "here")

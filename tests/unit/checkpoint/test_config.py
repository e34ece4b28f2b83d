"""What compressed-tensors makes of a checkpoint, by its own code."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.transform import TransformConfig, TransformFactory
from compressed_tensors.utils import match_named_modules
from tests.tiny_model import tiny_config, write_tiny_model
from tests.unit.checkpoint.folders import all_tensors, recipe, write
from torch import nn

from mxrot import autoload
from mxrot.checkpoint import check_exportable, load
from mxrot.checkpoint.checked import check_checkpoint
from mxrot.checkpoint.config import compressed_tensors_config, native_config, why_unfaithful
from mxrot.errors import ConfigError
from mxrot.layers import QuantLinear, build_apart
from mxrot.models import read_config
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.recipe import Recipe, builtin_recipes
from mxrot.scheme import Scheme, scheme_name

NAMES = ["rtn", "smoothquant", "hadamard", "duquant++", "duquant++-gptq"]


def of_one_matrix(name: str, **changes: Any) -> Recipe:
    """A recipe as compressed-tensors has words for it: with one matrix a site."""
    return recipe(name, transform__sharing="site", **changes)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def their_config(folder: Path) -> dict:
    """The compressed-tensors form of what a checkpoint has installed."""
    checked = check_checkpoint(folder)
    assert why_unfaithful(checked.scheme) is None
    return json.loads(json.dumps(compressed_tensors_config(checked.scheme, checked.family, torch.float16)))


def parsed_by_theirs(table: dict) -> QuantizationConfig:
    """By compressed-tensors, with the layout as the format of each group, where "mxrot" keeps it from reading them."""
    groups = {name: group | {"format": table["format"]} for name, group in table["config_groups"].items()}
    return QuantizationConfig.model_validate(table | {"config_groups": groups})


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("name", NAMES)
def test_its_decompressor_gives_our_weights(source: Path, tmp_path: Path, name: str) -> None:
    write(source, tmp_path / "out", of_one_matrix(name))
    scheme = parsed_by_theirs(their_config(tmp_path / "out")).config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme)
    tensors = all_tensors(tmp_path / "out")
    linears = quantized_linears(load(tmp_path / "out"))
    assert len(linears) == 14
    for prefix, linear in linears.items():
        state = {part: tensors[f"{prefix}.{part}"] for part in ("weight_packed", "weight_scale")}
        decompressed = MXFP4PackedCompressor.decompress(state, scheme)["weight"]
        assert torch.equal(decompressed.float(), linear.dequantized_weight())


@pytest.mark.parametrize("name", NAMES)
def test_its_config_classes_read_ours(source: Path, tmp_path: Path, name: str) -> None:
    chosen = of_one_matrix(name, ignore=["model.layers.0.mlp.down_proj"])
    write(source, tmp_path / "out", chosen)
    table = their_config(tmp_path / "out")
    parsed = parsed_by_theirs(table)
    assert parsed.format == "mxfp4-pack-quantized"
    assert parsed.ignore == ["lm_head", "model.layers.0.mlp.down_proj"]
    scheme = parsed.config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme) and scheme.weights is not None
    assert (scheme.weights.num_bits, scheme.weights.group_size, scheme.weights.dynamic) == (4, 32, False)
    assert scheme.input_activations is not None and scheme.input_activations.dynamic is True
    quantizer = {"format": "mxfp4", "rule": "even"}
    one = {"kind": "block-diagonal", "block": 32, "sharing": "site"}
    own = {
        "weights": quantizer,
        "activations": quantizer,
        "transform": [one] if chosen.has_transform else [],
        "accumulation": "exact",
    }
    marker = {"format_version": 2, "dtype": "float16", "schemes": {"group_0": own}}
    assert table["mxrot"] == marker and table["quant_method"] == autoload.METHOD
    written = config_of(tmp_path / "out")
    if chosen.has_transform:  # which compressed-tensors would leave out where mxrot is not there
        groups = [group["format"] for group in written["config_groups"].values()]
        assert written["format"] == "mxrot" and set(groups) == {"mxrot"} and "transform_config" not in written
    else:
        assert written == table
    assert ("transform_config" in table) is chosen.has_transform
    assert (table["config_groups"]["group_0"]["format"] == "mxrot") is chosen.has_transform
    if chosen.has_transform:
        transforms = TransformConfig.model_validate(table["transform_config"])
        expected = {scheme_name(index, site) for index in (0, 1) for site in LLAMA.sites} - {"layer0_down"}
        assert set(transforms.config_groups) == expected


@pytest.mark.parametrize("ignore", [[], ["q_proj", "model.layers.1.mlp.*", "model.layers.11.self_attn.o_proj"]])
def test_targets_match_the_linears_of_a_site_and_nothing_else(tmp_path: Path, ignore: list[str]) -> None:
    """Twelve blocks: what is meant for layer 1 must leave layers 10 and 11 alone."""
    config = read_config(write_tiny_model(tmp_path / "source", num_hidden_layers=12))
    model = build_apart(config)
    chosen = recipe("hadamard", ignore=ignore)
    table = compressed_tensors_config(Scheme.of(chosen, LLAMA, model), LLAMA, torch.float16)
    schemes = TransformConfig.model_validate(table["transform_config"]).config_groups
    seen = set()
    for index in range(12):
        for site in LLAMA.active_sites(index, chosen.ignore):
            expected = {f"model.layers.{index}.{linear}" for linear in site.linears}
            scheme = schemes[scheme_name(index, site)]
            assert [(entry.location, entry.inverse) for entry in scheme.apply] == [
                ("input", False),
                ("weight_input", True),
            ]
            for entry in scheme.apply:
                found = {name for name, _ in match_named_modules(model, entry.targets, entry.ignore)}
                assert found == expected
            seen |= expected
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    ignored = {
        name for name in linears if name.endswith("q_proj") or ".1.mlp." in name or name.endswith("11.self_attn.o_proj")
    }
    assert seen == (linears - ignored if ignore else linears)


@pytest.mark.parametrize("name", ["hadamard", "duquant++"])
def test_the_transform_it_builds_is_the_one_we_apply(source: Path, tmp_path: Path, name: str) -> None:
    """It divides what comes out by sqrt(32) where we divide, and round, the matrix: half a step of bfloat16 apart.

    Ours lies within it, entry by entry: |bf16(t) - t| <= 2^-8 |t|.
    """
    write(source, tmp_path / "out", recipe(name))
    tensors = all_tensors(tmp_path / "out")
    groups = TransformConfig.model_validate(their_config(tmp_path / "out")["transform_config"]).config_groups
    linears = quantized_linears(load(tmp_path / "out"))
    for key, scheme in groups.items():
        (owner,) = (tensor.removesuffix(f".{key}_input.weight") for tensor in tensors if f".{key}_input" in tensor)
        stored = tensors[f"{owner}.{key}_input.weight"]
        assert stored.dtype == scheme.precision == torch.bfloat16 and stored.shape == (scheme.head_dim,) * 2
        linear = linears[owner]
        features = linear.in_features
        factory = TransformFactory.from_scheme(scheme, name=key, seed=0)
        theirs = factory.create_transform(nn.Linear(features, 1), scheme.apply[0])
        theirs.weight.data = stored.float()  # its precision may be float32; in bfloat16 it would round the output
        identity = torch.eye(features)
        found, expected = theirs(identity), linear.transform(identity)  # type: ignore[misc]
        assert torch.equal(found.to(torch.bfloat16).float(), expected)
        assert ((found - expected).abs() <= 2**-8 * found.abs()).all()
        # And its inverse is what our weights were folded with, for a rotation.
        assert torch.allclose(expected @ expected.t(), identity, atol=32 * 2**-8 / math.sqrt(32))


def test_bits_on_disk(tmp_path: Path) -> None:
    """4.25 bits a weight: 4 for the code, 8 / 32 for the scale; and 16 a transform entry."""
    source = write_tiny_model(tmp_path / "source")
    weights = sum(
        value.numel()
        for name, value in all_tensors(source).items()
        if ".layers." in name and name.endswith("proj.weight")
    )
    run = write(source, tmp_path / "out", recipe("duquant++"))
    tensors = all_tensors(tmp_path / "out")
    quantized = [value for name, value in tensors.items() if name.endswith((".weight_packed", ".weight_scale"))]
    assert 8 * sum(value.nbytes for value in quantized) == 4.25 * weights
    transforms = sum(value.nbytes for name, value in tensors.items() if name.endswith("_input.weight"))
    assert transforms == 2 * 4 * 32 * 32 * 2
    size = run["size"]
    assert size["quantized_weights"] == weights and size["bits_per_weight"] == 4.25
    assert size["transform_bytes"] == transforms
    assert size["total_bytes"] == sum(value.nbytes for value in tensors.values())


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_every_recipe_is_exportable_or_says_why_not(name: str) -> None:
    if "released" in name:
        with pytest.raises(ConfigError, match="scales of rule 'log256' are 8-bit levels that exist as float32"):
            check_exportable(recipe(name))
    else:
        check_exportable(recipe(name))


@pytest.mark.parametrize("changes", [{"weights__format": "mxfp6_e2m3"}, {"activations__format": "mxfp8_e4m3"}], ids=str)
def test_formats_that_compressed_tensors_has_no_layout_for(changes: dict[str, str]) -> None:
    chosen = recipe("rtn", **changes)
    check_exportable(chosen)
    scheme = Scheme.of(chosen, LLAMA, build_apart(tiny_config(architectures=["LlamaForCausalLM"])))
    assert native_config(scheme, LLAMA, torch.float16)["format"] == "mxrot"
    with pytest.raises(ConfigError, match="compressed-tensors: it has no layout for weights in mxfp"):
        compressed_tensors_config(scheme, LLAMA, torch.float16)

"""A model that writes text from several places: devices, main memory and disk, all of which are the CPU here."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.live_bytes import LiveBytes
from tests.tiny_model import random_windows, tiny_config, write_tiny_mixture, write_tiny_model
from tests.unit.calibration.two_processes import of_two_processes
from tests.unit.checkpoint.folders import recipe
from tests.unit.planning.shapes import run_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from mxrot.calibration import generated_windows, generation
from mxrot.calibration.spreading import Place, Room, Spread
from mxrot.calibration.world import World
from mxrot.calibration.writing_sizes import WritingSizes
from mxrot.errors import DiskFullError, MxrotWarning
from mxrot.layers import FixedCache, SpreadCache
from mxrot.models import FolderSource, build_skeleton
from mxrot.quantizing import run as pipeline
from mxrot.quantizing import spread_original
from mxrot.quantizing.loading import load_original
from mxrot.quantizing.spread_original import opened_original

CPU = torch.device("cpu")
BLOCKS = 4
PLACES: dict[str, tuple[Place, ...]] = {
    "kept": ("device",) * BLOCKS,
    "main memory": ("device", "main memory", "device", "main memory"),
    "disk": ("disk", "main memory", "device", "disk"),
    "nothing kept": ("main memory",) * BLOCKS,
}
WINDOWS = random_windows(4, 24)


def write_gemma3(folder: Path) -> Path:
    """Tied, with windows that slide in every second block, and texts that start with one token."""
    torch.manual_seed(1)
    settings = tiny_config(num_hidden_layers=BLOCKS, tie_word_embeddings=True, bos_token_id=2).to_diff_dict()
    plain = {key: value for key, value in settings.items() if key not in ("model_type", "transformers_version")}
    kinds = ["sliding_attention", "full_attention"] * (BLOCKS // 2)
    config = Gemma3TextConfig(**(plain | {"layer_types": kinds, "sliding_window": 8, "query_pre_attn_scalar": 16}))
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = tmp_path_factory.mktemp("models")
    return {
        "llama": write_tiny_model(found / "llama", num_hidden_layers=BLOCKS),
        "gemma3": write_gemma3(found / "gemma3"),
        "mixtral": write_tiny_mixture(found / "mixtral", "mixtral"),
    }


def spread_of(source: FolderSource, lies: tuple[Place, ...], at_once: int = 5) -> Spread:
    """Over two devices, the second half of the blocks on the second."""
    model = build_skeleton(source.config)
    count = source.config.num_hidden_layers
    sizes = WritingSizes.of(model, source.family, recipe("mxrot").calibration, (4, 24), torch.float32)
    halves = tuple(int(index >= count / 2) for index in range(count))
    return Spread(sizes, ("cpu", "cpu"), at_once, halves, lies[:count])


def windows(model: Any, at_once: int | None = None) -> Tensor:
    """Twenty windows; where the model is whole, so many at a time."""
    bound, generation.SEQUENCES_AT_ONCE = generation.SEQUENCES_AT_ONCE, at_once or generation.SEQUENCES_AT_ONCE
    try:
        return generated_windows(model, 20, 24, torch.Generator().manual_seed(0))
    finally:
        generation.SEQUENCES_AT_ONCE = bound


@pytest.mark.parametrize("lies", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_writes_what_it_writes_as_a_whole(
    folders: dict[str, Path], kind: str, lies: tuple[Place, ...], dtype: torch.dtype
) -> None:
    """To the last token, with as many sequences at a time; another number draws others."""
    source = FolderSource(folders[kind])
    expected = windows(load_original(source, dtype, CPU), 5)
    with opened_original(source, dtype, CPU, spread_of(source, lies)) as model:
        assert torch.equal(windows(model), expected)
    with opened_original(source, dtype, CPU, spread_of(source, lies, 4)) as model:
        assert torch.equal(windows(model), windows(load_original(source, dtype, CPU), 4))


def test_without_a_spread_it_is_the_whole_model(folders: dict[str, Path]) -> None:
    source = FolderSource(folders["llama"])
    with opened_original(source, torch.float32, CPU, None) as model:
        assert not hasattr(model, generation.SPREAD_AT_ONCE)
        assert torch.equal(windows(model), windows(load_original(source, torch.float32, CPU)))


def test_weights_are_there_only_while_their_module_computes(folders: dict[str, Path]) -> None:
    source = FolderSource(folders["llama"])
    seen: list[int] = []
    with opened_original(source, torch.float32, CPU, spread_of(source, PLACES["nothing kept"])) as model:
        blocks = model.get_submodule(source.family.blocks)
        linears = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
        assert linears and all(linear.weight.is_meta for linear in linears)
        inner = linears[0]._old_forward
        linears[0]._old_forward = lambda *arguments: (  # type: ignore[assignment]
            seen.append(sum(not linear.weight.is_meta for linear in linears)),
            inner(*arguments),  # type: ignore[operator]
        )[1]
        windows(model)
        assert set(seen) == {1} and all(linear.weight.is_meta for linear in linears)


@pytest.mark.parametrize("ends", ["well", "in an error"])
def test_nothing_stays_behind(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """No hook, no weight, no file, also where the caller keeps the model."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = FolderSource(folders["llama"])
    kept: list[Any] = []
    with LiveBytes() as alive:
        before = alive.live
        try:
            with opened_original(source, torch.float32, CPU, spread_of(source, PLACES["disk"])) as model:
                windows(model)
                kept.append(model)
                assert alive.live - before >= sum(spread_of(source, PLACES["disk"]).sizes.blocks)
                assert not list(tmp_path.iterdir())
                if ends != "well":
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert ends != "well"
        assert alive.live - before < 0.1 * spread_of(source, PLACES["disk"]).sizes.weights
    (model,) = kept
    assert all(not hasattr(module, "_hf_hook") and not hasattr(module, "_old_forward") for module in model.modules())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not hasattr(model, generation.SPREAD_AT_ONCE)


def test_a_full_disk_is_told(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    source = FolderSource(folders["llama"])
    with (
        pytest.raises(DiskFullError, match="no room for the model that writes text"),
        opened_original(source, torch.float32, CPU, spread_of(source, PLACES["disk"])),
    ):
        pass


class Driver:
    """Of a GPU: what memory it was told not to move."""

    def __init__(self, answer: int) -> None:
        self.answer, self.locked, self.calls = answer, dict[int, int](), 0

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        self.calls += 1
        if self.answer == 0:
            self.locked[pointer] = size
        return self.answer

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.locked[pointer]
        return 0


@pytest.mark.parametrize("answer", [0, 2])
def test_main_memory_is_locked_as_long_as_it_is_open(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    """One piece a block; where the driver will not, without."""
    driver = Driver(answer)
    cleared: list[None] = []
    monkeypatch.setattr(spread_original, "_clear_error", lambda: cleared.append(None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("cudart", lambda: driver), ("synchronize", lambda: None), ("empty_cache", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    source = FolderSource(folders["llama"])
    expected = windows(load_original(source, torch.bfloat16, CPU), 5)
    spread = spread_of(source, PLACES["nothing kept"])
    with opened_original(source, torch.bfloat16, CPU, spread) as model:
        assert driver.calls == BLOCKS and len(driver.locked) == (BLOCKS if answer == 0 else 0)
        assert all(size >= spread.sizes.blocks[0] / 2 for size in driver.locked.values())
        assert torch.equal(windows(model), expected)
    assert not driver.locked and len(cleared) == (0 if answer == 0 else BLOCKS)


def test_a_cache_goes_from_device_to_device() -> None:
    """As from one GPU to the next; without that it would not do."""
    here, there = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4, device="meta")
    for cache in (SpreadCache(8), FixedCache(8)):
        cache.position = torch.zeros(1, dtype=torch.int64)
        cache.update(here, here, 0)
        if isinstance(cache, SpreadCache):
            cache.update(there, there, 1)
            assert [keys.device.type for keys, _ in cache.kept] == ["cpu", "meta"]
        else:
            with pytest.raises(RuntimeError, match="same device"):
                cache.update(there, there, 1)


def small_room(source: Path, free: float, host: float = 10.0, disk: float = 0.0) -> Room:
    """One device, in multiples of the model's weights."""
    opened = FolderSource(source)
    model = build_skeleton(opened.config)
    sizes = WritingSizes.of(model, opened.family, recipe("mxrot").calibration, (4, 24), torch.float32)
    return Room(("cpu",), (free * sizes.weights,), host * sizes.weights, disk * sizes.weights)


def quantized(source: Path, room: Room | None, world: World | None = None) -> dict[str, Tensor]:
    """The state of a model whose text is written within a room."""
    asked = [pipeline.room_here, spread_original.room_here]
    pipeline.room_here = spread_original.room_here = lambda device, wanted: room  # type: ignore[assignment]
    options = {} if world is None else {"world": world}
    try:
        chosen = recipe("mxrot", permutation="none")
        model = pipeline.quantize(source, chosen, windows=WINDOWS, **options).model  # type: ignore[arg-type]
    finally:
        pipeline.room_here, spread_original.room_here = asked
    assert model is not None
    return dict(model.state_dict())


@pytest.mark.parametrize("host", [10.0, 0.3])
def test_a_model_that_no_device_holds_is_quantized_to_the_same_weights(folders: dict[str, Path], host: float) -> None:
    """Four windows are four sequences, written at once either way."""
    source = folders["llama"]
    expected = quantized(source, None)
    places = "cpu and main memory" if host > 1 else "cpu, main memory and disk"
    with pytest.warns(MxrotWarning, match=f"^The model that writes the text is spread over {places}, 4 seq") as told:
        found = quantized(source, small_room(source, 0.9, host, 10.0))
    assert len(told) == 1
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_nothing_is_said_where_it_fits(folders: dict[str, Path]) -> None:
    source = folders["llama"]
    expected, found = quantized(source, None), quantized(source, small_room(source, 10.0))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def work(folder: Path, world: World) -> dict[str, Tensor]:
    """The model, and how often this process has opened the original to write."""
    opened, own = 0, pipeline.opened_original

    def counted(*arguments: Any) -> Any:
        nonlocal opened
        opened += 1
        return own(*arguments)

    pipeline.opened_original = counted
    with nullcontext() if world.rank else pytest.warns(MxrotWarning):
        state = quantized(folder, small_room(folder, 0.9), world)
    return {key: value.clone() for key, value in state.items()} | {"opened": torch.tensor(opened)}


@pytest.mark.slow
def test_of_two_processes_the_first_spreads_it_and_the_other_waits(folders: dict[str, Path], tmp_path: Path) -> None:
    first, second = of_two_processes(partial(work, folders["llama"]), tmp_path)
    assert (int(first.pop("opened")), int(second.pop("opened"))) == (1, 0)
    assert all(torch.equal(first[key], second[key]) for key in first) and len(first) > 20


def test_what_the_plan_counts_is_what_is_decided_by(folders: dict[str, Path]) -> None:
    for kind, folder in folders.items():
        source = FolderSource(folder)
        chosen = recipe("mxrot")
        run = run_of(source.config, chosen, 4, 24, torch.bfloat16, "cuda")
        own = WritingSizes.of(build_skeleton(source.config), source.family, chosen.calibration, (4, 24), torch.bfloat16)
        assert replace(own, config=None) == replace(run.writing, config=None), kind
        assert own.stages == run.writing.stages

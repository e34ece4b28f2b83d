"""Quantize a model into a checkpoint folder.

Everything that could stop a run at its end is looked at first: the place of the output (output.py), what an earlier run
left there (partial.py), the files that are copied (side_files.py), the room on the disk. From then on the output is
held by this process (lock.py). The work happens in a partial folder, one shard a decoder block, so that a finished
block is on disk for good; the output appears by one rename (placing.py), and what stood there before, with `force`, is
removed only then.

Whatever ends a run early, finished blocks stay, and the error says where; with `resume` the next run goes on from
there, and writes the same bytes in the end.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxrot.calibration import ONE, World
from mxrot.checkpoint.card import Made, model_card
from mxrot.checkpoint.card_source import describe_source
from mxrot.checkpoint.config import check_exportable, native_config
from mxrot.checkpoint.files import check_hashes, write_bytes, write_json
from mxrot.checkpoint.fingerprint import Stamps, differences, fingerprint_of, hash_files, hash_model
from mxrot.checkpoint.output import Place, check_empty, claimed
from mxrot.checkpoint.partial import (
    PartialCheckpoint,
    check_free_to_work,
    holds_work,
    is_note,
    open_partial,
    read_fingerprint,
    read_stamps,
    remove_partial,
)
from mxrot.checkpoint.placing import finish_placing, put_in_place
from mxrot.checkpoint.room import Room
from mxrot.checkpoint.side_files import copy_file, find_side_files, left_out
from mxrot.documents import read_json
from mxrot.errors import CheckpointError, DamagedError, add_note
from mxrot.models import FolderSource, Source, check_generation_config, commit_of
from mxrot.models.family_table import DERIVED, derived_table
from mxrot.progress import Progress, silent
from mxrot.quantizing.run import QuantizedModel, quantize
from mxrot.recipe import Recipe
from mxrot.watching import Watch


def quantize_to_folder(
    source: Source | Path,
    recipe: Recipe,
    output: Path,
    *,
    base_name: str,
    windows: Tensor | None = None,
    data: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    force: bool = False,
    resume: bool = False,
    needed_bytes: float = 0,
    progress: Progress = silent,
    world: World = ONE,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Quantize a model, by its source or its folder, into the new folder `output`; returns what its run.json holds.

    `data` describes the calibration text for the record; so many `needed_bytes` must be free on the disk. With `resume`
    an unfinished run of the same kind is gone on from, and a finished one is checked. CheckpointError if `output` is in
    use, or exists and is not empty, unless `force`; or if there is an unfinished run and neither is given.
    DiskFullError if the disk is, or becomes, too full, TimeLimitError if `watch` ends the run. After any error what
    stood at `output` is intact. The first process of `world` alone looks at the output and writes there.
    """
    check_exportable(recipe)
    if isinstance(source, Path):
        source = FolderSource(source)
    options: dict[str, Any] = {"windows": windows, "device": device, "seed": seed, "progress": progress, "world": world}
    options["watch"] = watch
    if world.rank:
        found: dict[str, Any] | None = world.hand_out(None)
        if found is None:
            quantize(source, recipe, **options)
            found = world.hand_out(None)
        assert found is not None
        return found
    folder = source.folder
    base_name = base_name.encode(errors="replace").decode()  # a folder's name need not be text
    with claimed(output) as place:
        finish_placing(place, is_note)
        _check_apart(folder, place)
        if not resume:
            check_free_to_work(place.partial, resume, force)
            check_empty(place, force)
        check_generation_config(folder)
        side_files = find_side_files(folder)
        room = Room(place.shown, place.partial, place.lock.parent, needed_bytes)
        room.check()
        files, stamps = hash_model(folder, read_stamps(place.partial), progress)
        sides, _ = hash_files(folder, [*side_files, *folder.glob("README.md")])
        fingerprint = fingerprint_of(files, sides, recipe, windows, device, seed, _applied(source), world.size)
        if resume and (finished := _finished_run(place, fingerprint, force)):
            return world.hand_out(finished)
        check_free_to_work(place.partial, resume, force)
        check_empty(place, force)
        fingerprint = open_partial(place.partial, fingerprint, stamps, resume)
        world.hand_out(None)  # there is something to be done
        store = PartialCheckpoint(place.partial, source.family, source.config.get_text_config().num_hidden_layers, room)
        try:
            for path in side_files:
                copy_file(path, place.partial / path.relative_to(folder))
            result = quantize(source, recipe, store=store, **options)
            _check_unchanged(folder, files, stamps)
            run = _write_around(store, result, base_name, data, fingerprint)
            put_in_place(place, is_note)
        except BaseException as error:
            _keep_work(place.partial, fingerprint, error)
            raise
        return world.hand_out(run)


def _applied(source: Source) -> list[str]:
    """What a run depends on beside the files of its model: changes of tensors, and a family that was derived."""
    table = derived_table(source.config)
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]
    return [*source.changes, *([] if table is None else [f"family derived: {digest}"])]


def _check_apart(source: Path, place: Place) -> None:
    for folder in (place.output, place.partial):
        if source.resolve().is_relative_to(folder):
            raise CheckpointError(f"{place.shown}: holds the model that is to be quantized; give another folder")


def _check_unchanged(source: Path, files: dict[str, str], stamps: Stamps) -> None:
    """CheckpointError if the model is not what it was when the run began."""
    now, _ = hash_model(source, stamps)
    changed = sorted(name for name in now.keys() | files.keys() if now.get(name) != files.get(name))
    if changed:
        raise CheckpointError(
            f"{source / changed[0]}: was changed while the model was quantized; start over with --force"
        )


def _finished_run(place: Place, fingerprint: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """run.json of the output if it is the result of this very run, put in place now where only that was missing.

    CheckpointError, unless `force`, if it is the result of another run, or is damaged.
    """
    run = _run_of(place.output)
    if run is not None:
        try:
            if others := differences(run["fingerprint"], fingerprint):
                raise CheckpointError(
                    f"{place.shown}: was made by a run with another {', '.join(others)}; use --force to replace it, or "
                    "another folder"
                )
            check_hashes(place.output, run.get("files"))
            return run
        except CheckpointError:
            if not force:
                raise
    run = _run_of(place.partial)
    if run is None or differences(run["fingerprint"], fingerprint):
        return None
    check_empty(place, force)
    try:
        check_hashes(place.partial, run.get("files"))
    except CheckpointError:
        return None  # its blocks are looked at one by one
    put_in_place(place, is_note)
    return run


def _run_of(folder: Path) -> dict[str, Any] | None:
    """run.json of a folder, if it says whose it is."""
    try:
        run = read_json(folder / "run.json")
    except DamagedError:
        return None
    return run if isinstance(run.get("fingerprint"), dict) else None


def _keep_work(partial: Path, fingerprint: dict[str, Any], error: BaseException) -> None:
    """Let an error say that work is kept; a folder without any is removed."""
    if read_fingerprint(partial) != fingerprint:
        return  # it is in its place already
    if work := holds_work(partial):
        what = "finished blocks are" if "block" in work else f"{work} is"
        add_note(error, f"{what} kept in {partial}; the same command with --resume continues from there")
    else:
        remove_partial(partial)


def _write_around(
    store: PartialCheckpoint,
    result: QuantizedModel,
    base_name: str,
    data: dict[str, Any] | None,
    fingerprint: dict[str, Any],
) -> dict[str, Any]:
    """Everything but the shards and what is copied: index, config, recipe, card and run.json."""
    folder, source, recipe = store.folder, result.source, result.record.recipe
    store.write_index()
    config = {**read_json(source.folder / "config.json"), **source.config_changes}
    config.pop("transformers_weights", None)  # names a file of the source
    derived = derived_table(source.config)
    if derived is not None:
        config[DERIVED] = derived
    config["quantization_config"] = native_config(result.scheme, store.family, result.dtype)
    write_json(folder / "config.json", config)
    write_bytes(folder / "recipe.toml", recipe.to_toml().encode())
    has_bias = any(f"{name.removesuffix('.bias')}.weight_packed" in store.weight_map for name in store.weight_map)
    left = store.left_table()
    made = Made(
        recipe, result.scheme, store.size, store.shapes, has_bias, left["linears"], data, store.family.auto_class
    )
    card = model_card(describe_source(base_name, source.folder), made)
    write_bytes(folder / "README.md", card.encode())
    size = {
        **store.size.as_table(),
        "bits_per_weight": store.size.bits_per_weight,
        "total_bytes": store.size.total_bytes,
    }
    run = {
        "model": base_name,
        "revision": commit_of(source.folder),
        "changes": list(source.changes),
        **({"passed_over": source.passed_over} if source.passed_over else {}),
        "fingerprint": fingerprint,
        "data": data,
        "size": size,
        "left_alone": left,
        **({} if derived is None else {"family": derived}),
        **result.record.as_table(),
        "not_copied": left_out(source.folder),
        "files": {name: vars(written) for name, written in store.results().items()},
    }
    write_json(folder / "run.json", run)
    return run

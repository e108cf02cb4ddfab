"""Points of a training: stored small, unpacked by name, refused in plain words."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import load_file, save_file

from circuit_generalization import checkpoints
from circuit_generalization.checkpoints import cache_folder, checkpoint_folder, checkpoints_of, from_bytes, save_checkpoint_file, to_bytes
from circuit_generalization.cli import main
from circuit_generalization.errors import InputError
from circuit_generalization.language import Language
from circuit_generalization.models import find_model, load_model, model_name
from circuit_generalization.organisms import Recipe, train

MODEL = "organism-b"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "circuit-generalization"


@given(arrays("float32", array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(-1e4, 1e4, width=32)))
def test_rounding_is_at_most_half_a_step(values):
    w = torch.from_numpy(values)
    error = (from_bytes(to_bytes({"w": w}))["w"] - w).abs()
    assert (error <= w.abs().amax(-1, keepdim=True) / 127 / 2 * (1 + 1e-4) + 1e-6).all()


def test_vectors_stay_in_half_precision_and_names_are_kept():
    stored = to_bytes({"a.weight": torch.eye(3), "a.bias": torch.tensor([0.1, 70.0])})
    assert {k: v.dtype for k, v in stored.items()} == {"a.weight": torch.int8, "a.weight.scale": torch.float32, "a.bias": torch.float16}
    assert torch.equal(from_bytes(stored)["a.weight"], torch.eye(3)) and list(from_bytes(stored)) == ["a.weight", "a.bias"]


def test_a_stored_file_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(AttributeError): save_checkpoint_file({"w": torch.eye(2), "bad": None}, tmp_path / "step00001.safetensors")
    assert not (tmp_path / "step00001.safetensors").exists()


def test_a_checkpoint_is_a_model_by_name(cache):
    step = next(iter(checkpoints_of(MODEL)))
    model = load_model(f"{MODEL}@{step}")
    assert model_name(model) == f"{MODEL}@{step}" and model.tokenizer is not None and model.cfg.n_layers == 4
    (folder,) = cache.iterdir()
    assert find_model(f"{MODEL}@{step}") == folder and not (folder / "card.json").exists()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    load_model(f"{MODEL}@{step}")
    assert (folder / "model.safetensors").stat().st_mtime_ns == before, "unpacked once"


@pytest.mark.parametrize("name, complaint", [
    (f"{MODEL}@1", f"there is {MODEL}@1000"), (f"{MODEL}@", "no such checkpoint"), (f"{MODEL}@last", "no such checkpoint"),
    ("compiled-ioi@1000", "none of this model")])
def test_a_step_that_is_not_kept_is_refused(name, complaint):
    with pytest.raises(InputError, match=complaint): load_model(name)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set XDG_CACHE_HOME to a folder that can be written"):
        checkpoint_folder(f"{MODEL}@{next(iter(checkpoints_of(MODEL)))}", find_model(MODEL))


def test_the_command_lists_them(capfd):
    assert main(["models"]) == 0
    assert f"{MODEL}@{next(iter(checkpoints_of(MODEL)))}" in capfd.readouterr().out


def test_the_points_lie_around_the_moment_when_ioi_is_learned():
    steps, right = list(checkpoints_of(MODEL)), []
    language = Language(random.Random("checkpoints"))
    samples = [language.ioi("template") for _ in range(100)]
    for name in [*(f"{MODEL}@{k}" for k in steps), MODEL]:
        model = load_model(name)
        ids = model.tokenizer([s.prompt for s in samples])["input_ids"]
        answers = [model.tokenizer(s.answer)["input_ids"][0] for s in samples]
        logits = [model(torch.tensor([row]))[0, -1] for row in ids]
        right.append(sum(int(x.argmax()) == a for x, a in zip(logits, answers)) / len(samples))
    assert len(steps) + 1 <= 12 and right[0] < 0.1 and right[-1] > 0.98
    assert any(0.2 < r < 0.9 for r in right), f"at least one point in the middle: {dict(zip(steps, right))}"
    assert sum(r > 0.9 for r in right) >= 3


def test_training_tells_of_every_step():
    seen = []
    train(Recipe(n_layers=1, d_model=32, d_mlp=32, steps=4, first_phase=1, focus_from=3, batch=8), 0, after=lambda step, model: seen.append(step))
    assert seen == [1, 2, 3, 4]


def test_a_row_of_zeros_has_a_scale_that_can_be_divided_by():
    stored = to_bytes({"w": torch.zeros(2, 3)})
    assert (stored["w.scale"] > 0).all() and torch.equal(from_bytes(stored)["w"], torch.zeros(2, 3))


def test_weights_come_back_in_single_precision():
    assert {w.dtype for w in from_bytes(to_bytes({"a": torch.eye(3).half(), "b": torch.ones(2)})).values()} == {torch.float32}


def test_the_cache_is_in_the_home_folder_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "circuit-generalization"


@pytest.fixture
def finished(tmp_path):
    "The folder of a finished model, as far as unpacking goes."
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "config.json").write_text("{}")
    return tmp_path / "finished"


def test_other_weights_of_the_same_name_are_unpacked_anew(tmp_path, monkeypatch, finished):
    path, folders = tmp_path / "step00001.safetensors", []
    monkeypatch.setattr(checkpoints, "checkpoints_of", lambda model: {1: path})
    for weights in (torch.eye(2, 3), torch.eye(2, 3).T):
        save_checkpoint_file({"w": weights}, path)
        folders.append(checkpoint_folder("m@1", finished))
        assert torch.equal(load_file(folders[-1] / "model.safetensors")["w"], weights)
    assert folders[0] != folders[1]


def test_an_emptied_cache_is_filled_again(tmp_path, monkeypatch, finished):
    path = tmp_path / "step00001.safetensors"
    monkeypatch.setattr(checkpoints, "checkpoints_of", lambda model: {1: path})
    save_checkpoint_file({"w": torch.eye(2)}, path)
    for file in (folder := checkpoint_folder("m@1", finished)).iterdir(): file.unlink()
    assert checkpoint_folder("m@1", finished) == folder and (folder / "config.json").is_file()


def test_two_processes_may_unpack_at_once(tmp_path, monkeypatch, cache, finished):
    save_checkpoint_file({"w": torch.eye(2)}, tmp_path / "step00001.safetensors")
    pid, folder = [1], cache / "m@1"

    def save_while_another_does(*args, **more):
        if pid.pop() == 1:
            pid.append(2)
            checkpoints._unpack(tmp_path / "step00001.safetensors", finished, folder)
        pid.append(1)
        save_file(*args, **more)

    monkeypatch.setattr("os.getpid", lambda: pid[0])
    monkeypatch.setattr("safetensors.torch.save_file", save_while_another_does)
    checkpoints._unpack(tmp_path / "step00001.safetensors", finished, folder)
    assert list(cache.iterdir()) == [folder] and (folder / "config.json").is_file()


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    (path := tmp_path / "step00001.safetensors").write_text("old")

    def full(weights, beside):
        beside.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="disk full"): save_checkpoint_file({"w": torch.eye(2)}, path)
    assert path.read_text() == "old"

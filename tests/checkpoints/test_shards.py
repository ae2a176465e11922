"""Bad weight files, each with the message that says what is wrong with it."""

import json
import os
import pickle
import weakref

import pytest
import torch
from torch import nn

from moe_mt.checkpoints import load
from moe_mt.checkpoints.shards import open_shards
from moe_mt.errors import CheckpointError
from tests.checkpoints.published import DENSE, LAYOUTS, random_tensors, write_folder, write_tensors

FORMATS = ("safetensors", "bin")


@pytest.fixture(params=FORMATS)
def single(request, tmp_path):
    """A folder with one weight file, and the file."""
    folder = write_folder(tmp_path / "model", DENSE, random_tensors(DENSE), layout=request.param)
    return folder, next(folder.glob(f"*.{request.param}"))


@pytest.fixture(params=FORMATS)
def sharded(request, tmp_path):
    """A folder with three shards, its index, and its shards in order."""
    tensors = random_tensors(DENSE)
    folder = write_folder(tmp_path / "model", DENSE, tensors, layout=f"sharded {request.param}")
    index = next(folder.glob("*.index.json"))
    return folder, index, sorted(folder.glob(f"*.{request.param}"))


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder, device="cpu", dtype=torch.float32)
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_give_every_tensor_once(tmp_path, layout):
    tensors = random_tensors(DENSE)
    shards = open_shards(write_folder(tmp_path / "model", DENSE, tensors, layout=layout))
    assert sorted(shards.keys) == sorted(tensors)
    found = {key: read().clone() for key, read in shards}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_a_file_is_released_before_the_next_is_opened(tmp_path, monkeypatch):
    # Otherwise files that cannot be mapped would pile up in memory, 10 GB each for the 54B.
    tensors = random_tensors(DENSE)
    folder = write_folder(tmp_path / "model", DENSE, tensors, layout="sharded bin")
    for path in folder.glob("*.bin"):
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    held: list[weakref.ref] = []
    alive_when_opening = []
    real = torch.load

    def watched(*arguments, **options):
        alive_when_opening.append(sum(tensor() is not None for tensor in held))
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "load", watched)
    # The last ``read`` of a file is still in the loop's hands when the next file is opened.
    for _, read in open_shards(folder):
        held.append(weakref.ref(read()))
        assert held[-1]() is not None
    assert alive_when_opening == [0, 0, 0]
    assert len(held) == len(tensors)


def test_missing_shard(sharded):
    folder, index, files = sharded
    files[1].unlink()
    message = refusal(folder)
    assert files[1].name in message
    assert index.name in message


def test_shard_whose_link_leads_nowhere(sharded):
    # A hub cache from which somebody removed a blob.
    folder, _, files = sharded
    files[2].unlink()
    files[2].symlink_to("../../blobs/gone")
    assert files[2].name in refusal(folder)


def test_no_weights(tmp_path):
    folder = write_folder(tmp_path / "model", DENSE, random_tensors(DENSE))
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.99])
def test_truncated_file(single, kept):
    # Nothing, a part of the header, all of it and some tensors, all but the end.
    folder, path = single
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if kept < 1 else kept])
    message = refusal(folder)
    assert str(path) in message
    assert "truncated or damaged" in message


def test_truncated_shard(sharded):
    folder, _, files = sharded
    os.truncate(files[2], files[2].stat().st_size // 2)
    assert f"{files[2]} is truncated or damaged" in refusal(folder)


@pytest.mark.parametrize("kept", [100, 0.5, 0.99])
def test_truncated_file_older_than_the_zip_format(tmp_path, kept):
    tensors = random_tensors(DENSE)
    folder = write_folder(tmp_path / "model", DENSE, tensors, layout="bin")
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    size = path.stat().st_size
    os.truncate(path, int(size * kept) if kept < 1 else kept)
    assert "truncated or damaged" in refusal(folder)


def test_random_bytes(single):
    folder, path = single
    path.write_bytes(bytes(range(256)) * 20)
    assert "truncated or damaged" in refusal(folder)


def test_git_lfs_pointer(single):
    # What `git clone` leaves where git-lfs is not installed.
    folder, path = single
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "git lfs pull" in refusal(folder)


def test_weight_file_that_is_a_folder(single):
    folder, path = single
    path.unlink()
    path.mkdir()
    assert path.name in refusal(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"weight_map": [1]}', '{"weight_map": {}}', "{}"]
)
def test_index_that_is_no_index(sharded, text):
    folder, index, _ = sharded
    index.write_text(text)
    assert index.name in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "sub/model.safetensors",
        "..\\model.bin",  # a separator on Windows
        "C:model.bin",  # another drive there
        7,
    ],
)
def test_index_that_points_outside_its_folder(sharded, name):
    folder, index, _ = sharded
    content = json.loads(index.read_text())
    content["weight_map"]["shared.weight"] = name
    index.write_text(json.dumps(content))
    assert "points outside its folder" in refusal(folder)


def test_index_that_names_a_tensor_its_shard_lacks(sharded):
    folder, index, files = sharded
    content = json.loads(index.read_text())
    content["weight_map"]["shared.weight"] = files[1].name
    index.write_text(json.dumps(content))
    message = refusal(folder)
    assert "lacks 'shared.weight'" in message
    assert files[1].name in message


class Attack:
    """What a hostile pickle does when it is opened with full pickle."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_pickle_that_runs_code(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path / "model", DENSE, {}, layout="bin")
    path = folder / "pytorch_model.bin"
    torch.save({"shared.weight": Attack()}, path, _use_new_zipfile_serialization=zipped)
    message = refusal(folder)
    assert "mkdir" in message
    assert "never run" in message
    assert "weights_only=False" not in message
    assert not (tmp_path / "attacked").exists()


def test_pickle_that_torch_did_not_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path / "model", DENSE, {}, layout="bin")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(), protocol=2))
    assert str(folder / "pytorch_model.bin") in refusal(folder)
    assert not (tmp_path / "attacked").exists()


def test_pickle_of_a_whole_module(tmp_path):
    # torch.save(model) in place of torch.save(model.state_dict()).
    folder = write_folder(tmp_path / "model", DENSE, {}, layout="bin")
    torch.save(nn.Linear(2, 2), folder / "pytorch_model.bin")
    assert "Linear" in refusal(folder)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_pickle_of_a_training_state(tmp_path, wrapper):
    # Unwrapping would be a guess at which of its dictionaries is the model.
    content = {wrapper: random_tensors(DENSE), "epoch": 3}
    folder = write_folder(tmp_path / "model", DENSE, {}, layout="bin")
    torch.save(content, folder / "pytorch_model.bin")
    message = refusal(folder)
    assert repr(wrapper) in message
    assert "inner dictionary" in message


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], torch.ones(2), {"shared.weight": [1.0]}, {3: torch.ones(2)}]
)
def test_pickle_that_is_no_dictionary_of_tensors(tmp_path, content):
    folder = write_folder(tmp_path / "model", DENSE, {}, layout="bin")
    torch.save(content, folder / "pytorch_model.bin")
    assert "expected" in refusal(folder)


def test_empty_weight_file(single):
    # Valid in its format, and holds nothing.
    folder, path = single
    write_tensors(path, {})
    assert "lacks" in refusal(folder)

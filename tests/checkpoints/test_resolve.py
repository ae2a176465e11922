"""From a name to a folder: local folders, the hub over its own protocol, and no hub at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from moe_mt import checkpoints
from moe_mt.checkpoints import FreeBytes, fetch_small_files, load, resolve
from moe_mt.errors import CheckpointError, PlacementError
from tests.checkpoints.hub_server import COMMIT, HubServer
from tests.checkpoints.published import DENSE, NLLB_MOE_54B, random_tensors, write_folder

NAME = "owner/model"
HERE = {"device": torch.device("cpu"), "dtype": torch.float32}
SMALL = {
    "config.json",
    "generation_config.json",
    "sentencepiece.bpe.model",
    "vocab.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
}
NEVER = {"README.md", "rust_model.ot", "tokenizer.json", "model.fp16.safetensors", ".gitattributes"}


def repository(tmp_path, layout: str) -> dict[str, bytes]:
    """Return the files of a published model, with those around it that are not needed."""
    folder = write_folder(tmp_path / "source", DENSE, random_tensors(DENSE), layout=layout)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = (SMALL | NEVER) - set(files)
    return files | {name: f"the content of {name}".encode() for name in others}


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Start hubs that the client library takes for the real one; its cache is a new folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    running = []

    def start(files, **options) -> HubServer:
        hub = HubServer(files, **options).__enter__()
        running.append(hub)
        point_at(monkeypatch, hub.url)
        return hub

    forget_sessions()
    yield start
    forget_sessions()
    for hub in running:
        hub.__exit__()


def point_at(monkeypatch, url):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # Before 1.0 the library copied the template into the file that uses it.
    file = huggingface_hub.file_download
    monkeypatch.setattr(file, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def forget_sessions():
    # Before 1.0 the library decides whether it is offline when it opens a session.
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()


def go_offline(monkeypatch, how="HF_HUB_OFFLINE"):
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        forget_sessions()
    if how == "no network":
        point_at(monkeypatch, "http://127.0.0.1:9")


def refusal(name=NAME, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve(name, **HERE, **options)
    return str(caught.value)


# --- local folders -------------------------------------------------------------------------------


def test_a_local_folder_is_returned_as_it_is(tmp_path, monkeypatch):
    # Whatever is in it: ``load`` and the tokenizers say what is missing.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    for name in (tmp_path, str(tmp_path), "owner/model", Path("owner/model")):
        assert resolve(name, **HERE) == Path(name)
        assert fetch_small_files(name) == Path(name)


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model", **HERE) == tmp_path / "model"


@pytest.mark.parametrize(
    "name", ["../x", "./x", "/no/such/folder", "~/no-such-folder", "a/b/c", "C:\\x", Path("x/y")]
)
def test_a_path_without_a_folder_is_no_hub_id(name, serve):
    hub = serve({})
    assert f"there is no folder {name}" in refusal(name)
    assert not hub.requests


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name(name):
    # An empty path would be the current folder.
    assert "hub id such as" in refusal(name)


def test_a_file_in_place_of_its_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    assert f"is a file; give the folder that holds it: {tmp_path}" in refusal(path)


def test_a_name_no_file_system_takes():
    assert "cannot be opened" in refusal("x" * 10_000)


# --- the hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("safetensors", {"model.safetensors"}),
        ("bin", {"pytorch_model.bin"}),
        (
            "sharded safetensors",
            {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
            | {"model.safetensors.index.json"},
        ),
        (
            "sharded bin",
            {f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)}
            | {"pytorch_model.bin.index.json"},
        ),
    ],
)
def test_only_what_is_needed_is_fetched(tmp_path, serve, layout, weights):
    hub = serve(repository(tmp_path, layout))
    folder = resolve(NAME, **HERE)
    assert {path.name for path in folder.iterdir()} == SMALL | weights
    assert sorted(hub.downloads) == sorted(SMALL | weights)
    assert load(folder, **HERE).config.vocab_size == 40


def test_safetensors_are_fetched_where_the_model_has_both(tmp_path, serve):
    files = repository(tmp_path, "sharded bin") | repository(tmp_path, "safetensors")
    hub = serve(files)
    resolve(NAME, **HERE)
    assert "model.safetensors" in hub.downloads
    assert not any(name.endswith(".bin") for name in hub.downloads)


def test_small_files_come_without_weights(tmp_path, serve):
    hub = serve(repository(tmp_path, "bin"))
    folder = fetch_small_files(NAME)
    assert {path.name for path in folder.iterdir()} == SMALL == set(hub.downloads)


def test_what_is_in_the_cache_is_not_fetched_again(tmp_path, serve):
    hub = serve(repository(tmp_path, "sharded bin"))
    folder = resolve(NAME, **HERE)
    hub.downloads.clear()
    assert resolve(NAME, **HERE) == folder
    assert not hub.downloads
    (folder / "pytorch_model-00002-of-00003.bin").resolve().unlink()
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    resolve(NAME, **HERE)
    assert hub.downloads == ["pytorch_model-00002-of-00003.bin"]


def test_a_cache_folder_of_ones_own(tmp_path, serve):
    serve(repository(tmp_path, "bin"))
    folder = resolve(NAME, cache_dir=tmp_path / "mine", **HERE)
    assert folder.is_relative_to(tmp_path / "mine")
    assert not (tmp_path / "cache").exists()


def test_a_revision(tmp_path, serve):
    serve(repository(tmp_path, "bin"))
    assert resolve(NAME, revision=COMMIT, **HERE).name == COMMIT
    message = refusal(revision="v9")
    assert "no such revision" in message
    assert "'v9'" in message


def test_a_model_that_does_not_fit_the_disk_is_refused_before_a_weight_is_fetched(
    tmp_path, serve, monkeypatch
):
    weights = "pytorch_model.bin"
    hub = serve(repository(tmp_path, "bin"), claimed_sizes={weights: 218_000_000_000})
    free = FreeBytes(host=10**12, disk=50 * 10**9)
    file = sys.modules["moe_mt.checkpoints.resolve"]
    monkeypatch.setattr(file, "measure_free_bytes", lambda *_: free)
    with pytest.raises(PlacementError, match=r"owner/model does not fit(.|\n)*218\.0 GB +50\.0 GB"):
        resolve(NAME, **HERE)
    assert "config.json" in hub.downloads
    assert weights not in hub.downloads


def test_the_54b_is_refused_before_a_weight_is_fetched(tmp_path, serve, monkeypatch):
    # The real configuration, on a host with 64 GB: only the small files may be asked for.
    files = repository(tmp_path, "sharded bin")
    files["config.json"] = json.dumps(NLLB_MOE_54B).encode()
    hub = serve(files)
    file = sys.modules["moe_mt.checkpoints.resolve"]
    monkeypatch.setattr(file, "measure_free_bytes", lambda *_: FreeBytes(host=64 * 10**9))
    with pytest.raises(PlacementError, match=r"111\.6 GB +64\.0 GB"):
        resolve(NAME, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert set(hub.downloads) == SMALL | {"pytorch_model.bin.index.json"}


def test_only_what_is_still_to_be_fetched_is_compared_with_the_disk(tmp_path, serve, monkeypatch):
    # After an interrupted download, the shards that have arrived need no room again.
    hub = serve(repository(tmp_path, "sharded bin"))
    folder = resolve(NAME, **HERE)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    hub.claimed_sizes = dict.fromkeys(hub.files, 10**9)
    free = FreeBytes(host=10**12, disk=1_500_000_000)
    file = sys.modules["moe_mt.checkpoints.resolve"]
    monkeypatch.setattr(file, "measure_free_bytes", lambda *_: free)
    resolve(NAME, **HERE)


def test_no_such_model(serve):
    serve({})
    message = refusal("owner/modle")
    assert "no such model" in message
    assert "check the spelling" in message


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "GatedRepo", "ask at https://huggingface.co/owner/model"),
        (401, "GatedRepo", "ask at https://huggingface.co/owner/model"),
        (401, "RepoNotFound", "hf auth login"),  # what the hub says of private models
        (403, "", "hf auth login"),  # a token without the right to read
    ],
)
def test_a_model_one_may_not_read(serve, status, code, expected):
    serve({}, refusal=(status, code))
    message = refusal()
    assert message.startswith("owner/model was asked for")
    assert expected in message


@pytest.mark.parametrize("name", ["owner/mo del", "-x", "owner/model.git", "a--b", "x\ny"])
def test_a_name_that_is_no_hub_id(name):
    assert "neither a folder here nor a hub id" in refusal(name)


def test_a_model_without_a_configuration(tmp_path, serve):
    files = repository(tmp_path, "bin")
    del files["config.json"]
    serve(files)
    assert "hf download owner/model config.json" in refusal()


def test_a_model_without_weights_that_can_be_read(tmp_path, serve):
    files = repository(tmp_path, "bin")
    del files["pytorch_model.bin"]
    serve(files)
    message = refusal()
    assert "no weights that can be read here" in message
    assert "rust_model.ot" in message


def test_an_index_that_names_a_file_the_model_lacks(tmp_path, serve):
    files = repository(tmp_path, "sharded bin")
    del files["pytorch_model-00003-of-00003.bin"]
    hub = serve(files)
    assert "has no pytorch_model-00003-of-00003.bin" in refusal()
    assert not any(name.endswith(".bin") for name in hub.downloads)


def test_an_index_on_the_hub_that_points_outside(tmp_path, serve):
    files = repository(tmp_path, "sharded bin")
    index = "pytorch_model.bin.index.json"
    files[index] = json.dumps({"weight_map": {"shared.weight": "../../../x.bin"}}).encode()
    serve(files)
    assert "points outside its folder" in refusal()


# --- without the hub -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["safetensors", "sharded bin"])
@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only", "no network"])
def test_a_model_in_the_cache_needs_no_hub(tmp_path, serve, monkeypatch, layout, how):
    hub = serve(repository(tmp_path, layout))
    folder = resolve(NAME, **HERE)
    hub.requests.clear()
    go_offline(monkeypatch, how)
    assert resolve(NAME, local_files_only=how == "local_files_only", **HERE) == folder
    assert not hub.requests


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only", "no network"])
def test_a_model_that_is_not_in_the_cache(serve, monkeypatch, how):
    hub = serve({})
    go_offline(monkeypatch, how)
    message = refusal(local_files_only=how == "local_files_only", revision="v1", cache_dir="my dir")
    assert "config.json" in message
    assert "hf download owner/model --revision v1 --cache-dir 'my dir'" in message
    assert how in message or how == "no network"
    assert not hub.requests


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only", "no network"])
def test_a_shard_that_is_not_in_the_cache(tmp_path, serve, monkeypatch, how):
    serve(repository(tmp_path, "sharded bin"))
    folder = resolve(NAME, **HERE)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    go_offline(monkeypatch, how)
    message = refusal(local_files_only=how == "local_files_only")
    assert "hf download owner/model pytorch_model-00002-of-00003.bin" in message


def test_small_files_in_the_cache_and_no_weights(tmp_path, serve, monkeypatch):
    # Nothing here tells which weight files the model has.
    serve(repository(tmp_path, "bin"))
    fetch_small_files(NAME)
    go_offline(monkeypatch)
    message = refusal()
    assert "the file of its weights" in message
    assert message.endswith("hf download owner/model")


def test_a_cache_made_by_hand_is_read_in_a_process_that_is_offline(tmp_path):
    # The environment's variables as a user sets them; no fetching came before.
    home = tmp_path / "home"
    folder = home / "hub" / "models--owner--model" / "snapshots" / COMMIT
    write_folder(folder, DENSE, random_tensors(DENSE))
    (home / "hub" / "models--owner--model" / "refs").mkdir()
    (home / "hub" / "models--owner--model" / "refs" / "main").write_text(COMMIT)
    code = (
        "import torch; from moe_mt.checkpoints import resolve\n"
        f"print(resolve('{NAME}', device=torch.device('cpu'), dtype=torch.float32))\n"
        "try: resolve('owner/other', device=torch.device('cpu'), dtype=torch.float32)\n"
        "except OSError as error: print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, message = done.stdout.strip().split("\n")
    assert found == str(folder)
    assert "hf download owner/other" in message


def test_a_disk_that_fills_while_fetching_is_named(tmp_path, serve, monkeypatch):
    # Another program may write while 218 GB arrive.
    serve(repository(tmp_path, "bin"))

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.hub, "snapshot_download", full)
    assert "No space left on device" in refusal()
    assert shutil.disk_usage(tmp_path).free > 0


def test_a_local_model_called_tiny_is_not_confused_with_that_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = fetch_small_files("tiny")
    (tmp_path / "tiny").mkdir()
    # A folder without a model in it is none.
    assert fetch_small_files("tiny") == packaged
    (tmp_path / "tiny" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"\./tiny"):
        fetch_small_files("tiny")
    for local in ("./tiny", Path("tiny"), str(tmp_path / "tiny")):
        assert fetch_small_files(local).resolve() == tmp_path / "tiny"

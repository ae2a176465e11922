"""What is saved is the published layout: read back here, by safetensors, and by transformers."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from moe_mt.checkpoints import load, read_config, save
from moe_mt.errors import CheckpointError
from moe_mt.models import FAMILIES, Seq2SeqTransformer
from tests.checkpoints.published import CONFIGS, DENSE, MOE, random_tensors, write_folder


def model_of(published, seed=0):
    config = FAMILIES[published["model_type"]].config_from_published(published)
    torch.manual_seed(seed)
    model = Seq2SeqTransformer(config)
    for parameter in model.parameters():
        # Biases and norms too, or a mix-up among them would not show.
        torch.nn.init.normal_(parameter)
    return model.eval()


def assert_same(one, other):
    expected, found = dict(one.named_parameters()), dict(other.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 5000, 1], ids=["single", "few", "each"])
def test_what_is_saved_loads_again(tmp_path, family, max_shard_bytes):
    model = model_of(CONFIGS[family])
    save(model, tmp_path / "new" / "model", max_shard_bytes=max_shard_bytes)
    again = load(tmp_path / "new" / "model", device="cpu", dtype=torch.float32)
    assert again.config == model.config
    assert_same(model, again)


@pytest.mark.parametrize("family", CONFIGS)
def test_names_and_values_are_the_published_ones(tmp_path, family):
    # From published tensors to a model and back, by the library that defines the format.
    config = CONFIGS[family]
    tensors = random_tensors(config)
    model = load(write_folder(tmp_path / "in", config, tensors), device="cpu", dtype=torch.float32)
    save(model, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    tied = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    expected = {f"model.{key}": value for key, value in tensors.items() if key not in tied}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_shards_hold_at_most_what_was_asked_and_the_index_says_where(tmp_path):
    save(model_of(MOE), tmp_path, max_shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(names)
    assert count > 2
    assert names == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    total = 0
    for name in names:
        part = load_file(tmp_path / name)
        assert sum(tensor.nbytes for tensor in part.values()) <= 4000
        assert all(index["weight_map"][key] == name for key in part)
        total += sum(tensor.nbytes for tensor in part.values())
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(tmp_path, dtype):
    model = model_of(MOE)
    save(model, tmp_path, dtype=dtype)
    again = load(tmp_path, device="cpu", dtype=dtype)
    for name, parameter in again.named_parameters():
        kept = torch.float32 if ".router." in name else dtype
        assert torch.equal(parameter, model.get_parameter(name).to(kept))
    stored = {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()}
    assert stored == {dtype, torch.float32}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_a_loaded_half_precision_model_is_saved_as_it_is(tmp_path):
    save(model_of(MOE), tmp_path / "one")
    model = load(tmp_path / "one", device="cpu", dtype=torch.bfloat16)
    save(model, tmp_path / "two")
    assert_same(model, load(tmp_path / "two", device="cpu", dtype=torch.bfloat16))


def test_config_json(tmp_path):
    save(model_of(MOE), tmp_path, extra_config={"moe_mt": {"languages": ["eng_Latn"]}})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "nllb-moe"
    assert written["architectures"] == ["NllbMoeForConditionalGeneration"]
    assert written["moe_mt"] == {"languages": ["eng_Latn"]}
    assert written["num_experts"] == 3
    assert read_config(tmp_path)[1] == model_of(MOE).config


@pytest.mark.parametrize(("before", "after"), [(1, 10**9), (10**9, 1), (1, 3000)])
def test_weights_of_an_earlier_save_do_not_stay(tmp_path, before, after):
    # A single file would be read in place of newer shards; old shards would fill the disk.
    save(model_of(DENSE, seed=1), tmp_path, max_shard_bytes=before)
    (tmp_path / "sentencepiece.bpe.model").touch()
    model = model_of(DENSE, seed=2)
    save(model, tmp_path, max_shard_bytes=after)
    assert_same(model, load(tmp_path, device="cpu", dtype=torch.float32))
    save(model, tmp_path / "fresh", max_shard_bytes=after)
    fresh = {path.name for path in (tmp_path / "fresh").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == fresh | {
        "fresh",
        "sentencepiece.bpe.model",
    }


def test_headers_leave_the_tensors_aligned(tmp_path):
    # Readers map the file; the format asks for data that begins at a multiple of eight bytes.
    for vocab in range(30, 40):
        save(model_of(DENSE | {"vocab_size": vocab}), tmp_path)
        with (tmp_path / "model.safetensors").open("rb") as file:
            assert int.from_bytes(file.read(8), "little") % 8 == 0


def test_a_disk_that_fills_while_writing_leaves_the_folder_as_it_was(tmp_path):
    # A limit on the size of files makes real writes fail, in a process of its own.
    save(model_of(DENSE), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code = (
        "import resource, sys, torch\n"
        "from moe_mt.checkpoints import load, save\n"
        "model = load(sys.argv[1], device='cpu', dtype=torch.float32)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try: save(model, sys.argv[1], max_shard_bytes=2500)\n"
        "except OSError as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"CheckpointError the model cannot be written to {tmp_path}")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 3000


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(model_of(DENSE), tmp_path / "file" / "model")


@pytest.mark.peers
@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000], ids=["single", "sharded"])
@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_reads_what_is_saved(tmp_path, family, max_shard_bytes):
    import transformers

    assert transformers.__version__.startswith("4.57")
    model = model_of(CONFIGS[family])
    save(model, tmp_path, max_shard_bytes=max_shard_bytes)
    theirs, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    source = torch.tensor([[5, 6, 7, 8, 2], [9, 3, 2, 1, 1]])
    mask = source != 1
    target = torch.tensor([[2, 10, 11], [2, 12, 13]])
    with torch.no_grad():
        expected = theirs.eval()(
            input_ids=source, attention_mask=mask.long(), decoder_input_ids=target
        ).logits
        found = model(source, target, source_mask=mask).logits
    assert torch.linalg.norm(found - expected) <= 1e-5 * torch.linalg.norm(expected)


@pytest.mark.peers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_what_transformers_saves_is_read(tmp_path, family, dtype):
    import transformers

    published = CONFIGS[family]
    theirs = transformers.AutoModelForSeq2SeqLM.from_config(
        transformers.AutoConfig.for_model(**published)
    ).to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, device="cpu", dtype=dtype)
    save(ours, tmp_path / "again")
    expected = load_file(tmp_path / "model.safetensors")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].to(dtype), expected[key]) for key in expected)

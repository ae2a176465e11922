"""The loader reads every layout that published files and fine-tunes have (spec Appendix D.7)."""

import pytest
import torch

from moe_mt.checkpoints import load
from tests.checkpoints.published import (
    CONFIGS,
    LAYOUTS,
    TIED,
    expected_parameters,
    random_tensors,
    write_folder,
)

# Everything, or one of the four names alone: safetensors files of fine-tunes hold only
# shared.weight or only lm_head.weight; the 54B holds all but lm_head.weight.
TIED_SUBSETS = {"all": TIED, "base model": TIED[:3]} | {name: (name,) for name in TIED}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", TIED_SUBSETS)
@pytest.mark.parametrize("prefix", [False, True], ids=["bare", "prefix"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(tmp_path, layout, prefix, tied, family):
    config = CONFIGS[family]
    tensors = random_tensors(config)
    expected = expected_parameters(config, tensors)
    kept = {k: v for k, v in tensors.items() if k not in TIED or k in TIED_SUBSETS[tied]}
    folder = write_folder(tmp_path / "model", config, kept, layout=layout, prefix=prefix)
    found = dict(load(folder, device="cpu", dtype=torch.float32).named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("spelling", ["nllb-moe", "nllb_moe"])
def test_both_spellings_of_the_moe_model_type_load(tmp_path, spelling):
    # The first published revision of the 54B has the underscore.
    config = CONFIGS["moe"] | {"model_type": spelling}
    folder = write_folder(tmp_path / "model", config, random_tensors(config))
    assert load(folder, device="cpu", dtype=torch.float32).config.family == "nllb_moe"


@pytest.mark.parametrize(
    "key",
    [
        "model.encoder.embed_positions.weights",  # a parameter before transformers 4.16
        "decoder.embed_positions.weights",
        "encoder.version",  # fairseq's format marks
        "model.decoder.version",
        "decoder.output_projection.weight",
        "encoder.embed_positions._float_tensor",
        "final_logits_bias",  # first revisions of the M2M100 repositories
    ],
)
def test_old_keys_that_hold_nothing_are_ignored(tmp_path, key):
    config = CONFIGS["dense"]
    # A value no weight may have, so that reading it would be noticed.
    tensors = random_tensors(config) | {key: torch.full((3,), torch.nan)}
    folder = write_folder(tmp_path / "model", config, tensors, layout="bin")
    assert "embedding.weight" in dict(
        load(folder, device="cpu", dtype=torch.float32).named_parameters()
    )


def test_safetensors_are_preferred_to_bin(tmp_path):
    # A repository after conversion holds both; the pickle need not be opened then.
    config = CONFIGS["dense"]
    folder = write_folder(tmp_path / "model", config, random_tensors(config), layout="bin")
    (folder / "pytorch_model.bin").write_bytes(b"not opened")
    write_folder(folder, config, random_tensors(config))
    load(folder, device="cpu", dtype=torch.float32)


def test_a_whole_layout_is_taken_where_a_preferred_one_is_not_all_there(tmp_path):
    # A hub cache holds the .safetensors index of a model whose .bin alone was downloaded.
    config = CONFIGS["dense"]
    tensors = random_tensors(config)
    folder = write_folder(tmp_path / "model", config, tensors, layout="sharded safetensors")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    write_folder(folder, config, tensors, layout="bin")
    load(folder, device="cpu", dtype=torch.float32)


def test_bin_files_older_than_the_zip_format_are_read(tmp_path):
    config = CONFIGS["dense"]
    tensors = random_tensors(config)
    folder = write_folder(tmp_path / "model", config, tensors, layout="bin")
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    model = load(folder, device="cpu", dtype=torch.float32)
    assert torch.equal(model.embedding.weight, tensors["shared.weight"])


def test_tied_names_that_share_memory_in_a_pickle_are_read(tmp_path):
    # As torch.save writes a model whose four names are one parameter; others are transposed views.
    config = CONFIGS["dense"]
    tensors = random_tensors(config)
    tensors |= dict.fromkeys(TIED, tensors["shared.weight"])
    query = "encoder.layers.0.self_attn.q_proj.weight"
    tensors[query] = tensors[query].t()
    folder = write_folder(tmp_path / "model", config, tensors, layout="bin")
    model = load(folder, device="cpu", dtype=torch.float32)
    assert torch.equal(model.embedding.weight, tensors["shared.weight"])
    parameter = model.get_parameter("encoder.layers.0.self_attention.q_proj.weight")
    assert torch.equal(parameter, tensors[query])
    assert parameter.is_contiguous()


def test_a_shard_that_is_a_link_out_of_the_folder_is_read(tmp_path):
    # Every file of a hub cache is a link to ../../blobs.
    config = CONFIGS["dense"]
    folder = write_folder(
        tmp_path / "model", config, random_tensors(config), layout="sharded safetensors"
    )
    for i, path in enumerate(sorted(folder.glob("*.safetensors"))):
        path.rename(tmp_path / f"blob{i}")
        path.symlink_to(f"../blob{i}")
    load(folder, device="cpu", dtype=torch.float32)

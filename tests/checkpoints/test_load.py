"""What ``load`` gives, and what it refuses."""

import re
from pathlib import Path

import pytest
import torch

from moe_mt import checkpoints
from moe_mt.checkpoints import load, model_bytes, read_config
from moe_mt.checkpoints.fill import Filling
from moe_mt.errors import CheckpointError, ConfigError, PlacementError
from moe_mt.models import FAMILIES
from tests.checkpoints.published import (
    DENSE,
    MOE,
    TIED,
    expected_parameters,
    random_tensors,
    write_folder,
)

CPU = torch.device("cpu")
QUERY = "encoder.layers.0.self_attn.q_proj.weight"


def folder_with(tmp_path: Path, changes=None, drop=(), config=DENSE, **layout) -> Path:
    tensors = random_tensors(config) | (changes or {})
    kept = {key: tensor for key, tensor in tensors.items() if key not in drop}
    return write_folder(tmp_path / "model", config, kept, **layout)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["safetensors", "sharded bin"])
def test_weights_are_rounded_once_and_routers_stay_in_float32(tmp_path, layout, dtype, stored):
    tensors = {key: tensor.to(stored) for key, tensor in random_tensors(MOE).items()}
    folder = write_folder(tmp_path / "model", MOE, tensors, layout=layout)
    found = dict(load(folder, device="cpu", dtype=dtype).named_parameters())
    for name, tensor in expected_parameters(MOE, tensors).items():
        kept = torch.float32 if ".router.classifier." in name else dtype
        assert found[name].dtype == kept, name
        assert torch.equal(found[name], tensor.to(kept)), name


def test_the_model_is_ready_to_use_and_to_train(tmp_path):
    model = load(folder_with(tmp_path, config=MOE), device="cpu", dtype=torch.float32)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    tokens = torch.tensor([[5, 6, 7, 2]])
    assert model(tokens, tokens).logits.isfinite().all()


def test_the_position_table_is_computed_at_the_dtype_of_the_model(tmp_path):
    folder = folder_with(tmp_path)
    exact = load(folder, device="cpu", dtype=torch.float32).positions.table
    assert exact[2, 0] == pytest.approx(0.9092974)  # sin 2, the first position of a token
    rounded = load(folder, device="cpu", dtype=torch.bfloat16).positions.table
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_progress_counts_the_bytes_of_the_model(tmp_path, dtype):
    calls = []
    folder = folder_with(tmp_path, config=MOE, layout="sharded safetensors")
    load(folder, device="cpu", dtype=dtype, on_progress=lambda *call: calls.append(call))
    done, totals = zip(*calls, strict=True)
    _, config = read_config(folder)
    assert set(totals) == {model_bytes(config, dtype)}
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1]


def test_a_large_tensor_is_copied_and_checked_past_its_first_chunk(tmp_path, monkeypatch):
    # Chunks of one row, so that small tensors take the way of large ones.
    monkeypatch.setattr(checkpoints.fill, "CHUNK_ELEMENTS", 1)
    tensors = random_tensors(MOE)
    folder = write_folder(tmp_path / "model", MOE, tensors)
    found = dict(load(folder, device="cpu", dtype=torch.float32).named_parameters())
    for name, tensor in expected_parameters(MOE, tensors).items():
        assert torch.equal(found[name], tensor), name
    tensors["lm_head.weight"][-1, -1] += 1
    with pytest.raises(CheckpointError, match="differ"):
        load(write_folder(tmp_path / "other", MOE, tensors), device="cpu", dtype=torch.float32)


def test_chunks_are_small_and_leave_nothing_out(monkeypatch):
    # What is compared or checked at a time must not be a second copy of a 2 GB embedding.
    monkeypatch.setattr(checkpoints.fill, "CHUNK_ELEMENTS", 50)
    tensor = torch.arange(40 * 8).view(40, 8)
    chunks = checkpoints.fill._chunks(tensor)
    assert max(chunk.numel() for chunk in chunks) == 48
    assert torch.equal(torch.cat(chunks), tensor)


def test_a_missing_tensor_is_named(tmp_path):
    folder = folder_with(tmp_path, drop=[QUERY])
    with pytest.raises(CheckpointError, match=f"lacks 1 of the model's tensors: {QUERY}"):
        load(folder, device="cpu", dtype=torch.float32)


def test_a_missing_expert_is_named(tmp_path):
    # Its slice of the stacked parameter would otherwise hold whatever memory held.
    key = "encoder.layers.1.ffn.experts.expert_2.fc1.weight"
    with pytest.raises(CheckpointError, match=key):
        load(folder_with(tmp_path, drop=[key], config=MOE), device="cpu", dtype=torch.float32)


def test_a_checkpoint_without_any_of_the_tied_names_lacks_the_embedding(tmp_path):
    with pytest.raises(CheckpointError, match=r"lacks 1 .*shared\.weight"):
        load(folder_with(tmp_path, drop=TIED), device="cpu", dtype=torch.float32)


def test_unexpected_tensors_are_listed_up_to_five(tmp_path):
    extra = {f"encoder.layers.0.adapter_{i}.weight": torch.ones(2) for i in range(7)}
    with pytest.raises(CheckpointError, match=r"7 tensors .*adapter_4.weight and 2 more"):
        load(folder_with(tmp_path, extra), device="cpu", dtype=torch.float32)


def test_names_are_compared_before_a_tensor_is_read(tmp_path):
    # A wrong config.json beside 218 GB of weights must not take their reading to be noticed.
    calls = []
    folder = folder_with(tmp_path, drop=[QUERY], layout="sharded bin")
    with pytest.raises(CheckpointError, match="lacks"):
        load(folder, device="cpu", dtype=torch.float32, on_progress=lambda *c: calls.append(c))
    assert not calls


def test_a_tensor_that_the_index_does_not_name_is_found_in_its_shard(tmp_path):
    folder = folder_with(tmp_path, {"encoder.adapter.weight": torch.ones(2)}, layout="sharded bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(re.sub(r'"encoder\.adapter\.weight": "[^"]+", ', "", index.read_text()))
    assert "adapter" not in index.read_text()
    with pytest.raises(CheckpointError, match=r"encoder\.adapter\.weight"):
        load(folder, device="cpu", dtype=torch.float32)


def test_dense_weights_with_the_config_of_another_model_are_refused(tmp_path):
    folder = write_folder(tmp_path / "model", MOE, random_tensors(DENSE))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder, device="cpu", dtype=torch.float32)


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path):
    folder = folder_with(tmp_path, {QUERY: torch.ones(8, 9)})
    with pytest.raises(CheckpointError, match=rf"{folder}: {QUERY} has shape \(8, 9\) .*\(8, 8\)"):
        load(folder, device="cpu", dtype=torch.float32)


def test_a_scalar_in_place_of_a_tensor_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"shape \(\)"):
        load(folder_with(tmp_path, {QUERY: torch.tensor(1.0)}), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, layout, value):
    weight = torch.ones(8, 8)
    weight[3, 4] = value
    with pytest.raises(CheckpointError, match=f"{QUERY} holds {value}"):
        load(
            folder_with(tmp_path, {QUERY: weight}, layout=layout), device="cpu", dtype=torch.float32
        )


def test_a_value_beyond_float16_is_named_when_float16_is_asked_for(tmp_path):
    # Finite in the file, infinite in the model: translations would be noise without a word.
    weight = torch.ones(8, 8)
    weight[3, 4] = -70000.0
    folder = folder_with(tmp_path, {QUERY: weight})
    with pytest.raises(CheckpointError, match=rf"{QUERY} holds -70000.*float16.*bfloat16"):
        load(folder, device="cpu", dtype=torch.float16)
    assert load(folder, device="cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_quantised_or_integer_weights_are_refused(tmp_path, dtype):
    folder = folder_with(tmp_path, {QUERY: torch.ones(8, 8).to(dtype)}, layout="bin")
    with pytest.raises(CheckpointError, match=f"{QUERY} is stored as {dtype}"):
        load(folder, device="cpu", dtype=torch.float32)


def test_sparse_weights_are_refused(tmp_path):
    folder = folder_with(tmp_path, {QUERY: torch.eye(8).to_sparse()}, layout="bin")
    with pytest.raises(CheckpointError, match="sparse"):
        load(folder, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("name", TIED[1:])
def test_tied_names_that_differ_are_refused(tmp_path, name):
    # Which of them is right cannot be known; the last one winning would be a guess.
    changed = random_tensors(DENSE)["shared.weight"]
    changed[39, 7] += 1
    with pytest.raises(CheckpointError, match=r"weight and .*weight differ"):
        load(folder_with(tmp_path, {name: changed}), device="cpu", dtype=torch.float32)


def test_one_tensor_with_and_without_the_prefix_must_agree(tmp_path):
    folder = folder_with(tmp_path, {f"model.{QUERY}": torch.ones(8, 8)})
    with pytest.raises(CheckpointError, match="differ"):
        load(folder, device="cpu", dtype=torch.float32)


def test_a_model_with_a_gap_is_never_handed_out():
    # The last guard: whatever came before, unfilled memory must not become a model.
    family = FAMILIES["m2m_100"]
    filling = Filling(family, family.config_from_published(DENSE), CPU, torch.float32)
    tensors = random_tensors(DENSE)
    for key in tensors.keys() - {QUERY}:
        filling.place(key, tensors[key])
    with pytest.raises(CheckpointError, match=QUERY):
        filling.finish()
    filling.place(QUERY, tensors[QUERY])
    assert torch.equal(filling.finish().embedding.weight, tensors["shared.weight"])


def test_memory_that_runs_out_is_a_placement_error(tmp_path, monkeypatch):
    # Another program may take what was free when it was measured.
    real = torch.empty

    def empty(*shape, device=None, **options):
        if device == CPU:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(*shape, device=device, **options)

    folder = folder_with(tmp_path)
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(PlacementError, match="no room on cpu"):
        load(folder, device="cpu", dtype=torch.float32)


def test_an_integer_dtype_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="int8"):
        load(folder_with(tmp_path), device="cpu", dtype=torch.int8)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load(tmp_path / "nowhere", device="cpu", dtype=torch.float32)

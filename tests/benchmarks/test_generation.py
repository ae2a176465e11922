"""Random checkpoints, their conversion, the process of a system, and taking turns."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.generation import checkpoints
from benchmarks.generation.checkpoints import random_checkpoint, random_tensors
from benchmarks.generation.ctranslate2_model import fill_spec
from benchmarks.generation.experts_hit import count_experts
from benchmarks.generation.process import Answer, Worker
from benchmarks.generation.shapes import (
    MODELS,
    NEW_TOKENS,
    SYSTEMS,
    TOY_DENSE,
    TOY_MOE,
    Decoding,
    GeneratedModel,
    draw_sources,
)
from benchmarks.generation.turns import Measured, measure_in_turns, speedup
from benchmarks.graphs import PeerUnavailable
from moe_mt.checkpoints import load

ONE, FOUR = Decoding(1, 1), Decoding(1, 4)
OURS, THEIRS = SYSTEMS["ours-float32"], SYSTEMS["ctranslate2-float32"]


def test_the_models_have_the_shapes_of_the_targets():
    assert [model.config.vocab_size for model in MODELS.values()] == [128_112, 256_206, 32_000]
    for name in ("m2m100-418m", "nllb-600m"):
        config = MODELS[name].config
        assert (config.encoder_layers, config.decoder_layers) == (12, 12)
        assert (config.d_model, config.decoder_ffn_dim, config.decoder_heads) == (1024, 4096, 16)
        assert [str(size) for size in MODELS[name].decodings] == ["1x1", "1x4", "8x1", "32x1"]
    mixture = MODELS["moe-128-experts"]
    assert [mixture.config.decoder_layer_is_sparse(i) for i in range(8)] == [False, True] * 4
    assert [str(size) for size in mixture.decodings] == ["1x1", "8x4"]
    assert "ctranslate2-float32" not in mixture.systems


def test_sources_are_the_same_for_every_system_and_end_with_the_end_mark():
    sources = draw_sources(TOY_DENSE, 3)
    assert sources == draw_sources(TOY_DENSE, 3)
    assert {len(source) for source in sources} == {32}
    assert {source[-1] for source in sources} == {TOY_DENSE.eos_id}
    assert min(min(source[:-1]) for source in sources) > TOY_DENSE.eos_id


@pytest.mark.parametrize("config", [TOY_DENSE, TOY_MOE], ids=["dense", "mixture"])
def test_a_random_checkpoint_is_in_the_published_layout_and_always_the_same(
    tmp_path, config, monkeypatch
):
    monkeypatch.setattr(checkpoints, "MOST_SHARD_BYTES", 2**18)
    folder = random_checkpoint(config, "toy", tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = load(folder, device="cpu", dtype=torch.float32)
    again = dict(random_tensors(config))
    assert torch.equal(model.embedding.weight, again["model.shared.weight"])
    assert not model.embedding.weight[config.pad_id].any()
    assert random_checkpoint(config, "toy", tmp_path) == folder


def test_another_configuration_is_another_checkpoint(tmp_path):
    folders = {random_checkpoint(config, "toy", tmp_path) for config in (TOY_DENSE, TOY_MOE)}
    assert len(folders) == 2


def test_a_checkpoint_that_was_not_finished_is_written_anew(tmp_path):
    folder = random_checkpoint(TOY_DENSE, "toy", tmp_path)
    folder.rename(folder.with_suffix(".unfinished"))
    assert load_file(next(random_checkpoint(TOY_DENSE, "toy", tmp_path).glob("*.safetensors")))


def test_experts_are_counted_in_every_call_of_a_sparse_layer(tmp_path):
    folder = random_checkpoint(TOY_MOE, "toy", tmp_path)
    model = load(folder, device="cpu", dtype=torch.float32)
    hit = count_experts(model, ONE)
    assert hit["decoder"] == 2  # one token, top-2
    assert 2 < hit["encoder"] <= 8


def layer_spec(*, cross):
    def linear():
        return SimpleNamespace(weight=None, bias=None)

    def norm():
        return SimpleNamespace(gamma=None, beta=None)

    def attention(count):
        return SimpleNamespace(layer_norm=norm(), linear=[linear() for _ in range(count)])

    layer = SimpleNamespace(
        self_attention=attention(2),
        ffn=SimpleNamespace(layer_norm=norm(), linear_0=linear(), linear_1=linear()),
    )
    if cross:
        layer.attention = attention(3)
    return layer


def empty_spec():
    """Return what ``TransformerSpec`` of CTranslate2 has, which is not installed here."""

    def side(embeddings, *, cross):
        return SimpleNamespace(
            embeddings=embeddings,
            position_encodings=SimpleNamespace(encodings=None),
            layer_norm=SimpleNamespace(gamma=None, beta=None),
            layer=[layer_spec(cross=cross) for _ in range(2)],
        )

    embedding = SimpleNamespace(weight=None)
    decoder = side(embedding, cross=True)
    decoder.projection = SimpleNamespace(weight=None)
    return SimpleNamespace(encoder=side([embedding], cross=False), decoder=decoder)


def test_every_published_tensor_finds_its_place_in_ctranslate2():
    tensors = {key.removeprefix("model."): value for key, value in random_tensors(TOY_DENSE)}
    spec = empty_spec()
    fill_spec(spec, TOY_DENSE, tensors)
    layer = spec.decoder.layer[1]
    prefix = "decoder.layers.1"
    parts = [tensors[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(layer.self_attention.linear[0].weight, torch.cat(parts))
    query, pairs, out = layer.attention.linear
    assert torch.equal(query.weight, tensors[f"{prefix}.encoder_attn.q_proj.weight"])
    parts = [tensors[f"{prefix}.encoder_attn.{name}_proj.bias"] for name in "kv"]
    assert torch.equal(pairs.bias, torch.cat(parts))
    assert torch.equal(out.weight, tensors[f"{prefix}.encoder_attn.out_proj.weight"])
    assert torch.equal(layer.ffn.linear_1.weight, tensors[f"{prefix}.fc2.weight"])
    assert torch.equal(layer.ffn.layer_norm.beta, tensors[f"{prefix}.final_layer_norm.bias"])
    assert torch.equal(spec.encoder.layer_norm.gamma, tensors["encoder.layer_norm.weight"])
    assert spec.decoder.projection.weight is tensors["shared.weight"]
    assert spec.encoder.scale_embeddings == 8
    # The first token stands at the first position behind the padding's.
    assert spec.encoder.position_encodings.encodings[0, 32:].tolist() == pytest.approx(
        torch.cos(2 * torch.exp(torch.arange(32) * -(torch.tensor(10000).log() / 31))).tolist(),
        abs=1e-6,
    )


def test_every_variable_of_ctranslate2_is_filled():
    tensors = {key.removeprefix("model."): value for key, value in random_tensors(TOY_DENSE)}
    spec = empty_spec()
    fill_spec(spec, TOY_DENSE, tensors)

    def leaves(node):
        if isinstance(node, SimpleNamespace):
            node = list(vars(node).values())
        return [leaf for one in node for leaf in leaves(one)] if isinstance(node, list) else [node]

    assert not [leaf for leaf in leaves(spec) if leaf is None]


def test_a_worker_loads_and_generates_in_a_process_of_its_own(tmp_path):
    folder = random_checkpoint(TOY_DENSE, "toy", tmp_path)
    with Worker("moe_mt", "float32", folder, 1) as worker:
        assert worker.load_s > 0
        loaded = worker.peak_bytes
        assert loaded > 50e6  # an interpreter with PyTorch
        answer = worker.generate(draw_sources(TOY_DENSE, 2), 1, NEW_TOKENS, watch=True)
        assert worker.peak_bytes >= loaded
    assert [len(tokens) for tokens in answer.tokens] == [NEW_TOKENS] * 2


def test_a_worker_that_ends_says_why(tmp_path):
    with pytest.raises(PeerUnavailable, match=r"moe_mt in float32 ended with 1: .*config\.json"):
        Worker("moe_mt", "float32", tmp_path, 1)


class FakeWorker:
    """Answers at once, and writes down who was asked."""

    def __init__(self, system, log, seconds):
        self.name, self.log, self.seconds = system.name, log, seconds
        self.load_s, self.peak_bytes = 2.0, 100
        log.append(f"start {self.name}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.log.append(f"stop {self.name}")

    def generate(self, sources, beams, new_tokens, *, watch=False):
        self.log.append(f"{'watch' if watch else 'time'} {self.name}")
        self.peak_bytes += 50 * watch
        return Answer(self.seconds, [[5] * new_tokens] * len(sources))


def toy_model(**options):
    return GeneratedModel(
        name="toy",
        config=TOY_DENSE,
        decodings=(ONE, FOUR),
        systems=tuple(SYSTEMS),
        rounds={ONE: 2, FOUR: 1},
        **options,
    )


def test_systems_take_turns_and_another_one_goes_first_in_every_round():
    log = []
    seconds = {OURS.name: 1.0, THEIRS.name: 1.5}
    told = []
    found = measure_in_turns(
        toy_model(),
        {ONE: [OURS, THEIRS]},
        lambda system: FakeWorker(system, log, seconds[system.name]),
        pause=0,
        tell=told.append,
    )
    ours, theirs = OURS.name, THEIRS.name
    assert log[:2] == [f"start {ours}", f"start {theirs}"]
    assert log[2:4] == [f"watch {ours}", f"watch {theirs}"]
    assert log[4:8] == [f"time {ours}", f"time {theirs}", f"time {theirs}", f"time {ours}"]
    mine, other = found[ONE, ours], found[ONE, theirs]
    assert speedup(mine, other) == [1.5, 1.5]
    assert mine.figures() == {"load_s": 2.0, "first_s": 1.0, "peak_anonymous_bytes": 150}
    assert [line.partition(" (")[0] for line in told] == [
        f"toy 1x1 {ours}: 32 tokens/s",
        f"toy 1x1 {theirs}: 21.33 tokens/s",
    ]


def test_large_models_are_held_one_at_a_time():
    log = []
    found = measure_in_turns(
        toy_model(lives=2),
        {ONE: [OURS, THEIRS], FOUR: [OURS]},
        lambda system: FakeWorker(system, log, 1.0),
        pause=0,
    )
    lives = [line for line in log if line.startswith(("start", "stop"))]
    turn = [f"{what} {name}" for name in (OURS.name, THEIRS.name) for what in ("start", "stop")]
    assert lives == turn * 2
    assert len(found[ONE, OURS.name].seconds) == 4
    assert len(found[FOUR, OURS.name].load_s) == 2


def test_a_system_that_does_not_start_leaves_its_reason_and_the_others_run():
    def start(system):
        if system is THEIRS:
            raise PeerUnavailable("it is not installed")
        return FakeWorker(system, [], 1.0)

    found = measure_in_turns(toy_model(), {ONE: [OURS, THEIRS]}, start, pause=0)
    assert found[ONE, THEIRS.name] == Measured(note="it is not installed")
    assert found[ONE, OURS.name].seconds == [1.0, 1.0]


@pytest.mark.peers
def test_all_systems_generate_the_same_tokens_on_small_models():
    from benchmarks.generation.bench_generate import check_agreement, installed

    assert installed("ctranslate2") == "4.8.5"
    check_agreement(TOY_DENSE, "toy-dense", [OURS.name, THEIRS.name, "transformers-float32"], 1)
    check_agreement(TOY_MOE, "toy-moe", [OURS.name, "transformers-float32"], 1)

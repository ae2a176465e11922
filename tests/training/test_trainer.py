"""Training lowers the loss, and continues to the last bit where it was interrupted."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch

from moe_mt.errors import ConfigError
from moe_mt.models import MoEConfig, Seq2SeqTransformer, TransformerConfig
from moe_mt.training import TokenPairs, Trainer, TrainingConfig

MOE = MoEConfig(
    num_experts=4,
    encoder_sparse_step=1,
    decoder_sparse_step=1,
    # Draws random numbers, as do expert-output masking and dropout.
    second_expert_policy="sampling",
    token_dropout=0.2,
    aux_loss_coef=0.01,
)
CONFIG = TransformerConfig(
    family="nllb_moe",
    vocab_size=40,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_heads=2,
    decoder_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    max_positions=32,
    init_std=0.1,
    moe=MOE,
)
TRAINING = TrainingConfig(
    steps=12, max_batch_tokens=40, learning_rate=0.02, warmup_steps=2, label_smoothing=0.1
)


def pairs(count: int = 30, seed: int = 0) -> TokenPairs:
    """Return a task that can be learned: say the source one token up."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for _ in range(count):
        length = int(torch.randint(2, 6, (1,), generator=generator))
        source = torch.randint(5, 38, (length,), generator=generator).tolist()
        sequences.append(([*source, 2], [token + 1 for token in source] + [2]))
    return TokenPairs.from_sequences(sequences)


def trainer(config=TRAINING, model_config=CONFIG, data=None) -> Trainer:
    torch.manual_seed(5)
    model = Seq2SeqTransformer(model_config)
    return Trainer(model, pairs() if data is None else data, config)


def parameters(trained: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}


def test_the_loss_falls():
    losses = []
    trained = trainer(replace(TRAINING, steps=60))
    trained.run(lambda progress: losses.append(progress.loss))
    assert len(losses) == 60
    # An even guess among 40 tokens costs ln 40 = 3.7.
    assert sum(losses[:5]) / 5 > 3
    assert sum(losses[-5:]) / 5 < 2.5


def test_progress_tells_where_training_stands():
    seen = []
    trainer().run(seen.append)
    assert [progress.step for progress in seen] == list(range(1, 13))
    assert all(progress.tokens > 0 for progress in seen)
    # One where experts share evenly, four where one of four takes all.
    assert all(0.9 < progress.balance < 4 for progress in seen)
    assert seen[3].learning_rate == TRAINING.learning_rate


def test_a_dense_model_has_nothing_to_balance():
    seen = []
    trainer(model_config=replace(CONFIG, moe=None)).run(seen.append)
    assert {progress.balance for progress in seen} == {0.0}


def test_the_learning_rate_warms_up_holds_and_falls_to_zero():
    rates = []
    config = TrainingConfig(steps=20, learning_rate=0.01, warmup_steps=4, decay_fraction=0.25)
    trainer(config).run(lambda progress: rates.append(progress.learning_rate))
    # The last quarter are five steps; the fall ends where a step 21 would stand.
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, *[0.01] * 13, 0.008, 0.006, 0.004, 0.002])


@pytest.mark.parametrize("interrupted_at", [1, 5, 11])
def test_resumed_is_uninterrupted_bit_for_bit(interrupted_at):
    whole = trainer()
    whole.run()

    first = trainer()
    saved = io.BytesIO()

    def interrupt(progress):
        if progress.step == interrupted_at:
            torch.save(first.state_dict(), saved)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(interrupt)
    # Another process: other weights, other random numbers, nothing done.
    torch.manual_seed(99)
    second = Trainer(Seq2SeqTransformer(CONFIG), pairs(), TRAINING)
    torch.rand(7)
    saved.seek(0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    assert second.step == interrupted_at
    second.run()

    found = parameters(second)
    for name, expected in parameters(whole).items():
        assert torch.equal(found[name], expected), name
    moments = second.optimizer.state_dict()["state"]
    for index, expected in whole.optimizer.state_dict()["state"].items():
        assert torch.equal(moments[index]["exp_avg_sq"], expected["exp_avg_sq"])


def test_the_comparison_above_can_fail():
    # Were the random state not restored, dropout and routing noise would differ.
    whole = trainer()
    whole.run()
    first = trainer()
    states = []
    first.run(lambda progress: states.append(copy.deepcopy(first.state_dict())))
    state = states[4]
    second = trainer()
    second.load_state_dict(state | {"random": torch.get_rng_state()})
    second.run()
    name = "embedding.weight"
    assert not torch.equal(parameters(second)[name], parameters(whole)[name])


@pytest.mark.parametrize(
    ("config", "data"),
    [
        (replace(TRAINING, learning_rate=0.01), None),
        (replace(TRAINING, steps=13), None),
        (replace(TRAINING, seed=1), None),
        (TRAINING, pairs(29)),
    ],
    ids=["rate", "steps", "seed", "data"],
)
def test_a_state_of_another_training_is_refused(config, data):
    state = trainer().state_dict()
    with pytest.raises(ConfigError, match="of another training"):
        trainer(config, data=data).load_state_dict(state)


def test_a_finished_training_stays_finished():
    done = trainer()
    done.run()
    before = parameters(done)
    done.run(lambda progress: pytest.fail("a step too many"))
    assert all(torch.equal(before[name], tensor) for name, tensor in parameters(done).items())


def test_training_leaves_the_model_ready_to_use():
    trained = trainer()
    trained.run()
    assert not trained.model.training
    assert trained.model.embedding.weight.grad is None


def test_the_balance_loss_reaches_the_router():
    # The same training but for the weight of the balance loss moves the router elsewhere.
    weights = []
    for coefficient in (0.0, 1.0):
        moe = replace(MOE, aux_loss_coef=coefficient)
        trained = trainer(replace(TRAINING, steps=3), replace(CONFIG, moe=moe))
        trained.run()
        weights.append(trained.model.encoder.layers[0].feed_forward.router.classifier.weight)
    assert not torch.equal(*weights)


def test_the_z_loss_is_off_unless_asked_for():
    weights = []
    for coefficient in (0.0, 1.0):
        moe = replace(MOE, z_loss_coef=coefficient)
        trained = trainer(replace(TRAINING, steps=3), replace(CONFIG, moe=moe))
        trained.run()
        weights.append(trained.model.encoder.layers[0].feed_forward.router.classifier.weight)
    assert not torch.equal(*weights)


def test_no_data():
    with pytest.raises(ConfigError, match="no sentence pair"):
        trainer(data=TokenPairs.from_sequences([]))


def test_a_gradient_that_is_not_finite_stops_before_it_spoils_the_weights():
    broken = trainer()
    with torch.no_grad():
        broken.model.encoder.layers[0].feed_forward.router.classifier.weight.fill_(math.nan)
    before = parameters(broken)["embedding.weight"]
    with pytest.raises(ConfigError, match="gradient of step 1 is not finite"):
        broken.run()
    assert torch.equal(parameters(broken)["embedding.weight"], before)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"max_batch_tokens": -1},
        {"clip_norm": 0.0},
        {"label_smoothing": 1.0},
        {"decay_fraction": -0.1},
    ],
)
def test_numbers_that_make_no_training(options):
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        TrainingConfig(**({"steps": 1} | options))

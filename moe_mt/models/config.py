"""What a model is: its sizes and rules, complete, frozen and checked."""

from dataclasses import dataclass
from typing import Literal

from moe_mt.errors import ConfigError
from moe_mt.ops import ACTIVATIONS

__all__ = ["MoEConfig", "TransformerConfig"]

ROUTER_DTYPES = ("float32", "float16", "bfloat16")
SECOND_EXPERT_POLICIES = ("all", "sampling", "random")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The sparse layers of a mixture-of-experts model."""

    num_experts: int = 128
    """Experts in each sparse layer."""

    encoder_sparse_step: int = 4
    """Encoder layer ``i`` is sparse where ``(i + 1) % step == 0``; 0 means that none is."""

    decoder_sparse_step: int = 4
    """The same for the decoder."""

    router_bias: bool = False
    """Whether the router's scores have a bias."""

    router_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision in which the router computes."""

    route_padding: bool = False
    """Whether padding claims experts (published name, inverted there:
    ``router_ignore_padding_tokens``)."""

    train_capacity: int | None = 64
    """Capacity in training, in tokens; ``None`` is fairseq's ``2 * ceil(T / E)``."""

    eval_capacity_fraction: float = 1.0
    """Capacity in evaluation as a fraction of the call's tokens; at 1.0 nothing is dropped."""

    second_expert_policy: Literal["all", "sampling", "random"] = "all"
    """What becomes of second choices."""

    normalize_before_dropping: bool = False
    """Whether gates sum to one before claims are dropped, or after."""

    batch_prioritized: bool = False
    """Whether confident tokens claim experts first."""

    token_dropout: float = 0.2
    """Expert-output masking: outputs are scaled by ``1 - token_dropout`` in evaluation."""

    aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss."""

    z_loss_coef: float = 0.0
    """Weight of the router z-loss. Published files name one and nothing uses it, so it is off
    unless it is set here."""

    def __post_init__(self) -> None:
        """Check every field."""
        _require(self.num_experts >= 2, "num_experts", self.num_experts, "at least 2")
        for name in ("encoder_sparse_step", "decoder_sparse_step"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(
            self.router_dtype in ROUTER_DTYPES, "router_dtype", self.router_dtype, ROUTER_DTYPES
        )
        _require(
            self.second_expert_policy in SECOND_EXPERT_POLICIES,
            "second_expert_policy",
            self.second_expert_policy,
            SECOND_EXPERT_POLICIES,
        )
        capacity = self.train_capacity
        _require(capacity is None or capacity >= 1, "expert_capacity", capacity, "at least 1")
        _require(0 <= self.token_dropout < 1, "moe_token_dropout", self.token_dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A pre-norm encoder-decoder transformer; dense where ``moe`` is ``None``."""

    family: Literal["m2m100", "nllb_moe"]
    """Which family of checkpoints it belongs to."""

    vocab_size: int = 128112
    """Rows of the one embedding that both sides and the output share."""

    d_model: int = 1024
    """Width of a token."""

    encoder_layers: int = 12
    """Layers in the encoder."""

    decoder_layers: int = 12
    """Layers in the decoder."""

    encoder_heads: int = 16
    """Attention heads in each encoder layer."""

    decoder_heads: int = 16
    """Attention heads in each decoder layer."""

    encoder_ffn_dim: int = 4096
    """Inner width of the encoder's feed-forward networks, experts included."""

    decoder_ffn_dim: int = 4096
    """Inner width of the decoder's feed-forward networks, experts included."""

    activation: str = "relu"
    """Activation of every feed-forward network."""

    max_positions: int = 1024
    """Positions the sinusoid table starts with; longer inputs extend it."""

    scale_embedding: bool = True
    """Whether embeddings are multiplied by ``sqrt(d_model)``."""

    dropout: float = 0.1
    """Dropout on embeddings and on every sublayer's output."""

    attention_dropout: float = 0.1
    """Dropout on attention probabilities."""

    activation_dropout: float = 0.0
    """Dropout inside feed-forward networks, after the activation."""

    ffn_output_dropout: float = 0.1
    """Dropout after feed-forward networks: ``dropout`` in M2M100 and fairseq; the published
    NLLB-MoE classes use ``activation_dropout`` there."""

    encoder_layerdrop: float = 0.0
    """Probability that training skips an encoder layer."""

    decoder_layerdrop: float = 0.0
    """Probability that training skips a decoder layer."""

    init_std: float = 0.02
    """Standard deviation of freshly initialised weights."""

    bos_id: int = 0
    """Beginning-of-sequence token."""

    pad_id: int = 1
    """Padding token; its embedding position is zero."""

    eos_id: int = 2
    """End-of-sequence token."""

    decoder_start_id: int = 2
    """First token the decoder reads."""

    moe: MoEConfig | None = None
    """The sparse layers, or ``None`` for a dense model."""

    def __post_init__(self) -> None:
        """Check every field that a model could not be built from."""
        sizes = ("vocab_size", "d_model", "encoder_heads", "decoder_heads", "max_positions")
        for name in (*sizes, "encoder_ffn_dim", "decoder_ffn_dim"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("encoder_layers", "decoder_layers"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("encoder_heads", "decoder_heads"):
            heads = getattr(self, name)
            _require(self.d_model % heads == 0, name, heads, f"a divisor of d_model {self.d_model}")
        _require(
            self.activation in ACTIVATIONS,
            "activation_function",
            self.activation,
            tuple(ACTIVATIONS),
        )
        for name in ("bos_id", "pad_id", "eos_id", "decoder_start_id"):
            value = getattr(self, name)
            _require(0 <= value < self.vocab_size, name, value, f"in [0, {self.vocab_size})")
        for name in ("dropout", "attention_dropout", "activation_dropout", "ffn_output_dropout"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("encoder_layerdrop", "decoder_layerdrop"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        _require(self.init_std >= 0, "init_std", self.init_std, "0 or more")

    def encoder_layer_is_sparse(self, index: int) -> bool:
        """Whether encoder layer ``index`` (from 0) holds experts."""
        return self.moe is not None and _is_sparse(index, self.moe.encoder_sparse_step)

    def decoder_layer_is_sparse(self, index: int) -> bool:
        """Whether decoder layer ``index`` (from 0) holds experts."""
        return self.moe is not None and _is_sparse(index, self.moe.decoder_sparse_step)


def _is_sparse(index: int, step: int) -> bool:
    return step > 0 and (index + 1) % step == 0


def _require(condition: bool, name: str, found: object, expected: object) -> None:
    if not condition:
        raise ConfigError(f"{name} is {found!r} in the model configuration; expected {expected}")

"""The gated mixture of expert networks for few tokens: two launches that stream the weights.

Where most experts have one row or none, the layer takes as long as its weights take to be read,
and matrix units have nothing to do. So there is no sort, no padding and no schedule: a program owns
a few output features of one token, reads their weights from end to end and multiplies in registers.
Nothing is added atomically, and no block size depends on how many tokens there are: a token gets
the same bits alone as in any batch.

Source: output-centric ("warp") decoding as Cursor published it. How many bytes must be on their way
at once is Little's law: bandwidth times latency, some 26 KB for each multiprocessor of an H200.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mt.kernels._launch import accelerator_of, launch
from moe_mt.kernels._tiles import activate, element_offset

__all__ = ["expert_ffn_decode"]


@triton.jit
def _load(ptrs, inside, EVEN: tl.constexpr):
    """Load, with zeros outside; without a mask where nothing is outside."""
    if EVEN:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def _fold(products, WIDTH: tl.constexpr):
    """Sum each ``WIDTH`` neighbours: those that one thread holds, as one load brought them.

    Sums of single products would take eight times the registers, and halve the programs that a
    multiprocessor runs beside each other.
    """
    columns: tl.constexpr = products.shape[0]
    groups: tl.constexpr = products.shape[1] // WIDTH
    return tl.sum(tl.reshape(products, (columns, groups, WIDTH)), 2)


@triton.jit
def _expert_up_kernel(
    x_ptr,
    expert_ids_ptr,
    gates_ptr,
    up_proj_ptr,
    gate_proj_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    hidden_ptr,
    num_experts,
    d_model,
    stride_up_expert,
    stride_up_row,
    stride_gate_expert,
    stride_gate_row,
    stride_up_bias_expert,
    stride_gate_bias_expert,
    FFN_DIM: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """hidden[p] = activation(x[t] @ up_proj[e].T + up_bias[e]), where claim p is of t and e.

    With gate_proj, hidden[p] = activation(x[t] @ gate_proj[e].T + gate_bias[e]) * (x[t] @ ...).

    One program computes BLOCK_COLUMNS features of one claim. Neighbours compute the same features
    of other claims, so that claims on one expert find its weights in the cache. x is contiguous,
    weights and biases have innermost stride 1. d_model is an argument, since a loop over a constant
    is unrolled, and then needs more registers.
    """
    claim = tl.program_id(0)
    expert = tl.load(expert_ids_ptr + claim)
    if (expert >= num_experts) | (tl.load(gates_ptr + claim) == 0):
        return
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    # Columns beyond the last read the last one again: they are not stored, and loads without a
    # mask are wider.
    safe_columns = tl.minimum(columns, FFN_DIM - 1)
    inner = tl.arange(0, BLOCK_INNER)
    x_ptrs = x_ptr + element_offset(claim // TOP_K, d_model) + inner
    up_proj_ptr += element_offset(expert, stride_up_expert)
    up_ptrs = up_proj_ptr + (element_offset(safe_columns, stride_up_row)[:, None] + inner[None, :])
    up = tl.zeros((BLOCK_COLUMNS, BLOCK_INNER // WIDTH), tl.float32)
    gate_ptrs = up_ptrs
    gate = tl.zeros_like(up)
    if gate_proj_ptr is not None:
        gate_proj_ptr += element_offset(expert, stride_gate_expert)
        gate_ptrs = gate_proj_ptr + (
            element_offset(safe_columns, stride_gate_row)[:, None] + inner[None, :]
        )
    # Loads that feed no tl.dot are pipelined only where the loop itself says so.
    for start in tl.range(  # pyright: ignore[reportGeneralTypeIssues]
        0, d_model, BLOCK_INNER, num_stages=STAGES
    ):
        inside = start + inner < d_model
        x = _load(x_ptrs + start, inside, EVEN_INNER).to(tl.float32)[None, :]
        weight = _load(up_ptrs + start, inside[None, :], EVEN_INNER).to(tl.float32)
        up += _fold(weight * x, WIDTH)
        if gate_proj_ptr is not None:
            weight = _load(gate_ptrs + start, inside[None, :], EVEN_INNER).to(tl.float32)
            gate += _fold(weight * x, WIDTH)
    hidden = tl.sum(up, 1)
    if up_bias_ptr is not None:
        up_bias_ptr += element_offset(expert, stride_up_bias_expert)
        hidden += tl.load(up_bias_ptr + safe_columns).to(tl.float32)
    if gate_proj_ptr is not None:
        gated = tl.sum(gate, 1)
        if gate_bias_ptr is not None:
            gate_bias_ptr += element_offset(expert, stride_gate_bias_expert)
            gated += tl.load(gate_bias_ptr + safe_columns).to(tl.float32)
        hidden *= activate(gated, ACTIVATION)
    else:
        hidden = activate(hidden, ACTIVATION)
    hidden_ptr += element_offset(claim, FFN_DIM)
    tl.store(hidden_ptr + columns, hidden.to(hidden_ptr.dtype.element_ty), mask=columns < FFN_DIM)


@triton.jit
def _expert_down_kernel(
    hidden_ptr,
    expert_ids_ptr,
    gates_ptr,
    down_proj_ptr,
    down_bias_ptr,
    residual_ptr,
    out_ptr,
    num_experts,
    stride_down_expert,
    stride_down_row,
    stride_down_bias_expert,
    D_MODEL: tl.constexpr,
    FFN_DIM: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[t] = sum_k gates[t, k] * (hidden[t, k] @ down[e].T + bias[e]) + residual[t].

    Only claims count that have an expert and a gate that is not zero; of others nothing is read,
    and their hidden rows were never written. One program computes BLOCK_COLUMNS features of one
    token. The weights of its experts are one stream: the pipeline does not run dry between two.
    hidden, residual and out are contiguous, weights and biases have innermost stride 1.
    """
    BLOCKS: tl.constexpr = (FFN_DIM + BLOCK_INNER - 1) // BLOCK_INNER
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    safe_columns = tl.minimum(columns, D_MODEL - 1)
    k = tl.arange(0, K_PADDED)
    claims = token * TOP_K + k
    experts = tl.load(expert_ids_ptr + claims, mask=k < TOP_K, other=num_experts)
    gates = tl.load(gates_ptr + claims, mask=k < TOP_K, other=0.0).to(tl.float32)
    counts = (experts < num_experts) & (gates != 0)
    place = tl.cumsum(counts.to(tl.int32), 0) - 1
    block = tl.arange(0, BLOCK_INNER)
    hidden_ptr += element_offset(token, TOP_K * FFN_DIM)
    rows_ptr = down_proj_ptr + element_offset(safe_columns, stride_down_row)[:, None]
    partial = tl.zeros((BLOCK_COLUMNS, BLOCK_INNER // WIDTH), tl.float32)
    num_steps = tl.sum(counts.to(tl.int32), 0) * BLOCKS
    for step in tl.range(0, num_steps, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        this = counts & (place == step // BLOCKS)
        expert = tl.sum(tl.where(this, experts, 0), 0)
        gate = tl.sum(tl.where(this, gates, 0.0), 0)
        hidden_row = tl.sum(tl.where(this, k, 0), 0)
        inner = step % BLOCKS * BLOCK_INNER + block
        inside = inner < FFN_DIM
        hidden_ptrs = hidden_ptr + (hidden_row * FFN_DIM + inner)
        hidden = _load(hidden_ptrs, inside, EVEN_INNER).to(tl.float32) * gate
        weight_ptrs = rows_ptr + (element_offset(expert, stride_down_expert) + inner)[None, :]
        weight = _load(weight_ptrs, inside[None, :], EVEN_INNER).to(tl.float32)
        partial += _fold(weight * hidden[None, :], WIDTH)
    out = tl.sum(partial, 1)
    if down_bias_ptr is not None:
        bias_ptrs = down_bias_ptr + element_offset(experts, stride_down_bias_expert)[None, :]
        bias = tl.load(bias_ptrs + safe_columns[:, None], mask=counts[None, :], other=0.0)
        out += tl.sum(bias.to(tl.float32) * tl.where(counts, gates, 0.0)[None, :], 1)
    offsets = element_offset(token, D_MODEL) + columns
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offsets, mask=columns < D_MODEL, other=0.0)
        out += residual.to(tl.float32)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=columns < D_MODEL)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """What one program reads at a time: weight rows x bytes of each, by so many warps."""

    columns: int
    inner_bytes: int
    num_warps: int


STAGES = 4
"""Of which three are on their way while one is multiplied."""

# Tiles of 8 and 16 KB. For one token on an H200 (ffn_dim 8192, K 2) all 1024 programs of the first
# launch run at once, eight to a multiprocessor, and all 256 of the second (d_model 2048), two to
# one: 96 KB or more on their way to each. Wide blocks would read the input less often; these copy
# at most 8 bytes of it per thread, which goes through L1, where the neighbours find it.
_UP = _Block(columns=16, inner_bytes=512, num_warps=4)
_GATED_UP = _Block(columns=8, inner_bytes=512, num_warps=4)
_DOWN = _Block(columns=8, inner_bytes=2048, num_warps=8)
_FEWEST_COLUMNS = 4


def _sizes(block: _Block, weight: Tensor, programs_of_a_row: int) -> dict[str, int | bool]:
    """Return the sizes that a launch needs; they depend on shapes of the model alone.

    Fewer columns where one token would leave multiprocessors without a program.

    Args:
        block: The most that a program reads at a time.
        weight: (E, out, in).
        programs_of_a_row: Programs that compute each feature of one token.
    """
    _, outer, inner = weight.shape
    columns = block.columns
    wanted = 1.5 * accelerator_of(weight).multiprocessors
    while columns > _FEWEST_COLUMNS and programs_of_a_row * triton.cdiv(outer, columns) < wanted:
        columns //= 2
    width = 16 // weight.element_size()
    block_inner = block.inner_bytes // weight.element_size()
    block_inner = min(block_inner, max(triton.next_power_of_2(inner), 2 * width))
    return {
        "BLOCK_COLUMNS": columns,
        "BLOCK_INNER": block_inner,
        "EVEN_INNER": inner % block_inner == 0,
        "WIDTH": width,
        "STAGES": STAGES,
        "num_warps": block.num_warps,
        "num_stages": STAGES,
    }


def expert_ffn_decode(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    gate_proj: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """Return ``residual[t] + sum over k of gates[t, k] * expert(x[t])`` (T, d_model).

    A claim without an expert (id ``E``) or with a gate of zero is left out, and what it names is
    not read. Hidden rows are rounded to the dtype of ``x``; all sums are float32.

    Args:
        x: (T, d_model).
        expert_ids: (T, K) int32; ``E`` for a dropped claim.
        gates: (T, K) float32.
        up_proj: (E, ffn_dim, d_model), innermost stride 1, as of all weights and biases.
        down_proj: (E, d_model, ffn_dim).
        gate_proj: (E, ffn_dim, d_model) for ``activation(gate) * up``, or ``None``.
        up_bias: (E, ffn_dim) or ``None``.
        gate_bias: (E, ffn_dim) or ``None``.
        down_bias: (E, d_model) or ``None``.
        activation: ``"relu"``, ``"gelu"`` or ``"silu"``.
        residual: (T, d_model) or ``None``.
    """
    num_experts, ffn_dim, d_model = up_proj.shape
    num_tokens, top_k = expert_ids.shape
    expert_ids, gates = expert_ids.contiguous(), gates.contiguous()
    hidden = x.new_empty(num_tokens * top_k, ffn_dim)
    sizes = _sizes(_UP if gate_proj is None else _GATED_UP, up_proj, top_k)
    launch(
        _expert_up_kernel,
        (num_tokens * top_k, triton.cdiv(ffn_dim, sizes["BLOCK_COLUMNS"])),
        x_ptr=x.contiguous(),
        expert_ids_ptr=expert_ids,
        gates_ptr=gates,
        up_proj_ptr=up_proj,
        gate_proj_ptr=gate_proj,
        up_bias_ptr=up_bias,
        gate_bias_ptr=gate_bias,
        hidden_ptr=hidden,
        num_experts=num_experts,
        d_model=d_model,
        stride_up_expert=up_proj.stride(0),
        stride_up_row=up_proj.stride(1),
        stride_gate_expert=0 if gate_proj is None else gate_proj.stride(0),
        stride_gate_row=0 if gate_proj is None else gate_proj.stride(1),
        stride_up_bias_expert=0 if up_bias is None else up_bias.stride(0),
        stride_gate_bias_expert=0 if gate_bias is None else gate_bias.stride(0),
        FFN_DIM=ffn_dim,
        TOP_K=top_k,
        ACTIVATION=activation,
        **sizes,
    )
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = x.new_empty(num_tokens, d_model, dtype=dtype)
    sizes = _sizes(_DOWN, down_proj, 1)
    launch(
        _expert_down_kernel,
        (num_tokens, triton.cdiv(d_model, sizes["BLOCK_COLUMNS"])),
        hidden_ptr=hidden,
        expert_ids_ptr=expert_ids,
        gates_ptr=gates,
        down_proj_ptr=down_proj,
        down_bias_ptr=down_bias,
        residual_ptr=None if residual is None else residual.contiguous(),
        out_ptr=out,
        num_experts=num_experts,
        stride_down_expert=down_proj.stride(0),
        stride_down_row=down_proj.stride(1),
        stride_down_bias_expert=0 if down_bias is None else down_bias.stride(0),
        D_MODEL=d_model,
        FFN_DIM=ffn_dim,
        TOP_K=top_k,
        K_PADDED=triton.next_power_of_2(top_k),
        **sizes,
    )
    return out

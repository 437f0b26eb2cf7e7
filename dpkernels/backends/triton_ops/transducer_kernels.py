"""Kernels of the transducer's joint network: its logits, their gradients, and sums of these over frames and labels.

The rows of a tile are BM of one utterance's own cells, numbered t·(m+1) + u: its tiles follow its own lengths, so that
no bit depends on padding or on the rest of the batch. Logits are computed in tiles of BN outputs: [BM, BK] pieces of
z = act(encoder_t + predictor_u) are made in registers and multiplied with pieces of the weight. No address depends on
the value of a label, which is only compared with the outputs, and lengths are clamped.
"""

import triton
import triton.language as tl

from dpkernels.backends.triton_ops.device import frames_of, product
from dpkernels.backends.triton_ops.launching import kernel

GAIN = tl.constexpr(4096.0)
"""Factor of the normalised gradients of logits, at most 1, in scratch memory: float16 then keeps them from 2⁻³⁶."""


@triton.jit
def own_sizes(frame_lengths, target_lengths, utterance, frames, width):
    """(n, m + 1) of an utterance, clamped."""
    n = frames_of(frame_lengths, utterance, frames)
    return n, frames_of(target_lengths, utterance, width - 1) + 1


@triton.jit
def own_cells(tile, first, last, own, BM: tl.constexpr):
    """(t, u, inside) of a tile of the cells of frames first ≤ t < last, tiles being counted from that of `first`.

    Where a cell stands in its tile does not depend on `first`.
    """
    cell = (first * own // BM + tile) * BM + tl.arange(0, BM)
    t = cell // own
    return t, cell - t * own, (t >= first) & (t < last)


@triton.jit
def next_labels(targets, u, own, CLASSES: tl.constexpr):
    """The label that follows u, clamped to the classes; −1, which is none, at the last u."""
    exists = u < own - 1
    label = tl.load(targets + u, mask=exists, other=0)
    label = tl.minimum(tl.maximum(label, 0), CLASSES - 1).to(tl.int32)
    return tl.where(exists, label, -1)


@triton.jit
def activated(encoder, predictor, t, u, inside, features, HIDDEN: tl.constexpr, TANH: tl.constexpr):
    """act(encoder_t + predictor_u) in float32 [rows, features], 0 outside; NaN stays NaN."""
    mask = inside[:, None] & (features < HIDDEN)[None, :]
    e = tl.load(encoder + (t * HIDDEN)[:, None] + features[None, :], mask=mask, other=0.0)
    p = tl.load(predictor + (u * HIDDEN)[:, None] + features[None, :], mask=mask, other=0.0)
    total = e.to(tl.float32) + p.to(tl.float32)
    if TANH:
        return 1.0 - 2.0 / (tl.exp(2.0 * total) + 1.0)
    return tl.where(total < 0.0, 0.0, total)


@triton.jit
def logits_of(
    encoder, predictor, weight, bias, t, u, inside, columns, one, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr,
    TANH: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, BN] logits of the cells (t, u) at the outputs `columns`."""
    acc = tl.zeros((BM, BN), tl.float32)
    at = weight + (columns.to(tl.int64) * HIDDEN)[:, None]
    for k in range(0, HIDDEN, BK):
        features = k + tl.arange(0, BK)
        z = activated(encoder, predictor, t, u, inside, features, HIDDEN, TANH).to(weight.dtype.element_ty)
        mask = (columns < OUTPUTS)[:, None] & (features < HIDDEN)[None, :]
        w = tl.load(at + features[None, :], mask=mask, other=0.0)
        acc = product(z, tl.trans(w), acc, one, UPCAST)
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    return acc


@kernel
def joint_scores(
    encoder,
    predictor,
    weight,
    bias,
    targets,
    frame_lengths,
    target_lengths,
    scores,
    normalizers,
    frames: int,
    width: int,
    tiles: int,
    blank: int,
    sigma,
    one,
    HIDDEN: tl.constexpr,
    CLASSES: tl.constexpr,
    COUNT: tl.constexpr,
    TANH: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """One program a (utterance, tile of BM cells): scores [B, T, U+1, 2+COUNT], normalizers [B, T, U+1, 1 or 2].

    A running maximum and sum over tiles of BN classes; the blank's and the labels' logits are picked on the way. The
    COUNT durations' logits are a tile of BD.
    """
    program = tl.program_id(0)
    utterance, tile = (program // tiles).to(tl.int64), program % tiles
    n, own = own_sizes(frame_lengths, target_lengths, utterance, frames, width)
    if tile * BM >= n * own:
        return
    t, u, inside = own_cells(tile, 0, n, own, BM)
    label = next_labels(targets + utterance * (width - 1), u, own, CLASSES)
    encoder += utterance * frames * HIDDEN
    predictor += utterance * width * HIDDEN
    top = tl.full((BM,), float("-inf"), tl.float32)
    total, of_blank, of_label = (
        tl.zeros((BM,), tl.float32),
        tl.zeros((BM,), tl.float32),
        tl.zeros((BM,), tl.float32),
    )
    for first in range(0, CLASSES, BN):
        columns = first + tl.arange(0, BN)
        logits = logits_of(
            encoder, predictor, weight, bias, t, u, inside, columns, one, HIDDEN, CLASSES + COUNT, TANH, UPCAST,
            BM, BN, BK,
        )  # fmt: skip
        of_label += tl.sum(tl.where(columns[None, :] == label[:, None], logits, 0.0), axis=1)
        if (blank >= first) & (blank < first + BN):
            of_blank += tl.sum(tl.where((columns == blank)[None, :], logits, 0.0), axis=1)
        logits = tl.where((columns < CLASSES)[None, :], logits, float("-inf"))
        above = tl.maximum(top, tl.max(logits, axis=1))
        # −∞ less −∞ would be NaN
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        top = above
    normalizer = top + tl.log(total)
    cell = (utterance * frames + t) * width + u
    at = scores + cell * (2 + COUNT)
    tl.store(at, of_blank - normalizer - sigma, mask=inside)
    tl.store(at + 1, of_label - normalizer - sigma, mask=inside & (label >= 0))
    if COUNT == 0:
        tl.store(normalizers + cell, normalizer, mask=inside)
    else:
        tl.store(normalizers + cell * 2, normalizer, mask=inside)
        steps = tl.arange(0, BD)
        logits = logits_of(
            encoder, predictor, weight, bias, t, u, inside, CLASSES + steps, one, HIDDEN, CLASSES + COUNT, TANH, UPCAST,
            BM, BD, BK,
        )  # fmt: skip
        logits = tl.where((steps < COUNT)[None, :], logits, float("-inf"))
        top = tl.max(logits, axis=1)
        normalizer = top + tl.log(tl.sum(tl.exp(logits - top[:, None]), axis=1))
        tl.store(normalizers + cell * 2 + 1, normalizer, mask=inside)
        mask = inside[:, None] & (steps < COUNT)[None, :]
        tl.store(at[:, None] + 2 + steps[None, :], logits - normalizer[:, None], mask=mask)


@triton.jit
def passing(flows, cell, grad_loss, inside, COUNT: tl.constexpr):
    """(flow of the blank, of a label, of both, and the latter times grad_loss) of cells; 0 outside, and 0 times NaN."""
    of_blank = tl.load(flows + cell * (2 + COUNT), mask=inside, other=0.0)
    of_label = tl.load(flows + cell * (2 + COUNT) + 1, mask=inside, other=0.0)
    through = of_blank + of_label
    return of_blank, of_label, through, tl.where(through != 0.0, through * grad_loss, 0.0)


@kernel
def joint_logit_gradients(
    encoder,
    predictor,
    weight,
    bias,
    targets,
    frame_lengths,
    target_lengths,
    normalizers,
    flows,
    grad_losses,
    out,
    frames: int,
    width: int,
    first_utterance: int,
    first_frame: int,
    block_frames: int,
    tiles: int,
    across: int,
    blank: int,
    one,
    HIDDEN: tl.constexpr,
    CLASSES: tl.constexpr,
    COUNT: tl.constexpr,
    PITCH: tl.constexpr,
    NORMALISED: tl.constexpr,
    TANH: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program a (utterance of a block, tile of BM cells, tile of BN outputs): ∂ loss / ∂ logits of these.

    out [utterances, block_frames·(U+1), PITCH]; of rows outside of an utterance's cells nothing is written. NORMALISED:
    GAIN times the gradient divided by the cell's flow, the chance that a path passes through it; else times grad_loss.
    """
    program = tl.program_id(0)
    column, program = program % across, program // across
    place, tile = (program // tiles).to(tl.int64), program % tiles
    utterance = first_utterance + place
    n, own = own_sizes(frame_lengths, target_lengths, utterance, frames, width)
    last = tl.minimum(n, first_frame + block_frames)
    if (first_frame * own // BM + tile) * BM >= last * own:
        return
    t, u, inside = own_cells(tile, first_frame, last, own, BM)
    columns = column * BN + tl.arange(0, BN)
    logits = logits_of(
        encoder + utterance * frames * HIDDEN, predictor + utterance * width * HIDDEN, weight, bias, t, u, inside,
        columns, one, HIDDEN, CLASSES + COUNT, TANH, UPCAST, BM, BN, BK,
    )  # fmt: skip
    cell = (utterance * frames + t) * width + u
    of_blank, of_label, through, factor = passing(
        flows, cell, tl.load(grad_losses + utterance), inside, COUNT
    )
    # what is left out of a cell's gradient here is less than 2⁻¹⁰⁰ of grad_loss
    through = tl.where(through > 2.0**-100, through, 1.0)
    label = next_labels(targets + utterance * (width - 1), u, own, CLASSES)
    normalizer = tl.load(normalizers + cell * (2 if COUNT else 1), mask=inside, other=0.0)[:, None]
    if COUNT:
        of_steps = tl.load(normalizers + cell * 2 + 1, mask=inside, other=0.0)[:, None]
        normalizer = tl.where((columns < CLASSES)[None, :], normalizer, of_steps)
    g = tl.exp(logits - normalizer)
    g -= tl.where((columns == blank)[None, :], (of_blank / through)[:, None], 0.0)
    g -= tl.where(columns[None, :] == label[:, None], (of_label / through)[:, None], 0.0)
    if COUNT:  # noqa: SIM102 (decided when compiled)
        if column * BN + BN > CLASSES:
            for i in range(0, COUNT):
                flow = tl.load(flows + cell * (2 + COUNT) + 2 + i, mask=inside, other=0.0)
                g -= tl.where((columns == CLASSES + i)[None, :], (flow / through)[:, None], 0.0)
    if NORMALISED:
        g *= GAIN
    else:
        g = tl.where(factor[:, None] != 0.0, g * factor[:, None], 0.0)
    at = out + ((place * block_frames + t - first_frame) * width + u) * PITCH
    mask = inside[:, None] & (columns < CLASSES + COUNT)[None, :]
    tl.store(at[:, None] + columns[None, :], g.to(out.dtype.element_ty), mask=mask)


@kernel
def joint_state_gradients(
    g,
    weight,
    encoder,
    predictor,
    frame_lengths,
    target_lengths,
    flows,
    grad_losses,
    out,
    frames: int,
    width: int,
    first_utterance: int,
    first_frame: int,
    block_frames: int,
    tiles: int,
    across: int,
    one,
    HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COUNT: tl.constexpr,
    PITCH: tl.constexpr,
    TANH: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program a (utterance of a block, tile of BM cells, strip of BN features): ∂ loss / ∂ (e_t + p_u).

    g: from `joint_logit_gradients`, NORMALISED. out [utterances, block_frames·(U+1), HIDDEN] float32.
    """
    program = tl.program_id(0)
    strip, program = program % across, program // across
    place, tile = (program // tiles).to(tl.int64), program % tiles
    utterance = first_utterance + place
    n, own = own_sizes(frame_lengths, target_lengths, utterance, frames, width)
    last = tl.minimum(n, first_frame + block_frames)
    if (first_frame * own // BM + tile) * BM >= last * own:
        return
    t, u, inside = own_cells(tile, first_frame, last, own, BM)
    features = strip * BN + tl.arange(0, BN)
    row = (place * block_frames + t - first_frame) * width + u
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, OUTPUTS, BK):
        columns = k + tl.arange(0, BK)
        mask = inside[:, None] & (columns < OUTPUTS)[None, :]
        a = tl.load(g + (row * PITCH)[:, None] + columns[None, :], mask=mask, other=0.0)
        mask = (columns < OUTPUTS)[:, None] & (features < HIDDEN)[None, :]
        b = tl.load(
            weight + (columns.to(tl.int64) * HIDDEN)[:, None] + features[None, :], mask=mask, other=0.0
        )
        acc = product(a, b, acc, one, UPCAST)
    cell = (utterance * frames + t) * width + u
    _, _, _, factor = passing(flows, cell, tl.load(grad_losses + utterance), inside, COUNT)
    value = activated(
        encoder + utterance * frames * HIDDEN, predictor + utterance * width * HIDDEN, t, u, inside, features,
        HIDDEN, TANH,
    )  # fmt: skip
    if TANH:
        acc *= 1.0 - value * value
    else:
        acc = tl.where(value > 0.0, acc, 0.0)
    factor *= 1.0 / GAIN
    acc = tl.where(factor[:, None] != 0.0, acc * factor[:, None], 0.0)
    mask = inside[:, None] & (features < HIDDEN)[None, :]
    tl.store(out + (row * HIDDEN)[:, None] + features[None, :], acc, mask=mask)


@kernel
def joint_sums(
    of_cells,
    frame_lengths,
    target_lengths,
    out,
    frames: int,
    width: int,
    first_utterance: int,
    first_frame: int,
    block_frames: int,
    lines: int,
    strips: int,
    HIDDEN: tl.constexpr,
    OVER_FRAMES: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """One program a (utterance of a block, line, strip of BN features): a sum of `joint_state_gradients` in order.

    A line is a frame, summed over the labels u, and out the encoder's gradient. OVER_FRAMES: a line is a u, summed over
    the block's frames and added to out, float64; blocks begin at multiples of BT, so that they change no bit.
    """
    program = tl.program_id(0)
    strip, program = program % strips, program // strips
    place, line = (program // lines).to(tl.int64), program % lines
    utterance = first_utterance + place
    n, own = own_sizes(frame_lengths, target_lengths, utterance, frames, width)
    own_frames = tl.minimum(n - first_frame, block_frames)
    features = strip * BN + tl.arange(0, BN)
    of_cells += place * block_frames * width * HIDDEN
    if OVER_FRAMES:
        terms, count = own_frames, own
        of_cells += line * HIDDEN
        step = (width + tl.zeros((), tl.int64)) * HIDDEN
        out += (utterance * width + line) * HIDDEN
    else:
        terms, count = own, own_frames
        of_cells += line.to(tl.int64) * width * HIDDEN
        step = tl.full((), HIDDEN, tl.int64)
        out += (utterance * frames + first_frame + line) * HIDDEN
    if (line >= count) | (terms <= 0):
        return
    total = tl.zeros((BN,), tl.float64)
    if OVER_FRAMES:
        total += tl.load(out + features, mask=features < HIDDEN, other=0.0)
    for first in range(0, terms, BT):
        term = first + tl.arange(0, BT)
        mask = (term < terms)[:, None] & (features < HIDDEN)[None, :]
        block = tl.load(of_cells + (term * step)[:, None] + features[None, :], mask=mask, other=0.0)
        total += tl.sum(block, axis=0).to(tl.float64)
    # through float32: there is no conversion from float64 to bfloat16
    total = total if OVER_FRAMES else total.to(tl.float32).to(out.dtype.element_ty)
    tl.store(out + features, total, mask=features < HIDDEN)


@kernel
def joint_states(
    encoder,
    predictor,
    frame_lengths,
    target_lengths,
    out,
    frames: int,
    width: int,
    tiles: int,
    across: int,
    HIDDEN: tl.constexpr,
    TANH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One program a (utterance, tile of BM cells, strip of BN features): z into out [B, T·(U+1), HIDDEN]."""
    program = tl.program_id(0)
    strip, program = program % across, program // across
    utterance, tile = (program // tiles).to(tl.int64), program % tiles
    n, own = own_sizes(frame_lengths, target_lengths, utterance, frames, width)
    if tile * BM >= n * own:
        return
    t, u, inside = own_cells(tile, 0, n, own, BM)
    features = strip * BN + tl.arange(0, BN)
    z = activated(
        encoder + utterance * frames * HIDDEN, predictor + utterance * width * HIDDEN, t, u, inside, features,
        HIDDEN, TANH,
    )  # fmt: skip
    at = out + ((utterance * frames + t) * width + u) * HIDDEN
    mask = inside[:, None] & (features < HIDDEN)[None, :]
    tl.store(at[:, None] + features[None, :], z.to(out.dtype.element_ty), mask=mask)

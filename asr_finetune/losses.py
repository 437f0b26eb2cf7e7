"""Per-utterance losses, shape [B]: what a private step clips is the gradient of each of them.

An utterance's loss reads its own frames and its own tokens only. No reduction over the batch is taken here;
transformers' own "mean" reductions divide by the batch and are not used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORED = -100  # a label that is padding: transformers' convention


def ctc_loss_per_example(
    logits: torch.Tensor, input_lengths: torch.Tensor, labels: torch.Tensor, blank: int
) -> torch.Tensor:
    """−ln p(yᵢ | xᵢ), summed over all alignments (Graves et al. 2006); in nats, not divided by any length.

    Args:
        logits: [B, T, V], any float type; log-probabilities are taken in float32 (float64 for float64).
        input_lengths: [B] int, frames of each utterance; frames beyond them are not read.
        labels: [B, L] int, padded with −100 on the right.
        blank: the blank's class.

    Returns:
        [B]; +inf where no alignment exists: fewer frames than labels, counting one blank between equal
        neighbours.

    Raises:
        ValueError: shapes that do not fit, or a length above T.
    """
    if logits.dim() != 3 or labels.dim() != 2 or len(logits) != len(labels):
        raise ValueError(
            f"ctc_loss_per_example: logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: "
            "expected [B, T, V] and [B, L]"
        )
    if len(logits) == 0:
        return logits.sum(dim=(1, 2))
    if int(input_lengths.max()) > logits.shape[1]:
        raise ValueError(
            f"ctc_loss_per_example: an input length of {int(input_lengths.max())} with {logits.shape[1]} "
            "frames"
        )
    own = labels != IGNORED
    accumulate = logits.dtype if logits.dtype == torch.float64 else torch.float32
    log_probs = logits.log_softmax(dim=-1, dtype=accumulate).transpose(0, 1)
    return F.ctc_loss(
        log_probs,
        labels.masked_fill(~own, 0).long(),
        input_lengths.long(),
        own.sum(dim=1),
        blank=blank,
        reduction="none",
        zero_infinity=False,
    )


def ctc_frames_needed(labels: torch.Tensor) -> int:
    """Frames that the shortest CTC alignment of labels [L] takes: L, and a blank between equal neighbours."""
    return len(labels) + int((labels[1:] == labels[:-1]).sum())


def seq2seq_loss_per_example(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over an utterance's own tokens of −ln p(token | those before, audio); in nats.

    Args:
        logits: [B, L, V], any float type; log-probabilities are taken in float32 (float64 for float64).
        labels: [B, L] int, −100 where a position is not learnt (padding, the decoder's prompt).

    Returns:
        [B]; 0 for an utterance without tokens.

    Raises:
        ValueError: shapes that do not fit.
    """
    totals, counts = sequence_log_likelihood(logits, labels)
    return -totals / counts.clamp(min=1)


def sequence_log_likelihood(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ ln p(token), number of tokens) of each sequence, over the labels that are not −100; [B] and [B].

    Args:
        logits: [B, L, V].
        labels: [B, L].

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"sequence_log_likelihood: logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: "
            "expected [B, L, V] and [B, L]"
        )
    own = labels != IGNORED
    accumulate = logits.dtype if logits.dtype == torch.float64 else torch.float32
    nll = F.cross_entropy(
        logits.to(accumulate).flatten(0, 1), labels.long().flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -nll.view(labels.shape).sum(dim=1), own.sum(dim=1)

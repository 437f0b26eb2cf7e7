// The transducer loss (RNN-T, TDT) on the CPU, without the logits of all cells in memory.
//
// Cell (t, u) of utterance i, t < frame_lengths[i] and u <= target_lengths[i], has z = act(encoder_t +
// predictor_u), rounded to the type of `encoder`, and the logits z W^T + b: V token logits, then D duration
// logits in a TDT. An RNN-T has D = 0.
//
// Conventions
//   - R is F64 where `encoder` is F64, else F32: the type of the products, the sums and the outputs. Outputs
//     and inputs without a dpk_tensor are dense. Outputs are written in the utterances' own cells only, so
//     the caller fills them beforehand; nothing outside of an utterance's lengths is read.
//   - An utterance's results have the same bits in every batch, with any padding, and for every
//     `threads` >= 1.
//   - A length, a label or a blank out of its range is DPK_INVALID_ARGUMENT, and nothing is written.
#ifndef DPK_TRANSDUCER_KERNELS_H
#define DPK_TRANSDUCER_KERNELS_H

#include "cpu_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { DPK_RELU = 0, DPK_TANH = 1 };

typedef struct {
  dpk_tensor encoder;             // [B,T,H]
  dpk_tensor predictor;           // [B,U+1,H]
  dpk_tensor weight;              // [1,V+D,H]
  dpk_tensor bias;                // [1,1,V+D]; data is NULL where there is none
  const int64_t* targets;         // [B,U], of which those before target_lengths[i] are read
  const int64_t* frame_lengths;   // [B], 0..T
  const int64_t* target_lengths;  // [B], 0..U
  int64_t blank;                  // the blank's class, 0..V-1
  int64_t durations;              // D
  int32_t activation;             // DPK_RELU or DPK_TANH
} dpk_transducer;

// scores [B,T,U+1,2+D]: ln p(blank) - sigma, ln p(label u+1) - sigma (not written at the last u of an
// utterance), ln p of each duration. normalizers [B,T,U+1,1 or (D > 0) 2]: the log-sum-exp of the token
// logits, and of the duration logits.
DPK_API dpk_status dpk_cpu_transducer_scores(const dpk_transducer* joint, double sigma, int32_t threads,
                                             void* scores, void* normalizers);

// losses [B]: -ln of the sum over all paths, or +infinity. flows [B,T,U+1,2+D]: the probability that a path
// emits the blank, a label, and (with either) each duration in the cell; not written where the loss is
// infinite. durations [count]: frames of each duration, different and >= 0; count == 0: an RNN-T. scores,
// losses and flows are `dtype`, F32 or F64; sums are in float64.
DPK_API dpk_status dpk_cpu_transducer_lattice(const void* scores, dpk_dtype dtype, int64_t batch,
                                              int64_t frames, int64_t width, const int64_t* durations,
                                              int64_t count, const int64_t* frame_lengths,
                                              const int64_t* target_lengths, int32_t threads, void* losses,
                                              void* flows);

// of_encoder [B,T,H] and of_predictor [B,U+1,H]: the derivatives of sum_i grad_losses[i] * loss_i, from the
// logits computed again. normalizers, flows and grad_losses [B] are as above.
DPK_API dpk_status dpk_cpu_transducer_gradients(const dpk_transducer* joint, const void* normalizers,
                                                const void* flows, const void* grad_losses, int32_t threads,
                                                void* of_encoder, void* of_predictor);

// x [B,T*(U+1),H]: z of each cell; g [B,T*(U+1),V+D]: the derivatives by its logits.
DPK_API dpk_status dpk_cpu_transducer_cells(const dpk_transducer* joint, const void* normalizers,
                                            const void* flows, const void* grad_losses, int32_t threads,
                                            void* x, void* g);

#ifdef __cplusplus
}
#endif

#endif  // DPK_TRANSDUCER_KERNELS_H

// ChaCha20 over whole blocks of one thread, compiled once per instruction set.
#pragma once

#include "common/chacha20.h"
#include "common/isa.h"

// keystream: out[64 * blocks] for blocks state.counter, state.counter + 1, ...
// normals:   out[count], count <= 8 * blocks that remain before the counter ends
// box_mullers: out[2 * pairs] from words[2 * pairs]
#define DPK_DECLARE(isa)                                                           \
  namespace isa {                                                                  \
  void chacha20_keystream(const ChaChaState& state, int64_t blocks, uint8_t* out); \
  void chacha20_normals_f64(const ChaChaState& state, int64_t count, double* out); \
  void chacha20_normals_f32(const ChaChaState& state, int64_t count, float* out);  \
  void box_mullers(const uint64_t* words, int64_t pairs, double* out);             \
  }
namespace dpk {
DPK_FOR_EACH_ISA(DPK_DECLARE)
}
#undef DPK_DECLARE

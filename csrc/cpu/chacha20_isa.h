// ChaCha20 over whole blocks of one thread, compiled once per instruction set.
#pragma once

#include "common/chacha20.h"
#include "common/isa.h"

// keystream: out[64 * blocks] for blocks state.counter, state.counter + 1, ...
// normals:   out[count], count <= 8 * blocks that remain before the counter ends
#define DPK_DECLARE(isa)                                                           \
  namespace isa {                                                                  \
  void chacha20_keystream(const ChaChaState& state, int64_t blocks, uint8_t* out); \
  void chacha20_normals_f64(const ChaChaState& state, int64_t count, double* out); \
  void chacha20_normals_f32(const ChaChaState& state, int64_t count, float* out);  \
  }
namespace dpk {
DPK_FOR_EACH_ISA(DPK_DECLARE)
}
#undef DPK_DECLARE

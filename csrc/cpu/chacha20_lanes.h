// ChaCha20 blocks and normals, a block per vector lane. Only for *_isa.cpp files.
#pragma once

#include "common/chacha20.h"

namespace dpk::DPK_ISA {

// With as many lanes as a register has.
#if defined(__AVX512F__)
constexpr int kBlockLanes = 16;
#elif defined(__AVX2__)
constexpr int kBlockLanes = 8;
#else
constexpr int kBlockLanes = 4;
#endif
typedef uint32_t BlockLanes __attribute__((vector_size(4 * kBlockLanes)));

// words[i][lane]: word i of block `first` + lane. Lanes past the counter's end wrap; no caller reads them.
static inline void blocks_by_lane(const ChaChaState& state, uint32_t first, uint32_t words[16][kBlockLanes]) {
  BlockLanes counter, out[16];
  for (int lane = 0; lane < kBlockLanes; ++lane) counter[lane] = first + static_cast<uint32_t>(lane);
  chacha20_block<BlockLanes>(state, counter, out);
  memcpy(words, out, sizeof(out));
}

// out[count]: normals from block state.counter on, 8 to a block.
template <class Real>
static inline void normals(const ChaChaState& state, int64_t count, Real* out) {
  alignas(64) uint32_t words[16][kBlockLanes];
  alignas(64) Real pairs[kNormalsPerBlock][kBlockLanes];
  for (int64_t done = 0; done < count; done += kBlockLanes * kNormalsPerBlock) {
    blocks_by_lane(state, state.counter + static_cast<uint32_t>(done / kNormalsPerBlock), words);
    for (int pair = 0; pair < kPairsPerBlock; ++pair) {
      for (int lane = 0; lane < kBlockLanes; ++lane) {
        const uint64_t w0 = words[4 * pair][lane] | static_cast<uint64_t>(words[4 * pair + 1][lane]) << 32;
        const uint64_t w1 = words[4 * pair + 2][lane] | static_cast<uint64_t>(words[4 * pair + 3][lane])
                                                            << 32;
        double z0, z1;
        box_muller(w0, w1, &z0, &z1);
        pairs[2 * pair][lane] = static_cast<Real>(z0);
        pairs[2 * pair + 1][lane] = static_cast<Real>(z1);
      }
    }
    if (count - done >= kBlockLanes * kNormalsPerBlock) {
      for (int lane = 0; lane < kBlockLanes; ++lane)
        for (int i = 0; i < kNormalsPerBlock; ++i) out[done + lane * kNormalsPerBlock + i] = pairs[i][lane];
    } else {
      for (int i = 0; i < count - done; ++i)
        out[done + i] = pairs[i % kNormalsPerBlock][i / kNormalsPerBlock];
    }
  }
}

}  // namespace dpk::DPK_ISA

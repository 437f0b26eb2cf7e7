// Philox4x32-10 (Salmon et al. 2011, SC '11), what torch draws with on a GPU, in place of ChaCha20: to
// measure what cryptographic noise costs. Anyone who has a few of its numbers can compute the rest: it is not
// for noise.
#pragma once

#include "common/chacha20.h"

namespace dpk {

struct Philox {
  // Four of its blocks: 64 bytes, as ChaCha20 gives.
  static __device__ __forceinline__ void block(const ChaChaState& state, uint32_t counter,
                                               uint32_t words[16]) {
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      uint32_t* x = words + 4 * i;
      x[0] = 4 * counter + i, x[1] = state.nonce[0], x[2] = state.nonce[1], x[3] = state.nonce[2];
      uint32_t key0 = state.key[0], key1 = state.key[1];
#pragma unroll
      for (int round = 0; round < 10; ++round) {
        const uint64_t a = static_cast<uint64_t>(0xd2511f53u) * x[0];
        const uint64_t b = static_cast<uint64_t>(0xcd9e8d57u) * x[2];
        x[0] = static_cast<uint32_t>(b >> 32) ^ x[1] ^ key0;
        x[1] = static_cast<uint32_t>(b);
        x[2] = static_cast<uint32_t>(a >> 32) ^ x[3] ^ key1;
        x[3] = static_cast<uint32_t>(a);
        key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
      }
    }
  }
};

}  // namespace dpk

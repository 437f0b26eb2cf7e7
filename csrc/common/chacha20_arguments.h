// Checks that the CPU and CUDA entry points of ChaCha20 share.
#pragma once

#include "common/chacha20.h"
#include "common/status.h"

namespace dpk {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "RFC 8439 words are stored as they are in memory");

// Checks that the 32-bit counter reaches blocks `counter` to `counter` + `blocks`.
inline void check_blocks(int64_t counter, int64_t blocks) {
  constexpr int64_t limit = int64_t{1} << 32;
  if (counter < 0 || counter >= limit)
    invalid_argument("counter is %lld; it has 32 bits, 0 to 4294967295", static_cast<long long>(counter));
  if (blocks < 0 || blocks > limit - counter)
    invalid_argument(
        "%lld blocks from counter %lld on: RFC 8439's counter ends after %lld more and is not wrapped; use "
        "another "
        "nonce for the rest",
        static_cast<long long>(blocks), static_cast<long long>(counter),
        static_cast<long long>(limit - counter));
}

inline ChaChaState chacha20_state(const uint8_t* key, int64_t counter, const uint8_t* nonce, int64_t blocks) {
  if (key == nullptr || nonce == nullptr) invalid_argument("key or nonce is NULL");
  check_blocks(counter, blocks);
  ChaChaState state;
  memcpy(state.key, key, sizeof(state.key));
  memcpy(state.nonce, nonce, sizeof(state.nonce));
  state.counter = static_cast<uint32_t>(counter);
  return state;
}

// Blocks needed for `count` normals.
inline int64_t normal_blocks(int64_t count, dpk_dtype dtype) {
  if (count < 0) invalid_argument("count is %lld; it must be 0 or more", static_cast<long long>(count));
  if (dtype != DPK_F32 && dtype != DPK_F64) invalid_argument("dtype is %d; normals are F32 or F64", dtype);
  return count / kNormalsPerBlock + (count % kNormalsPerBlock != 0);
}

}  // namespace dpk

// Entry points of ChaCha20 on the CPU: checks, and pieces of the stream for the threads.
#include <algorithm>

#include "common/chacha20_arguments.h"
#include "common/parallel.h"
#include "cpu/chacha20_isa.h"

namespace dpk {
namespace {

constexpr int64_t kPieceBlocks = 2048;  // 16384 normals: some 100 µs

// Calls piece(state at the piece's first block, first block, blocks) for all pieces of the stream.
template <class Piece>
void for_each_piece(const ChaChaState& state, int64_t blocks, int32_t threads, Piece piece) {
  if (threads < 1) invalid_argument("threads is %d; it must be 1 or more", threads);
  parallel_for((blocks + kPieceBlocks - 1) / kPieceBlocks, threads, [&](int64_t index, int) {
    const int64_t first = index * kPieceBlocks;
    ChaChaState start = state;
    start.counter += static_cast<uint32_t>(first);
    piece(start, first, std::min(kPieceBlocks, blocks - first));
  });
}

}  // namespace
}  // namespace dpk

dpk_status dpk_cpu_chacha20_keystream(const uint8_t* key, int64_t counter, const uint8_t* nonce,
                                      int64_t blocks, int32_t threads, uint8_t* out) {
  return dpk::guard([&] {
    const dpk::ChaChaState state = dpk::chacha20_state(key, counter, nonce, blocks);
    const auto fill = DPK_DISPATCH(chacha20_keystream);
    dpk::for_each_piece(state, blocks, threads, [&](const dpk::ChaChaState& start, int64_t first, int64_t n) {
      fill(start, n, out + first * dpk::kChaChaBlockBytes);
    });
  });
}

dpk_status dpk_cpu_chacha20_normal(const uint8_t* key, int64_t counter, const uint8_t* nonce, int64_t count,
                                   dpk_dtype dtype, int32_t threads, void* out) {
  return dpk::guard([&] {
    const int64_t blocks = dpk::normal_blocks(count, dtype);
    const dpk::ChaChaState state = dpk::chacha20_state(key, counter, nonce, blocks);
    const auto f64 = DPK_DISPATCH(chacha20_normals_f64);
    const auto f32 = DPK_DISPATCH(chacha20_normals_f32);
    dpk::for_each_piece(state, blocks, threads, [&](const dpk::ChaChaState& start, int64_t block, int64_t n) {
      const int64_t first = block * dpk::kNormalsPerBlock;
      const int64_t size = std::min(n * dpk::kNormalsPerBlock, count - first);
      if (dtype == DPK_F64)
        f64(start, size, static_cast<double*>(out) + first);
      else
        f32(start, size, static_cast<float*>(out) + first);
    });
  });
}

dpk_status dpk_cpu_box_muller(const uint64_t* words, int64_t pairs, double* out) {
  return dpk::guard([&] {
    if (pairs < 0)
      dpk::invalid_argument("pairs is %lld; it must be 0 or more", static_cast<long long>(pairs));
    DPK_DISPATCH(box_mullers)(words, pairs, out);
  });
}

// ChaCha20 keystream and normals on the GPU: one block of the cipher per thread, in registers.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/chacha20_arguments.h"
#include "cuda/launch.h"

namespace dpk {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxGrid = 1 << 20;  // larger requests stride over it

__global__ void __launch_bounds__(kThreads)
    keystream_kernel(ChaChaState state, int64_t blocks, bool aligned, uint8_t* __restrict__ out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; block < blocks;
       block += stride) {
    uint32_t words[16];
    chacha20_block<uint32_t>(state, state.counter + static_cast<uint32_t>(block), words);
    uint8_t* target = out + block * kChaChaBlockBytes;
    if (aligned) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        reinterpret_cast<uint4*>(target)[i] =
            make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    } else {
      for (int i = 0; i < 64; ++i) target[i] = static_cast<uint8_t>(words[i / 4] >> (8 * (i % 4)));
    }
  }
}

// 8 normals of one block of the cipher, in pieces of 16 bytes.
__device__ __forceinline__ void store(double* out, const double (&z)[kNormalsPerBlock]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) reinterpret_cast<double2*>(out)[i] = make_double2(z[2 * i], z[2 * i + 1]);
}

__device__ __forceinline__ void store(float* out, const double (&z)[kNormalsPerBlock]) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    reinterpret_cast<float4*>(out)[i] =
        make_float4(static_cast<float>(z[4 * i]), static_cast<float>(z[4 * i + 1]),
                    static_cast<float>(z[4 * i + 2]), static_cast<float>(z[4 * i + 3]));
}

template <class Real>
__global__ void __launch_bounds__(kThreads)
    normal_kernel(ChaChaState state, int64_t blocks, int64_t count, bool aligned, Real* __restrict__ out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; block < blocks;
       block += stride) {
    uint32_t words[16];
    chacha20_block<uint32_t>(state, state.counter + static_cast<uint32_t>(block), words);
    double z[kNormalsPerBlock];
#pragma unroll
    for (int pair = 0; pair < kPairsPerBlock; ++pair) {
      const uint64_t w0 = words[4 * pair] | static_cast<uint64_t>(words[4 * pair + 1]) << 32;
      const uint64_t w1 = words[4 * pair + 2] | static_cast<uint64_t>(words[4 * pair + 3]) << 32;
      box_muller(w0, w1, &z[2 * pair], &z[2 * pair + 1]);
    }
    const int64_t first = block * kNormalsPerBlock;
    if (aligned && first + kNormalsPerBlock <= count) {
      store(out + first, z);
    } else {
#pragma unroll
      for (int i = 0; i < kNormalsPerBlock; ++i)
        if (first + i < count) out[first + i] = static_cast<Real>(z[i]);
    }
  }
}

bool aligned(const void* out) { return reinterpret_cast<uintptr_t>(out) % sizeof(uint4) == 0; }

int64_t grid(int64_t blocks) { return std::min((blocks + kThreads - 1) / kThreads, kMaxGrid); }

}  // namespace
}  // namespace dpk

dpk_status dpk_cuda_chacha20_keystream(const uint8_t* key, int64_t counter, const uint8_t* nonce,
                                       int64_t blocks, uint8_t* out, void* stream) {
  return dpk::guard([&] {
    const dpk::ChaChaState state = dpk::chacha20_state(key, counter, nonce, blocks);
    if (blocks == 0) return;
    dpk::launch(dpk::keystream_kernel, dpk::grid(blocks), dpk::kThreads, stream, state, blocks,
                dpk::aligned(out), out);
    dpk::check_launch("chacha20_keystream", blocks, "blocks");
  });
}

dpk_status dpk_cuda_chacha20_normal(const uint8_t* key, int64_t counter, const uint8_t* nonce, int64_t count,
                                    dpk_dtype dtype, void* out, void* stream) {
  return dpk::guard([&] {
    const int64_t blocks = dpk::normal_blocks(count, dtype);
    const dpk::ChaChaState state = dpk::chacha20_state(key, counter, nonce, blocks);
    if (blocks == 0) return;
    const bool aligned = dpk::aligned(out);
    if (dtype == DPK_F64)
      dpk::launch(dpk::normal_kernel<double>, dpk::grid(blocks), dpk::kThreads, stream, state, blocks, count,
                  aligned, static_cast<double*>(out));
    else
      dpk::launch(dpk::normal_kernel<float>, dpk::grid(blocks), dpk::kThreads, stream, state, blocks, count,
                  aligned, static_cast<float*>(out));
    dpk::check_launch("chacha20_normal", count, "normals");
  });
}

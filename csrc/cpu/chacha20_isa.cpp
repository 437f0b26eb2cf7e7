#include "cpu/chacha20_isa.h"

namespace dpk::DPK_ISA {
namespace {

// A block per lane; with as many lanes as a register has.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef uint32_t Lanes __attribute__((vector_size(4 * kLanes)));

// words[i][lane]: word i of block `first` + lane. Lanes past the counter's end wrap; no caller reads them.
inline void blocks_by_lane(const ChaChaState& state, uint32_t first, uint32_t words[16][kLanes]) {
  Lanes counter, out[16];
  for (int lane = 0; lane < kLanes; ++lane) counter[lane] = first + static_cast<uint32_t>(lane);
  chacha20_block<Lanes>(state, counter, out);
  memcpy(words, out, sizeof(out));
}

template <class Real>
void normals(const ChaChaState& state, int64_t count, Real* out) {
  uint32_t words[16][kLanes];
  Real pairs[kNormalsPerBlock][kLanes];
  for (int64_t done = 0; done < count; done += kLanes * kNormalsPerBlock) {
    blocks_by_lane(state, state.counter + static_cast<uint32_t>(done / kNormalsPerBlock), words);
    for (int pair = 0; pair < kPairsPerBlock; ++pair) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint64_t w0 = words[4 * pair][lane] | static_cast<uint64_t>(words[4 * pair + 1][lane]) << 32;
        const uint64_t w1 = words[4 * pair + 2][lane] | static_cast<uint64_t>(words[4 * pair + 3][lane])
                                                            << 32;
        double z0, z1;
        box_muller(w0, w1, &z0, &z1);
        pairs[2 * pair][lane] = static_cast<Real>(z0);
        pairs[2 * pair + 1][lane] = static_cast<Real>(z1);
      }
    }
    if (count - done >= kLanes * kNormalsPerBlock) {
      for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < kNormalsPerBlock; ++i) out[done + lane * kNormalsPerBlock + i] = pairs[i][lane];
    } else {
      for (int i = 0; i < count - done; ++i)
        out[done + i] = pairs[i % kNormalsPerBlock][i / kNormalsPerBlock];
    }
  }
}

}  // namespace

void chacha20_keystream(const ChaChaState& state, int64_t blocks, uint8_t* out) {
  uint32_t words[16][kLanes], block[16];
  for (int64_t done = 0; done < blocks; done += kLanes) {
    blocks_by_lane(state, state.counter + static_cast<uint32_t>(done), words);
    for (int lane = 0; lane < kLanes && done + lane < blocks; ++lane) {
      for (int i = 0; i < 16; ++i) block[i] = words[i][lane];
      memcpy(out + (done + lane) * kChaChaBlockBytes, block, sizeof(block));
    }
  }
}

void chacha20_normals_f64(const ChaChaState& state, int64_t count, double* out) {
  normals(state, count, out);
}

void chacha20_normals_f32(const ChaChaState& state, int64_t count, float* out) { normals(state, count, out); }

}  // namespace dpk::DPK_ISA

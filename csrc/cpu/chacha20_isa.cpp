#include "cpu/chacha20_isa.h"

#include "cpu/chacha20_lanes.h"

namespace dpk::DPK_ISA {

void chacha20_keystream(const ChaChaState& state, int64_t blocks, uint8_t* out) {
  uint32_t words[16][kBlockLanes], block[16];
  for (int64_t done = 0; done < blocks; done += kBlockLanes) {
    blocks_by_lane(state, state.counter + static_cast<uint32_t>(done), words);
    for (int lane = 0; lane < kBlockLanes && done + lane < blocks; ++lane) {
      for (int i = 0; i < 16; ++i) block[i] = words[i][lane];
      memcpy(out + (done + lane) * kChaChaBlockBytes, block, sizeof(block));
    }
  }
}

void chacha20_normals_f64(const ChaChaState& state, int64_t count, double* out) {
  normals(state, count, out);
}

void chacha20_normals_f32(const ChaChaState& state, int64_t count, float* out) { normals(state, count, out); }

void box_mullers(const uint64_t* words, int64_t pairs, double* out) {
  for (int64_t i = 0; i < pairs; ++i)
    box_muller(words[2 * i], words[2 * i + 1], out + 2 * i, out + 2 * i + 1);
}

}  // namespace dpk::DPK_ISA

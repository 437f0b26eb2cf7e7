// The blocks of memory that successive calls reuse, one a worker.
#include <atomic>
#include <utility>

#include "cpu/views.h"

namespace dpk {
namespace {

// A larger block is returned to the system, so that a rare long sample does not keep its memory for good. The
// first worker's also holds what the others share.
constexpr int64_t kMostKept = int64_t{8} << 20, kMostKeptFirst = int64_t{32} << 20;

// In front of the memory that is handed out, and as large as a cache line.
struct alignas(64) Header {
  int64_t bytes;
};

// The call that exchanges the pointer out owns the block, so there is no lock that a fork could find taken.
// Of two concurrent calls, the second allocates.
// Workers beyond these share them.
constexpr int kBlocks = 64;
std::atomic<Header*> kept[kBlocks];

}  // namespace

Workspace::Workspace(int64_t bytes, int worker) : worker_(worker % kBlocks) {
  Header* block = kept[worker_].exchange(nullptr);
  if (block == nullptr || block->bytes < bytes) {
    std::free(block);
    const int64_t size = round_to(bytes + static_cast<int64_t>(sizeof(Header)), alignof(Header));
    void* memory = std::aligned_alloc(alignof(Header), static_cast<size_t>(size));
    if (memory == nullptr) throw std::bad_alloc();
    block = new (memory) Header{size - static_cast<int64_t>(sizeof(Header))};
  }
  data_ = block + 1;
}

Workspace::~Workspace() {
  Header* block = static_cast<Header*>(data_) - 1;
  if (block->bytes <= (worker_ == 0 ? kMostKeptFirst : kMostKept)) block = kept[worker_].exchange(block);
  std::free(block);
}

}  // namespace dpk

// Loops over threads: those of the OpenMP runtime that the program (torch) has loaded, else those of a pool.
//
// The library is not linked with OpenMP: a second runtime next to torch's is a known hazard. At its
// first loop, the library looks for a loaded one.
//
//     dpk::parallel_for(samples, threads, [&](int64_t sample, int worker) { norm[sample] = ...; });
//
// runs the body for every index in [0, count), each index once, on at most `threads` threads (the caller is
// one of them), and returns when all are done. Indices are handed out one at a time in increasing order, so
// give each some 10 µs of work or more, and let no result depend on which worker did it: `worker` (0 <=
// worker < threads) is only for indexing scratch memory. The first exception of a body is rethrown in the
// caller; indices not yet started are then skipped.
//
// Threads are kept and reused. A call made from a body runs in its caller alone, and so does one made while
// the pool is busy. In a child process after fork() the threads are the pool's, started anew. If the
// system starts fewer threads, the loop uses fewer.
#pragma once

#include <cstdint>

namespace dpk {
namespace detail {

void parallel_run(int64_t count, int threads, void (*call)(void* body, int64_t index, int worker),
                  void* body);

}  // namespace detail

template <class Body>
void parallel_for(int64_t count, int threads, Body&& body) {
  detail::parallel_run(
      count, threads,
      [](void* target, int64_t index, int worker) { (*static_cast<Body*>(target))(index, worker); }, &body);
}

}  // namespace dpk

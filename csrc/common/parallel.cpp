#include "common/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "common/ieee.h"

namespace dpk::detail {
namespace {

using Call = void (*)(void*, int64_t, int);

struct Job {
  Job(int64_t count, Call call, void* body) : count(count), call(call), body(body) {}

  int64_t count;
  Call call;
  void* body;
  std::atomic<int64_t> next{0};
  std::atomic<int> joined{0};  // workers that have joined the job
  std::mutex mutex;
  std::exception_ptr error;

  void work(int worker) noexcept {
    const IeeeMode mode;  // a worker's own: it does not follow the caller's
    for (int64_t index = next.fetch_add(1); index < count; index = next.fetch_add(1)) {
      try {
        call(body, index, worker);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
        next = count;
      }
    }
  }
};

class Pool {
 public:
  // True once the job is done; false when another job holds the pool.
  bool run(Job& job, int threads) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    const int helpers = start(threads - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = running_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    job.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return running_ == 0; });
    lock.unlock();
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  // Starts threads until there are `helpers`; returns how many there are.
  int start(int helpers) {
    // Signals stay with the threads that the host program (Python) knows of.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; started_ < helpers; ++started_)
        std::thread(&Pool::help, this, started_ + 1, generation_).detach();
    } catch (const std::system_error&) {
      // The system's limit on threads: the job is done by those there are.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return std::min(started_, helpers);
  }

  void help(int worker, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (worker > wanted_) continue;
      Job& job = *job_;
      lock.unlock();
      job.work(worker);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::atomic<bool> busy_{false};  // true for the whole of a job
  int started_ = 0;                // used by the caller that made it busy
  std::mutex mutex_;               // guards what follows
  std::condition_variable wake_, done_;
  uint64_t generation_ = 0;
  Job* job_ = nullptr;
  int wanted_ = 0, running_ = 0;
};

// Never destroyed: its threads wait on it until the process ends. Replaced, not repaired, in a forked child,
// where its threads do not exist and its mutexes may be held by one of them.
std::atomic<Pool*> current{nullptr};

// In a forked child libgomp would wait for the parent's threads, which do not exist there.
std::atomic<bool> forked{false};

// When the library is loaded, not at the first loop: a parent that forks before its first loop may have used
// OpenMP already. A fork before this library is loaded goes unnoticed.
[[gnu::constructor]] void watch_forks() {
  current = new Pool;
  if (pthread_atfork(nullptr, nullptr, [] {
        current = new Pool;
        forked = true;
      }) != 0)
    forked = true;  // forks cannot be detected without memory, so OpenMP is never used
}

// libgomp's entry point of `#pragma omp parallel`, also exported by LLVM's and Intel's runtimes; null where
// no OpenMP runtime is in the program.
using OpenMp = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

OpenMp open_mp() {
#if defined(__SANITIZE_THREAD__)
  // Its threads meet by futexes, which ThreadSanitizer does not see; it sees the mutexes of the pool.
  return nullptr;
#endif
  static const OpenMp found = reinterpret_cast<OpenMp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked ? nullptr : found;
}

struct Team {
  Job& job;
  int threads;
};

// On the program's own OpenMP threads: torch's. They spin for a while after each of its loops, so that a
// thread of ours would share a core with them; measured on two cores after a torch.mm, a weighted sum of 1.0
// ms took 1.7 ms.
void run_open_mp(OpenMp run, Job& job, int threads) {
  Team team{job, threads};
  // 0: as many as the runtime's own setting says, which is torch's. Another number would make it end threads
  // and start new ones. Those too many return at once.
  run(
      [](void* data) {
        const Team& team = *static_cast<Team*>(data);
        const int worker = team.job.joined.fetch_add(1);
        if (worker < team.threads) team.job.work(worker);
      },
      &team, 0, 0);
}

}  // namespace

void parallel_run(int64_t count, int threads, Call call, void* body) {
  Job job(count, call, body);
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    job.work(0);
  } else {
    if (const OpenMp run = open_mp())
      run_open_mp(run, job, threads);
    else if (!current.load()->run(job, threads))
      job.work(0);
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace dpk::detail

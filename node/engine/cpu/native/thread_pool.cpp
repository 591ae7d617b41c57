#include "thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace swarmd {
namespace {

// Between the steps of a busy pipeline pass some tens of microseconds, less than it takes to wake a sleeping thread.
constexpr int kSpinsBeforeSleep = 3000;
// Within a step a thread that waits longer than this has probably no core of its own beside the one it waits for.
constexpr int kSpinsBeforeYield = 1500;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

template <typename Done>
void spin_until(const Done &done) {
  for (int spins = 0; !done(); spins++) {
    if (spins < kSpinsBeforeYield) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace

ThreadPool::ThreadPool(int threads) : count_(threads) {
  for (int thread = 1; thread < count_; thread++) workers_.emplace_back([this, thread] { serve(thread); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
    round_++;
  }
  wake_.notify_all();
  for (std::thread &worker : workers_) worker.join();
}

void ThreadPool::run_erased(Entry entry, const void *job) {
  Team team(count_);
  if (count_ == 1) return entry(job, team, 0);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    entry_ = entry;
    job_ = job;
    team_ = &team;
    running_ = count_ - 1;
    round_++;
  }
  wake_.notify_all();
  entry(job, team, 0);
  spin_until([this] { return running_.load(std::memory_order_acquire) == 0; });
}

void ThreadPool::serve(int thread) {
  unsigned seen = 0;
  while (true) {
    for (int spins = 0; spins < kSpinsBeforeSleep && round_.load(std::memory_order_acquire) == seen; spins++) relax();
    Entry entry;
    const void *job;
    Team *team;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
      if (ending_) return;
      seen = round_;
      entry = entry_;
      job = job_;
      team = team_;
    }
    entry(job, *team, thread);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

void Team::meet() {
  if (count_ == 1) {
    alone_ = 0;
    return;
  }
  const unsigned phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
  } else {
    spin_until([&] { return phase_.load(std::memory_order_acquire) != phase; });
  }
}

}  // namespace swarmd

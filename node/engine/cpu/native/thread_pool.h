// A small pool whose threads run one function together, phase by phase.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace swarmd {

class Team;

// Threads that sleep between jobs. The calling thread takes part in every job.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  int threads() const { return count_; }

  // Runs job(team, thread) on all threads; returns when all are done. Not reentrant.
  template <typename Job>
  void run(const Job &job) {
    run_erased([](const void *job, Team &team, int thread) { (*static_cast<const Job *>(job))(team, thread); }, &job);
  }

 private:
  friend class Team;
  using Entry = void (*)(const void *job, Team &team, int thread);
  void run_erased(Entry entry, const void *job);
  void serve(int thread);

  const int count_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<unsigned> round_{0};
  std::atomic<int> running_{0};
  bool ending_ = false;
  Entry entry_ = nullptr;
  const void *job_ = nullptr;
  Team *team_ = nullptr;
};

// What the threads of one job share: a barrier, and the work of a phase, which whoever is free takes piece by piece. So
// a thread that is held up (another process has its core) holds up only the piece that it has in hand.
class Team {
 public:
  explicit Team(int threads) : count_(threads) {}
  int threads() const { return count_; }

  // The beginning of the next `size` pieces of this phase that nobody has taken.
  int take(int size) { return count_ == 1 ? take_alone(size) : next_.fetch_add(size, std::memory_order_relaxed); }

  // Waits for all; the next phase begins with nothing taken.
  void meet();

 private:
  int take_alone(int size) {
    const int begin = alone_;
    alone_ += size;
    return begin;
  }

  const int count_;
  int alone_ = 0;
  std::atomic<int> next_{0};
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

}  // namespace swarmd

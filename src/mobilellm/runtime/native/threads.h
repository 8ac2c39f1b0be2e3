// A few threads that run one function together and meet at barriers within it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace mobilellm {

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Run job(context, thread) on all threads, the caller's among them as number 0; return when all are done.
  void run(void (*job)(void*, int), void* context);

  // For use within a job, by all threads alike:

  // Wait for the others. Between two meetings the threads share out one piece of work with `take`.
  void meet();
  // The first of the next `chunk` pieces that nobody has taken.
  int take(int chunk) { return taken_.fetch_add(chunk, std::memory_order_relaxed); }
  // Whether `cancel` was called before the last meeting: the same answer for all.
  bool stopped() const { return stopped_; }

  // From any thread: the job that runs is to stop.
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }

 private:
  void work(int thread);

  const int size_;
  std::vector<std::thread> workers_;

  alignas(64) std::atomic<int> taken_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> meeting_{0};
  bool stopped_ = false;
  std::atomic<bool> cancelled_{false};

  alignas(64) std::atomic<uint32_t> jobs_{0};
  void (*job_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> leaving_{false};
  std::mutex mutex_;
  std::condition_variable called_;
};

}  // namespace mobilellm

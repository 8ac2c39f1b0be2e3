// A few threads that run one function together and meet at barriers within it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace mobilellm {

constexpr int kMostThreads = 256;

class Team {
 public:
  explicit Team(int threads);  // throws as `use`
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Between jobs: the next ones run on so many threads, kMostThreads at most. Those that are not there yet are started,
  // and those that are too many sleep. Throws std::system_error where they cannot be started; all is as before then.
  void use(int threads);
  int size() const { return size_; }

  // Run job(context, thread) on all threads, the caller's among them as number 0; return when all are done.
  void run(void (*job)(void*, int), void* context);

  // For use within a job, by all threads alike:

  // Wait for the others. Between two meetings the threads share out one piece of work with `Shares`.
  void meet(int thread);
  // Whether `cancel` was called before the last meeting: the same answer for all.
  bool stopped(int thread) const { return stopped_[meetings(thread) & 1]; }

  // From any thread: the job that runs is to stop.
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }

 private:
  friend class Shares;
  void work(int thread);
  void call(int thread);
  void leave();
  uint32_t meetings(int thread) const { return members_[size_t(thread)].meetings.load(std::memory_order_relaxed); }

  int size_ = 1;

  struct Member {
    // The meetings a thread has come to. Each looks at the others' numbers: one way between processors, where a
    // common number and a sign from the last to come would be three.
    alignas(64) std::atomic<uint32_t> meetings{0};
    // How far its part of the work is taken: by turns one for this work and one that is 0 for the next.
    alignas(64) std::atomic<int> taken[2] = {0, 0};
    // The jobs it was called to: each is called by itself, so that who is not needed sleeps on.
    alignas(64) std::atomic<uint32_t> jobs{0};
    std::mutex mutex;
    std::condition_variable called;
  };
  std::vector<Member> members_;
  bool stopped_[2] = {false, false};  // of even and odd meetings: the first thread may be one ahead
  alignas(64) std::atomic<bool> cancelled_{false};

  void (*job_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> leaving_{false};
  std::vector<std::thread> workers_;  // as many as were ever needed, the last to be made
};

// One thread's way through `count` pieces of work, some at a time: its own part of them in order, which is the
// same whenever the work is, so that it may find in its cache what it left there, and then what others have not
// come to. Between two meetings there is one work. `bulk`: most of its own part is taken at once and the rest piece by
// piece, for taking waits until all that the thread has written is seen by others: of small pieces, longer than they
// take.
class Shares {
 public:
  Shares(Team& team, int thread, int count, int chunk, bool bulk = false)
      : team_(team), turn_(team.meetings(thread) & 1), thread_(thread), count_(count), chunk_(chunk), take_(chunk) {
    const int most = (start(thread + 1) - start(thread)) * 7 / 8;
    if (bulk && most > chunk) take_ = most;
  }

  // Whether there are more: pieces first ... end - 1.
  bool next() {
    for (; part_ < team_.size_; ++part_, take_ = chunk_) {
      const int whose = (thread_ + part_) % team_.size_, begin = start(whose), size = start(whose + 1) - begin;
      std::atomic<int>& counter = team_.members_[size_t(whose)].taken[turn_];
      if (counter.load(std::memory_order_relaxed) >= size) continue;
      const int taken = counter.fetch_add(take_, std::memory_order_relaxed);
      if (taken >= size) continue;
      first = begin + taken;
      end = begin + (taken + take_ < size ? taken + take_ : size);
      take_ = chunk_;
      return true;
    }
    return false;
  }

  int first = 0, end = 0;

 private:
  int start(int whose) const { return int(int64_t(count_) * whose / team_.size_); }

  Team& team_;
  const unsigned turn_;
  const int thread_, count_, chunk_;
  int take_;
  int part_ = 0;
};

}  // namespace mobilellm

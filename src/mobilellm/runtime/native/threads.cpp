#include "threads.h"

namespace mobilellm {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A few microseconds of looking, then the processor is offered to others: on a busy machine the thread that is
// waited for may need it. Where two threads had one processor's time between them, a token of 125M took 1.1
// times as long as with one thread; with 400 looks 1.2 times, with 3,000 twice.
constexpr int kLooks = 100;
// A worker without a job looks on for about as long as a sampler takes between two tokens, and then sleeps.
constexpr int kIdleLooks = 4000;

template <typename Done>
void wait_until(const Done& done) {
  for (int look = 0; !done(); ++look) {
    if (look < kLooks) pause();
    else std::this_thread::yield();
  }
}

}  // namespace

Team::Team(int threads) : size_(threads), members_(size_t(threads)) {
  try {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
  } catch (...) {
    leaving_ = true;
    { std::lock_guard<std::mutex> lock(mutex_); ++jobs_; }
    called_.notify_all();
    for (auto& worker : workers_) worker.join();
    throw;
  }
}

Team::~Team() {
  leaving_ = true;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++jobs_;
  }
  called_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Team::run(void (*job)(void*, int), void* context) {
  cancelled_ = false;
  if (size_ > 1) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job, context_ = context;
      jobs_.fetch_add(1, std::memory_order_release);
    }
    called_.notify_all();
  }
  job(context, 0);
  meet(0);
}

void Team::work(int thread) {
  for (uint32_t seen = 0;; ++seen) {
    const auto called = [&] { return jobs_.load(std::memory_order_acquire) != seen; };
    for (int look = 0; look < kIdleLooks && !called(); ++look) pause();
    if (!called()) {
      std::unique_lock<std::mutex> lock(mutex_);
      called_.wait(lock, called);
    }
    if (leaving_) return;
    job_(context_, thread);
    meet(thread);
  }
}

void Team::meet(int thread) {
  Member& own = members_[size_t(thread)];
  const uint32_t meeting = meetings(thread) + 1;
  own.taken[meeting & 1].store(0, std::memory_order_relaxed);  // all have left the work before this
  if (thread == 0) stopped_[meeting & 1] = cancelled_.load(std::memory_order_relaxed);
  own.meetings.store(meeting, std::memory_order_release);
  for (const Member& other : members_) {  // which may be one meeting ahead
    wait_until([&] { return int32_t(other.meetings.load(std::memory_order_acquire) - meeting) >= 0; });
  }
}

}  // namespace mobilellm

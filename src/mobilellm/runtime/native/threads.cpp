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

Team::Team(int threads) : members_(size_t(kMostThreads)) {
  try {
    use(threads);
  } catch (...) {
    leave();
    throw;
  }
}

Team::~Team() { leave(); }

void Team::leave() {
  leaving_ = true;
  for (size_t i = 0; i < workers_.size(); ++i) call(int(i) + 1);
  for (auto& worker : workers_) worker.join();
}

void Team::use(int threads) {
  while (int(workers_.size()) + 1 < threads) {
    workers_.emplace_back([this, thread = int(workers_.size()) + 1] { work(thread); });
  }
  for (int thread = size_; thread < threads; ++thread) {  // who comes back has missed meetings
    members_[size_t(thread)].meetings.store(meetings(0), std::memory_order_relaxed);
    for (auto& taken : members_[size_t(thread)].taken) taken.store(0, std::memory_order_relaxed);
  }
  size_ = threads;
}

void Team::run(void (*job)(void*, int), void* context) {
  cancelled_ = false;
  job_ = job, context_ = context;
  for (int thread = 1; thread < size_; ++thread) call(thread);
  job(context, 0);
  meet(0);
}

void Team::call(int thread) {
  Member& member = members_[size_t(thread)];
  {
    std::lock_guard<std::mutex> lock(member.mutex);
    member.jobs.fetch_add(1, std::memory_order_release);
  }
  member.called.notify_one();
}

void Team::work(int thread) {
  Member& own = members_[size_t(thread)];
  for (uint32_t seen = 0;; ++seen) {
    const auto called = [&] { return own.jobs.load(std::memory_order_acquire) != seen; };
    for (int look = 0; look < kIdleLooks && !called(); ++look) pause();
    if (!called()) {
      std::unique_lock<std::mutex> lock(own.mutex);
      own.called.wait(lock, called);
    }
    if (leaving_) return;
    job_(context_, thread);
    meet(thread);
  }
}

void Team::meet(int thread) {
  Member& own = members_[size_t(thread)];
  const uint32_t meeting = meetings(thread) + 1;
  const int size = size_;  // which may change once all have come
  own.taken[meeting & 1].store(0, std::memory_order_relaxed);  // all have left the work before this
  if (thread == 0) stopped_[meeting & 1] = cancelled_.load(std::memory_order_relaxed);
  own.meetings.store(meeting, std::memory_order_release);
  for (int other = 0; other < size; ++other) {  // which may be one meeting ahead
    const auto& its = members_[size_t(other)].meetings;
    wait_until([&] { return int32_t(its.load(std::memory_order_acquire) - meeting) >= 0; });
  }
}

}  // namespace mobilellm

// When the instructions of a step ran: the last run of every process, always on.
#ifndef SMP_TF_KERNELS_TIMELINE_H_
#define SMP_TF_KERNELS_TIMELINE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

namespace smp {

// One thing that happened; the same bytes for C and for Python (transport/events.py).
struct Event {
  int32_t program = -1;  // number of the step's program in this process
  int32_t event = -1;    // index of its instruction, or one of the two below
  int64_t run = 0;       // counts the runs of all programs of this process, from 1
  int64_t start_ns = 0;  // of std::chrono::steady_clock
  int64_t end_ns = 0;
  int64_t bytes = 0;  // moved, where something was moved
};

constexpr int32_t kRunBegin = -1;
constexpr int32_t kRunEnd = -2;

// Records what belongs to the run that is open. Runs take turns (see emit.py); one that
// begins before the other has ended takes its place, and what the other one had is
// lost.
class Timeline {
 public:
  // What is known when a thing begins; `run` 0: nobody wants to know.
  struct Start {
    int32_t program = -1;
    int32_t event = -1;
    int64_t run = 0;
    int64_t ns = 0;
  };

  void BeginRun(int32_t program);
  void EndRun(int32_t program);

  // A negative `event` is not recorded. End may come from any thread, and never.
  Start Begin(int32_t program, int32_t event) const;
  void End(const Start& start, int64_t bytes);

  // Copies the events of the last complete run, in the order of their ends, as far as
  // they fit. Returns how many there are.
  size_t Last(Event* out, size_t capacity) const;

  // From now on, keeps complete runs, `max_events` in all, until they are taken: the
  // oldest runs give way. Forgets what was kept before; 0 keeps nothing.
  void Keep(size_t max_events);

  // Moves the oldest kept runs that fit, as whole runs; returns how many events.
  // Without a buffer, returns how many there are to take.
  size_t Take(Event* out, size_t capacity);

  // Events that were kept and gave way, since Keep.
  int64_t dropped() const;

 private:
  void KeepLast();  // requires mutex_

  std::atomic<int64_t> run_{0};  // the one that is open; 0: none
  mutable std::mutex mutex_;
  int64_t runs_ = 0;
  std::vector<Event> open_, last_;
  std::deque<std::vector<Event>> kept_;
  size_t num_kept_ = 0, max_kept_ = 0;
  int64_t dropped_ = 0;
};

// That of this process; never destroyed, as threads may outlive main().
Timeline& GetTimeline();

}  // namespace smp

#endif  // SMP_TF_KERNELS_TIMELINE_H_

#include "timeline.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace smp {
namespace {

int64_t NowNs() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

size_t Copy(const std::vector<Event>& events, Event* out, size_t capacity) {
  std::copy_n(events.begin(), std::min(events.size(), capacity), out);
  return events.size();
}

}  // namespace

Timeline& GetTimeline() {
  static auto* timeline = new Timeline;
  return *timeline;
}

void Timeline::BeginRun(int32_t program) {
  const int64_t now = NowNs();
  std::lock_guard<std::mutex> lock(mutex_);
  open_.clear();
  open_.push_back({program, kRunBegin, ++runs_, now, now, 0});
  run_.store(runs_, std::memory_order_relaxed);
}

void Timeline::EndRun(int32_t program) {
  const int64_t now = NowNs();
  std::lock_guard<std::mutex> lock(mutex_);
  if (open_.empty() || open_.front().program != program) return;
  open_.push_back({program, kRunEnd, open_.front().run, now, now, 0});
  run_.store(0, std::memory_order_relaxed);
  last_.swap(open_);
  open_.clear();  // its memory serves the next run
  KeepLast();
}

Timeline::Start Timeline::Begin(int32_t program, int32_t event) const {
  if (event < 0) return {};
  const int64_t run = run_.load(std::memory_order_relaxed);
  if (run == 0) return {};
  return {program, event, run, NowNs()};
}

void Timeline::End(const Start& start, int64_t bytes) {
  if (start.run == 0) return;
  const int64_t now = NowNs();
  std::lock_guard<std::mutex> lock(mutex_);
  if (open_.empty() || open_.front().run != start.run) return;  // its run is over
  open_.push_back({start.program, start.event, start.run, start.ns, now, bytes});
}

size_t Timeline::Last(Event* out, size_t capacity) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return Copy(last_, out, capacity);
}

void Timeline::Keep(size_t max_events) {
  std::lock_guard<std::mutex> lock(mutex_);
  kept_.clear();
  num_kept_ = 0;
  max_kept_ = max_events;
  dropped_ = 0;
}

void Timeline::KeepLast() {
  if (max_kept_ == 0) return;
  num_kept_ += last_.size();
  kept_.push_back(last_);
  while (num_kept_ > max_kept_) {
    const size_t size = kept_.front().size();
    num_kept_ -= size;
    dropped_ += static_cast<int64_t>(size);
    kept_.pop_front();
  }
}

size_t Timeline::Take(Event* out, size_t capacity) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (out == nullptr) return num_kept_;
  size_t taken = 0;
  while (!kept_.empty() && taken + kept_.front().size() <= capacity) {
    taken += Copy(kept_.front(), out + taken, capacity - taken);
    kept_.pop_front();
  }
  num_kept_ -= taken;
  return taken;
}

int64_t Timeline::dropped() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return dropped_;
}

}  // namespace smp

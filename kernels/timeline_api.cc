// The C interface of the timeline, for ctypes. Any thread may call it; nothing fails.
#include <algorithm>

#include "timeline.h"

#define SMP_API extern "C" __attribute__((visibility("default")))

using smp::GetTimeline;

// Events of the last complete run: writes `capacity` of them, returns how many there
// are.
SMP_API int64_t smp_events_last(smp::Event* out, int64_t capacity) {
  return static_cast<int64_t>(
      GetTimeline().Last(out, static_cast<size_t>(std::max<int64_t>(capacity, 0))));
}

// Moves whole kept runs, the oldest first, as far as they fit; returns how many events.
// `out` NULL: how many could be taken.
SMP_API int64_t smp_events_take(smp::Event* out, int64_t capacity) {
  return static_cast<int64_t>(
      GetTimeline().Take(out, static_cast<size_t>(std::max<int64_t>(capacity, 0))));
}

// Keeps complete runs until they are taken, `max_events` in all; 0: keeps none.
SMP_API int64_t smp_events_keep(int64_t max_events) {
  GetTimeline().Keep(static_cast<size_t>(std::max<int64_t>(max_events, 0)));
  return 0;
}

// Events that gave way since smp_events_keep.
SMP_API int64_t smp_events_dropped() { return GetTimeline().dropped(); }

// The recorder of events: runs, what is kept of them, and many threads at once.
#include "../timeline.h"

#include <atomic>
#include <thread>

#include "testing.h"

namespace smp {
namespace {

// A run of three events, `first` and two more.
void Run(Timeline* timeline, int32_t program, int32_t first) {
  timeline->BeginRun(program);
  for (int32_t event = first; event < first + 3; ++event) {
    timeline->End(timeline->Begin(program, event), event * 100);
  }
  timeline->EndRun(program);
}

std::vector<Event> Last(const Timeline& timeline) {
  std::vector<Event> events(timeline.Last(nullptr, 0));
  CHECK_EQ(timeline.Last(events.data(), events.size()), events.size());
  return events;
}

int64_t LastRun(const Timeline& timeline) { return Last(timeline).front().run; }

void TestTheLastRunIsThere() {
  Timeline timeline;
  CHECK(Last(timeline).empty());
  Run(&timeline, 7, 10);
  Run(&timeline, 8, 20);
  const std::vector<Event> events = Last(timeline);
  CHECK_EQ(events.size(), 5u);
  CHECK_EQ(events.front().event, kRunBegin);
  CHECK_EQ(events.back().event, kRunEnd);
  for (size_t i = 0; i < events.size(); ++i) {
    CHECK_EQ(events[i].program, 8);
    CHECK_EQ(events[i].run, 2);
    CHECK(events[i].start_ns > 0 && events[i].start_ns <= events[i].end_ns);
    CHECK(i == 0 || events[i - 1].end_ns <= events[i].end_ns);
  }
  CHECK_EQ(events[1].event, 20);
  CHECK_EQ(events[1].bytes, 2000);
  Event one;
  CHECK_EQ(timeline.Last(&one, 1), 5u);  // says how many there are
  CHECK_EQ(one.event, kRunBegin);
}

void TestAnEventMayEndLaterThanTheNextOne() {
  Timeline timeline;
  timeline.BeginRun(1);
  const Timeline::Start send = timeline.Begin(1, 0);
  timeline.End(timeline.Begin(1, 1), 0);
  timeline.End(send, 8);
  timeline.EndRun(1);
  const std::vector<Event> events = Last(timeline);
  CHECK_EQ(events[1].event, 1);
  CHECK_EQ(events[2].event, 0);
  CHECK(events[2].start_ns <= events[1].start_ns);
}

void TestWhatBelongsToNoOpenRunIsLost() {
  Timeline timeline;
  timeline.End(timeline.Begin(1, 0), 0);  // no run yet
  timeline.EndRun(1);
  timeline.BeginRun(1);
  timeline.End(timeline.Begin(1, -1), 0);  // not to be recorded
  const Timeline::Start late = timeline.Begin(1, 0);
  timeline.EndRun(1);
  timeline.End(late, 0);
  CHECK_EQ(Last(timeline).size(), 2u);
  timeline.BeginRun(1);
  const Timeline::Start given_up = timeline.Begin(1, 0);
  timeline.BeginRun(2);  // the first one failed, or they do not take turns
  timeline.End(given_up, 0);
  timeline.EndRun(1);
  CHECK_EQ(LastRun(timeline), 1);
  timeline.EndRun(2);
  CHECK_EQ(Last(timeline).size(), 2u);
  CHECK_EQ(LastRun(timeline), 3);
}

void TestOldRunsGiveWayAsWholes() {
  Timeline timeline;
  Run(&timeline, 1, 0);
  CHECK_EQ(timeline.Take(nullptr, 0), 0u);  // nothing is kept before Keep
  timeline.Keep(12);
  for (int i = 0; i < 3; ++i) Run(&timeline, 1, 0);
  CHECK_EQ(timeline.Take(nullptr, 0), 10u);
  CHECK_EQ(timeline.dropped(), 5);
  std::vector<Event> events(9);
  CHECK_EQ(timeline.Take(events.data(), events.size()), 5u);  // whole runs only
  CHECK_EQ(events[0].run, 3);
  CHECK_EQ(timeline.Take(events.data(), events.size()), 5u);
  CHECK_EQ(events[0].run, 4);
  CHECK_EQ(timeline.Take(nullptr, 0), 0u);
  CHECK_EQ(Last(timeline).size(), 5u);  // still there
  timeline.Keep(4);
  CHECK_EQ(timeline.dropped(), 0);
  Run(&timeline, 1, 0);  // longer than all that may be kept
  CHECK_EQ(timeline.Take(nullptr, 0), 0u);
  CHECK_EQ(timeline.dropped(), 5);
  timeline.Keep(0);
  Run(&timeline, 1, 0);
  CHECK_EQ(timeline.Take(nullptr, 0), 0u);
  CHECK_EQ(timeline.dropped(), 0);
}

void TestThreadsDoNotDisturbEachOther() {
  constexpr int kThreads = 4, kEvents = 1000;
  Timeline timeline;
  timeline.Keep(100 * kThreads * kEvents);
  std::atomic<bool> over{false};
  std::thread reader([&] {
    std::vector<Event> events(1000);
    while (!over) timeline.Last(events.data(), events.size());
  });
  for (int run = 0; run < 5; ++run) {
    timeline.BeginRun(run);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&timeline, run, thread] {
        for (int i = 0; i < kEvents; ++i) {
          timeline.End(timeline.Begin(run, thread * kEvents + i), 1);
        }
      });
    }
    for (auto& thread : threads) thread.join();
    timeline.EndRun(run);
    CHECK_EQ(Last(timeline).size(), size_t{kThreads * kEvents + 2});
  }
  over = true;
  reader.join();
  CHECK_EQ(timeline.Take(nullptr, 0), size_t{5 * (kThreads * kEvents + 2)});
}

}  // namespace
}  // namespace smp

int main() {
  smp::TestTheLastRunIsThere();
  smp::TestAnEventMayEndLaterThanTheNextOne();
  smp::TestWhatBelongsToNoOpenRunIsLost();
  smp::TestOldRunsGiveWayAsWholes();
  smp::TestThreadsDoNotDisturbEachOther();
  std::puts("ok   timeline_test");
}

#include "watch.h"

#include <cstdio>
#include <utility>
#include <vector>

namespace smp {
namespace {

std::string Seconds(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g s", value);
  return text;
}

}  // namespace

Watch::Watch(double timeout_seconds, double stall_seconds, Expire expire, Warn warn)
    : timeout_seconds_(timeout_seconds),
      stall_seconds_(stall_seconds),
      expire_(std::move(expire)),
      warn_(std::move(warn)) {}

void Watch::Add(const TicketPtr& ticket) {
  std::lock_guard<std::mutex> lock(mutex_);
  entries_.emplace(ticket->id(), Entry{ticket, Clock::now()});
}

void Watch::Remove(uint64_t id) {
  std::lock_guard<std::mutex> lock(mutex_);
  entries_.erase(id);
}

void Watch::Restart(const std::vector<uint64_t>& ids) {
  const auto now = Clock::now();
  std::lock_guard<std::mutex> lock(mutex_);
  for (const uint64_t id : ids) {
    const auto found = entries_.find(id);
    if (found != entries_.end()) found->second.since = now;
  }
}

void Watch::Tick(Clock::time_point now) {
  std::vector<TicketPtr> expired, stalled;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [id, entry] : entries_) {
      const double waited = std::chrono::duration<double>(now - entry.since).count();
      if (waited >= timeout_seconds_) {
        expired.push_back(entry.ticket);
      } else if (waited >= stall_seconds_ && !entry.warned) {
        entry.warned = true;
        stalled.push_back(entry.ticket);
      }
    }
    // Once is enough: what is expired leaves the watch whatever becomes of it.
    for (const auto& ticket : expired) entries_.erase(ticket->id());
  }
  // Outside the lock: both lead to other objects, which may come back here.
  for (const auto& ticket : stalled) {
    warn_("waiting for more than " + Seconds(stall_seconds_) + ": " +
          ticket->Describe() + "; fails after timeout_s=" + Seconds(timeout_seconds_));
  }
  for (const auto& ticket : expired) {
    expire_(ticket,
            {Code::kDeadline, "waited for timeout_s=" + Seconds(timeout_seconds_) +
                                  " (the peer is stopped, cut off or slow)"});
  }
}

}  // namespace smp

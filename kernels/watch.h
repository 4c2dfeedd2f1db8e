// Who waits for whom, and for how long: warns of a stall, then fails the wait.
#ifndef SMP_TF_KERNELS_WATCH_H_
#define SMP_TF_KERNELS_WATCH_H_

#include <chrono>
#include <functional>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "ticket.h"

namespace smp {

class Watch {
 public:
  using Clock = std::chrono::steady_clock;
  using Expire = std::function<void(const TicketPtr&, const Status&)>;
  using Warn = std::function<void(const std::string&)>;

  // A wait is warned about once, after `stall_seconds`, and handed to `expire` after
  // `timeout_seconds`. Times count from Add, that is from the wait, not from the post.
  Watch(double timeout_seconds, double stall_seconds, Expire expire, Warn warn);

  void Add(const TicketPtr& ticket);
  void Remove(uint64_t id);

  // Their times count from here, those that are watched.
  void Restart(const std::vector<uint64_t>& ids);

  // To be called every now and then; a deadline is met no sharper than that.
  void Tick(Clock::time_point now);

 private:
  struct Entry {
    TicketPtr ticket;
    Clock::time_point since;
    bool warned = false;
  };

  const double timeout_seconds_;
  const double stall_seconds_;
  const Expire expire_;
  const Warn warn_;
  std::mutex mutex_;
  std::unordered_map<uint64_t, Entry> entries_;
};

}  // namespace smp

#endif  // SMP_TF_KERNELS_WATCH_H_

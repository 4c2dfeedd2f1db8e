// The state of one send, receive or flush, shared by whoever waits for it.
#ifndef SMP_TF_KERNELS_TICKET_H_
#define SMP_TF_KERNELS_TICKET_H_

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "transport.h"

namespace smp {

// One direction of a channel, as errors name it.
struct Route {
  int peer = -1;
  uint32_t channel = 0;
  std::string label;  // "stage 0 microbatch 2 dense/Relu:0"; may be empty
};
using RoutePtr = std::shared_ptr<const Route>;

class Ticket {
 public:
  enum class Way { kSend, kRecv, kFlush, kSum };

  // `oldest`: the way of the message that a flush waits for.
  Ticket(Way way, RoutePtr route, uint32_t sequence, Way oldest = Way::kSend)
      : id_(NextId()),
        way_(way),
        oldest_(way == Way::kFlush ? oldest : way),
        route_(std::move(route)),
        sequence_(sequence) {}

  uint64_t id() const { return id_; }
  Way way() const { return way_; }
  const RoutePtr& route() const { return route_; }
  uint32_t sequence() const { return sequence_; }

  // "receive of dense/Relu:0 from rank 1, channel 7, step 3"
  std::string Describe() const;

  // The first call counts. An error gets Describe() appended.
  void Finish(const Status& status);

  // Runs `done` when finished, at once if it is. At most one caller.
  void OnFinish(Done done);

  // Whether it is finished, within `seconds`.
  bool WaitFor(double seconds);

  bool finished();
  Status status();  // meaningful once finished

 private:
  const uint64_t id_;
  const Way way_, oldest_;
  const RoutePtr route_;
  const uint32_t sequence_;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool finished_ = false;
  Status status_;
  Done done_;
};
using TicketPtr = std::shared_ptr<Ticket>;

}  // namespace smp

#endif  // SMP_TF_KERNELS_TICKET_H_

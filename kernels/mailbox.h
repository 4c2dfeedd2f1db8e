// Turns routes into messages: numbers them, keeps posted receives until somebody
// waits for them, and knows which sends are still on their way.
#ifndef SMP_TF_KERNELS_MAILBOX_H_
#define SMP_TF_KERNELS_MAILBOX_H_

#include <deque>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ticket.h"
#include "transport.h"
#include "watch.h"

namespace smp {

// A receive that was posted and not waited for yet.
struct Posted {
  TicketPtr ticket;  // null: there is none
  std::shared_ptr<void> owner;
  int64_t run = 0;
};

class Mailbox {
 public:
  // `transport` and `watch` must outlive the mailbox.
  Mailbox(int rank, int size, Transport* transport, Watch* watch);

  // Sends and receives that take the route's next sequence number.
  TicketPtr Send(const RoutePtr& route, Buffer buffer, bool synchronous);
  TicketPtr Recv(const RoutePtr& route, Part part, Buffer buffer);

  // The payload that belongs to a header that was received.
  TicketPtr RecvPayload(const TicketPtr& header, Buffer buffer);

  // A send that Flush answers for. Returns an error that is known at once. `sent` is
  // called when the payload has left or failed, before a Flush is finished by that.
  Status PostSend(const RoutePtr& route, const Buffer* header, Buffer payload,
                  Done sent = nullptr);

  // Finished when all PostSends so far are: with the first error of any of them.
  TicketPtr Flush();

  // A receive for a later Take. `run` is one execution of a program: a receive that
  // another run left behind means that the ranks no longer agree which step they are
  // in, and is an error rather than the wrong data.
  Status PostRecv(const RoutePtr& route, Part part, Buffer buffer, int64_t run);
  Posted Take(const RoutePtr& route);

  // `done` is called when the ticket is finished; its deadline counts from here.
  void Wait(const TicketPtr& ticket, Done done);
  void Cancel(const TicketPtr& ticket, const Status& why);

 private:
  using Key = uint64_t;  // peer and channel
  static Key KeyOf(const Route& route) {
    return static_cast<Key>(route.peer) << 32 | route.channel;
  }

  Status Check(const Route& route) const;
  uint32_t NextSequence(Ticket::Way way, const Route& route);
  TicketPtr Start(Ticket::Way way, const RoutePtr& route, uint32_t sequence, Part part,
                  Buffer buffer, bool synchronous = false);
  void Sent(uint64_t id, const Status& status);

  const int rank_;
  const int size_;
  Transport* const transport_;
  Watch* const watch_;

  // Never held while a ticket or the transport is called: both may come back.
  std::mutex mutex_;
  std::unordered_map<Key, uint32_t> sent_, received_;  // next sequence numbers
  std::unordered_map<Key, std::deque<Posted>> posted_;
  std::map<uint64_t, TicketPtr> sending_;                // by id, that is by age
  std::vector<std::pair<uint64_t, TicketPtr>> flushes_;  // last id each answers for
  Status send_error_;                                    // first since the last flush
};

}  // namespace smp

#endif  // SMP_TF_KERNELS_MAILBOX_H_

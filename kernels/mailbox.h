// Turns routes into messages: numbers them, keeps posted receives until somebody
// waits for them, and knows which sends are still on their way.
#ifndef SMP_TF_KERNELS_MAILBOX_H_
#define SMP_TF_KERNELS_MAILBOX_H_

#include <deque>
#include <map>
#include <mutex>
#include <string>
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

// How a message of device memory goes its way; see Message.
struct Delivery {
  void* stream = nullptr;
  bool more = false;
  bool hold = false;
  bool reserve = false;  // a receive whose buffer comes later
};

class Mailbox {
 public:
  // `transport` and `watch` must outlive the mailbox. `runs_ahead`: who waits does not
  // hold up the program, which may be a whole step ahead of the device; so a deadline
  // counts from the last message of the mailbox that was over.
  Mailbox(int rank, int size, Transport* transport, Watch* watch,
          bool runs_ahead = false);

  // Sends and receives that take the route's next sequence number.
  TicketPtr Send(const RoutePtr& route, Buffer buffer, bool synchronous);
  TicketPtr Recv(const RoutePtr& route, Part part, Buffer buffer);

  // The payload that belongs to a header that was received.
  TicketPtr RecvPayload(const TicketPtr& header, Buffer buffer);

  // A send that Flush answers for. Returns an error that is known at once. `sent` is
  // called when the payload has left or failed, before a Flush is finished by that.
  Status PostSend(const RoutePtr& route, const Buffer* header, Buffer payload,
                  Done sent = nullptr, const Delivery& delivery = {});

  // Finished when all that it answers for, so far, is: with the first error of any.
  TicketPtr Flush();

  // A receive for a later Take. `run` is one execution of a program: a receive that
  // another run left behind means that the ranks no longer agree which step they are
  // in, and is an error rather than the wrong data. With a stream in `delivery`, Flush
  // answers for it: who takes it lets a stream wait, and goes on.
  Status PostRecv(const RoutePtr& route, Part part, Buffer buffer, int64_t run,
                  const Delivery& delivery = {}, TicketPtr* ticket = nullptr);
  Posted Take(const RoutePtr& route);

  // Begins a sum of device memory over a group; see NcclTransport::AllReduce. Gives a
  // handle for TakeSum. `label`: what it is, and of which ranks.
  int64_t PostSum(int group, const std::string& label, Buffer buffer, const Sum& sum,
                  void* stream);
  TicketPtr TakeSum(int64_t handle);  // null: there is none, or not any more

  // `done` is called when the ticket is finished; its deadline counts from here.
  void Wait(const TicketPtr& ticket, Done done);

  // The same for what Flush answers for: its deadline counts from here.
  void Expect(const TicketPtr& ticket);
  void Cancel(const TicketPtr& ticket, const Status& why);

 private:
  using Key = uint64_t;  // peer and channel
  static Key KeyOf(const Route& route) {
    return static_cast<Key>(route.peer) << 32 | route.channel;
  }

  Status Check(const Route& route) const;
  uint32_t NextSequence(Ticket::Way way, const Route& route);
  TicketPtr Start(Ticket::Way way, const RoutePtr& route, uint32_t sequence, Part part,
                  Buffer buffer, bool synchronous = false,
                  const Delivery& delivery = {});
  void AnswerFor(const TicketPtr& ticket, Done over);
  void Over(uint64_t id, const Status& status);

  const int rank_;
  const int size_;
  Transport* const transport_;
  Watch* const watch_;
  const bool runs_ahead_;

  // Never held while a ticket or the transport is called: both may come back.
  std::mutex mutex_;
  std::unordered_map<Key, uint32_t> sent_, received_;  // next sequence numbers
  std::unordered_map<Key, std::deque<Posted>> posted_;
  std::unordered_map<uint64_t, TicketPtr> sums_;
  std::map<uint64_t, TicketPtr> open_;  // what Flush answers for, by id: by age
  std::vector<std::pair<uint64_t, TicketPtr>> flushes_;  // last id each answers for
  Status error_;                                         // first since the last flush
};

}  // namespace smp

#endif  // SMP_TF_KERNELS_MAILBOX_H_

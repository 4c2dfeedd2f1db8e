#include "mailbox.h"

#include <string>

namespace smp {

Mailbox::Mailbox(int rank, int size, Transport* transport, Watch* watch,
                 bool runs_ahead)
    : rank_(rank),
      size_(size),
      transport_(transport),
      watch_(watch),
      runs_ahead_(runs_ahead) {}

Status Mailbox::Check(const Route& route) const {
  if (route.peer < 0 || route.peer >= size_ || route.peer == rank_) {
    return {Code::kInvalid,
            "peer must be another rank of the job; peer=" + std::to_string(route.peer) +
                " rank=" + std::to_string(rank_) + " size=" + std::to_string(size_)};
  }
  if (route.channel > kMaxChannel) {
    return {Code::kInvalid,
            "channel must fit 28 bits; channel=" + std::to_string(route.channel)};
  }
  return {};
}

uint32_t Mailbox::NextSequence(Ticket::Way way, const Route& route) {
  std::lock_guard<std::mutex> lock(mutex_);
  return (way == Ticket::Way::kSend ? sent_ : received_)[KeyOf(route)]++;
}

TicketPtr Mailbox::Start(Ticket::Way way, const RoutePtr& route, uint32_t sequence,
                         Part part, Buffer buffer, bool synchronous,
                         const Delivery& delivery) {
  auto ticket = std::make_shared<Ticket>(way, route, sequence);
  const Status valid = Check(*route);
  if (!valid.ok()) {
    ticket->Finish(valid);
    return ticket;
  }
  const bool is_send = way == Ticket::Way::kSend;
  Message message;
  message.id = ticket->id();
  message.peer = route->peer;
  message.tag = MakeTag(part, is_send ? rank_ : route->peer, route->channel, sequence);
  message.buffer = std::move(buffer);
  message.synchronous = synchronous;
  message.stream = delivery.stream;
  message.more = delivery.more;
  message.hold = delivery.hold;
  auto done = [ticket](const Status& status) { ticket->Finish(status); };
  if (is_send) {
    transport_->Send(std::move(message), std::move(done));
  } else if (delivery.reserve) {
    transport_->Reserve(std::move(message), std::move(done));
  } else {
    transport_->Recv(std::move(message), std::move(done));
  }
  return ticket;
}

TicketPtr Mailbox::Send(const RoutePtr& route, Buffer buffer, bool synchronous) {
  return Start(Ticket::Way::kSend, route, NextSequence(Ticket::Way::kSend, *route),
               Part::kPayload, std::move(buffer), synchronous);
}

TicketPtr Mailbox::Recv(const RoutePtr& route, Part part, Buffer buffer) {
  return Start(Ticket::Way::kRecv, route, NextSequence(Ticket::Way::kRecv, *route),
               part, std::move(buffer));
}

TicketPtr Mailbox::RecvPayload(const TicketPtr& header, Buffer buffer) {
  return Start(Ticket::Way::kRecv, header->route(), header->sequence(), Part::kPayload,
               std::move(buffer));
}

Status Mailbox::PostSend(const RoutePtr& route, const Buffer* header, Buffer payload,
                         Done sent, const Delivery& delivery) {
  const uint32_t sequence = NextSequence(Ticket::Way::kSend, *route);
  if (header != nullptr) {
    // Not answered for on its own: it goes the way of its payload.
    Start(Ticket::Way::kSend, route, sequence, Part::kHeader, *header);
  }
  const TicketPtr ticket = Start(Ticket::Way::kSend, route, sequence, Part::kPayload,
                                 std::move(payload), /*synchronous=*/false, delivery);
  if (ticket->finished()) {  // most small sends end here
    const Status status = ticket->status();
    if (sent) sent(status);
    return status;
  }
  AnswerFor(ticket, std::move(sent));
  return {};
}

void Mailbox::AnswerFor(const TicketPtr& ticket, Done over) {
  const uint64_t id = ticket->id();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    open_.emplace(id, ticket);
  }
  // Only now: OnFinish may run at once, and must find the entry to remove.
  ticket->OnFinish([this, id, over = std::move(over)](const Status& status) {
    if (over) over(status);
    Over(id, status);
  });
}

void Mailbox::Over(uint64_t id, const Status& status) {
  std::vector<TicketPtr> flushed;
  std::vector<uint64_t> waiting;
  Status verdict;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    open_.erase(id);
    if (!status.ok() && error_.ok()) error_ = status;
    const uint64_t oldest = open_.empty() ? UINT64_MAX : open_.begin()->first;
    for (auto flush = flushes_.begin(); flush != flushes_.end();) {
      if (flush->first < oldest) {
        flushed.push_back(flush->second);
        flush = flushes_.erase(flush);
      } else {
        ++flush;
      }
    }
    if (!flushed.empty()) std::swap(verdict, error_);
    if (runs_ahead_) {
      for (const auto& each : open_) waiting.push_back(each.first);
      for (const auto& each : flushes_) waiting.push_back(each.second->id());
    }
  }
  if (!waiting.empty()) watch_->Restart(waiting);
  for (const auto& flush : flushed) flush->Finish(verdict);
}

TicketPtr Mailbox::Flush() {
  auto route = std::make_shared<Route>();
  Status verdict;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!open_.empty()) {
      const Ticket& oldest = *open_.begin()->second;  // the one it waits for
      *route = *oldest.route();
      auto ticket = std::make_shared<Ticket>(Ticket::Way::kFlush, std::move(route),
                                             oldest.sequence(), oldest.way());
      flushes_.emplace_back(open_.rbegin()->first, ticket);
      return ticket;
    }
    std::swap(verdict, error_);
  }
  auto ticket = std::make_shared<Ticket>(Ticket::Way::kFlush, std::move(route), 0);
  ticket->Finish(verdict);
  return ticket;
}

Status Mailbox::PostRecv(const RoutePtr& route, Part part, Buffer buffer, int64_t run,
                         const Delivery& delivery, TicketPtr* given) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto& queue = posted_[KeyOf(*route)];
    if (!queue.empty() && queue.front().run != run) {
      return {Code::kUnavailable,
              "an earlier step was given up on this rank, so that the ranks no longer "
              "agree which step they are in; restart the job: " +
                  queue.front().ticket->Describe()};
    }
  }
  std::shared_ptr<void> owner = buffer.owner;
  TicketPtr ticket =
      Start(Ticket::Way::kRecv, route, NextSequence(Ticket::Way::kRecv, *route), part,
            std::move(buffer), /*synchronous=*/false, delivery);
  if (ticket->finished() && !ticket->status().ok()) return ticket->status();
  if (delivery.stream != nullptr) {
    AnswerFor(ticket, [this, id = ticket->id()](const Status&) { watch_->Remove(id); });
  }
  if (given != nullptr) *given = ticket;
  std::lock_guard<std::mutex> lock(mutex_);
  posted_[KeyOf(*route)].push_back({std::move(ticket), std::move(owner), run});
  return {};
}

Posted Mailbox::Take(const RoutePtr& route) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = posted_.find(KeyOf(*route));
  if (found == posted_.end() || found->second.empty()) return {};
  Posted posted = std::move(found->second.front());
  found->second.pop_front();
  return posted;
}

int64_t Mailbox::PostSum(int group, const std::string& label, Buffer buffer,
                         const Sum& sum, void* stream) {
  auto route = std::make_shared<Route>();
  route->label = label;
  auto ticket = std::make_shared<Ticket>(Ticket::Way::kSum, std::move(route), 0);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    sums_.emplace(ticket->id(), ticket);
  }
  Message message;
  message.id = ticket->id();
  message.peer = group;
  message.buffer = std::move(buffer);
  message.stream = stream;
  message.sum = sum;
  transport_->AllReduce(std::move(message),
                        [ticket](const Status& status) { ticket->Finish(status); });
  return static_cast<int64_t>(ticket->id());
}

TicketPtr Mailbox::TakeSum(int64_t handle) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = sums_.find(static_cast<uint64_t>(handle));
  if (found == sums_.end()) return nullptr;
  TicketPtr ticket = std::move(found->second);
  sums_.erase(found);
  return ticket;
}

void Mailbox::Wait(const TicketPtr& ticket, Done done) {
  if (!ticket->finished()) watch_->Add(ticket);
  ticket->OnFinish(
      [this, id = ticket->id(), done = std::move(done)](const Status& status) {
        watch_->Remove(id);
        done(status);
      });
}

void Mailbox::Expect(const TicketPtr& ticket) {
  watch_->Add(ticket);
  // It may have finished in between, and nobody would take it from the watch.
  if (ticket->finished()) watch_->Remove(ticket->id());
}

void Mailbox::Cancel(const TicketPtr& ticket, const Status& why) {
  if (ticket->way() == Ticket::Way::kFlush) {
    ticket->Finish({why.code, why.text + ": " + ticket->Describe()});
  } else {
    transport_->Cancel(ticket->id(), why);
  }
}

}  // namespace smp

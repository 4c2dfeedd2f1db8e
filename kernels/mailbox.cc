#include "mailbox.h"

#include <string>

namespace smp {

Mailbox::Mailbox(int rank, int size, Transport* transport, Watch* watch)
    : rank_(rank), size_(size), transport_(transport), watch_(watch) {}

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
                         Part part, Buffer buffer, bool synchronous) {
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
  auto done = [ticket](const Status& status) { ticket->Finish(status); };
  if (is_send) {
    transport_->Send(std::move(message), std::move(done));
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
                         Done sent) {
  const uint32_t sequence = NextSequence(Ticket::Way::kSend, *route);
  if (header != nullptr) {
    // Not answered for on its own: it goes the way of its payload.
    Start(Ticket::Way::kSend, route, sequence, Part::kHeader, *header);
  }
  const TicketPtr ticket =
      Start(Ticket::Way::kSend, route, sequence, Part::kPayload, std::move(payload));
  if (ticket->finished()) {  // most small sends end here
    const Status status = ticket->status();
    if (sent) sent(status);
    return status;
  }
  const uint64_t id = ticket->id();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    sending_.emplace(id, ticket);
  }
  // Only now: OnFinish may run at once, and must find the entry to remove.
  ticket->OnFinish([this, id, sent = std::move(sent)](const Status& status) {
    if (sent) sent(status);
    Sent(id, status);
  });
  return {};
}

void Mailbox::Sent(uint64_t id, const Status& status) {
  std::vector<TicketPtr> flushed;
  Status verdict;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    sending_.erase(id);
    if (!status.ok() && send_error_.ok()) send_error_ = status;
    const uint64_t oldest = sending_.empty() ? UINT64_MAX : sending_.begin()->first;
    for (auto flush = flushes_.begin(); flush != flushes_.end();) {
      if (flush->first < oldest) {
        flushed.push_back(flush->second);
        flush = flushes_.erase(flush);
      } else {
        ++flush;
      }
    }
    if (!flushed.empty()) std::swap(verdict, send_error_);
  }
  for (const auto& flush : flushed) flush->Finish(verdict);
}

TicketPtr Mailbox::Flush() {
  auto route = std::make_shared<Route>();
  Status verdict;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!sending_.empty()) {
      *route = *sending_.begin()->second->route();  // the one it waits for, for errors
      auto ticket = std::make_shared<Ticket>(Ticket::Way::kFlush, std::move(route),
                                             sending_.begin()->second->sequence());
      flushes_.emplace_back(sending_.rbegin()->first, ticket);
      return ticket;
    }
    std::swap(verdict, send_error_);
  }
  auto ticket = std::make_shared<Ticket>(Ticket::Way::kFlush, std::move(route), 0);
  ticket->Finish(verdict);
  return ticket;
}

Status Mailbox::PostRecv(const RoutePtr& route, Part part, Buffer buffer, int64_t run) {
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
  TicketPtr ticket = Recv(route, part, std::move(buffer));
  if (ticket->finished() && !ticket->status().ok()) return ticket->status();
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

void Mailbox::Wait(const TicketPtr& ticket, Done done) {
  if (!ticket->finished()) watch_->Add(ticket);
  ticket->OnFinish(
      [this, id = ticket->id(), done = std::move(done)](const Status& status) {
        watch_->Remove(id);
        done(status);
      });
}

void Mailbox::Cancel(const TicketPtr& ticket, const Status& why) {
  if (ticket->way() == Ticket::Way::kFlush) {
    ticket->Finish({why.code, why.text + ": " + ticket->Describe()});
  } else {
    transport_->Cancel(ticket->id(), why);
  }
}

}  // namespace smp

#include "ticket.h"

#include <atomic>
#include <chrono>

namespace smp {

uint64_t NextId() {
  static std::atomic<uint64_t> next{1};
  return next++;
}

std::string Ticket::Describe() const {
  if (way_ == Way::kSum) return route_->label;
  const bool receives = oldest_ == Way::kRecv;
  std::string text = receives ? "receive" : "send";
  if (way_ == Way::kFlush) text = "flush of " + text + "s, the oldest one";
  if (!route_->label.empty()) text += " of " + route_->label;
  text += receives ? " from rank " : " to rank ";
  return text + std::to_string(route_->peer) + ", channel " +
         std::to_string(route_->channel) + ", step " + std::to_string(sequence_);
}

void Ticket::Finish(const Status& status) {
  Done done;
  Status told = status;
  // What a flush reports is the error of a send, which says already where it belongs.
  if (!told.ok() && way_ != Way::kFlush) told.text += ": " + Describe();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (finished_) return;
    finished_ = true;
    status_ = told;
    done.swap(done_);
  }
  changed_.notify_all();
  if (done) done(told);
}

void Ticket::OnFinish(Done done) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!finished_) {
      done_ = std::move(done);
      return;
    }
  }
  done(status_);
}

bool Ticket::WaitFor(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                           [this] { return finished_; });
}

bool Ticket::finished() {
  std::lock_guard<std::mutex> lock(mutex_);
  return finished_;
}

Status Ticket::status() {
  std::lock_guard<std::mutex> lock(mutex_);
  return status_;
}

}  // namespace smp
